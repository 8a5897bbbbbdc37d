// Runs a program in one parallel region: every thread walks through all entries and does its share of each; threads
// wait for each other only before the entries that say so.
#pragma once

#include "../api/backend.h"
#include "cross_entropy/cross_entropy.h"
#include "product/half.h"
#include "product/row_sums.h"
#include "product/update.h"
#include "threads/parallel.h"

namespace mnist_ext::MNIST_EXT_ISA {

// As many pixels as a vector of T has lanes.
template <class T>
struct PixelsOf {
  typedef uint8_t Raw __attribute__((vector_size(kVectorBytes / sizeof(T))));
};

template <class T>
void convert_pixels(const Images<T>& images, const uint8_t* pixels, int64_t n, T* to) {
  using V = Vec<T>;
  const V scale = V::broadcast(images.scale), shift = V::broadcast(images.shift);
  for_each_vector<T>(n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    typename PixelsOf<T>::Raw bytes{};
    if (lanes == V::width) {
      std::memcpy(&bytes, pixels + i, sizeof(bytes));
    } else {
      for (int j = 0; j < lanes; ++j) bytes[j] = pixels[i + j];
    }
    const auto whole = __builtin_convertvector(bytes, typename V::RawBits);
    store(to + i, fma(V{__builtin_convertvector(whole, typename V::Raw)}, scale, shift), lanes);
  });
}

template <class T>
void gather(const Gather<T>& args, Range rows) {
  const ExampleSource<T>& from = args.from;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t example = from.order ? from.order[from.first + row] : from.first + row;
    const int64_t offset = example * from.images.row_stride;
    T* to = args.images + row * args.features;
    args.labels[row] = from.target[example];
    if (from.images.pixels) {
      convert_pixels(from.images, from.images.pixels + offset, args.features, to);
    } else {
      std::memcpy(to, from.images.values + offset, args.features * sizeof(T));
    }
  }
}

// One of the threads that run a program.
template <class T>
class Worker {
 public:
  // row_unit: rows of a batch are divided among threads in multiples of it.
  Worker(int thread, int count, int64_t row_unit, void* workspace)
      : thread_(thread),
        count_(count),
        row_unit_(row_unit),
        workspace_(workspace) {}

  void run(const Entry<T>& entry) const {
    if (const auto* args = std::get_if<Gather<T>>(&entry.work)) gather(*args, examples(args->rows));
    if (const auto* product = std::get_if<Product<T>>(&entry.work)) run(*product, entry.sharing);
    if (const auto* loss = std::get_if<CrossEntropyForward<T>>(&entry.work)) pass_of(*loss).share(thread_, count_);
  }

  // The loss, when all have done their share of it.
  void reduce(const CrossEntropyForward<T>& loss) const { pass_of(loss).reduce(); }

  // Asks scratch() for all that the entry will.
  void reserve(const Entry<T>& entry) const {
    if (const auto* loss = std::get_if<CrossEntropyForward<T>>(&entry.work); loss && loss->block.softcap != 0) {
      logits_scratch(loss->block);
    }
    const auto* product = std::get_if<Product<T>>(&entry.work);
    if (!product) return;
    reserve_product<T>(kernel_of(Block<T>(*product)));
    if (product->update.param && !product->c) {
      packed_a_scratch<T>(share(*product, entry.sharing).rows.size(), product->K);
    }
  }

 private:
  struct Share {
    Range rows, columns;
  };

  Range examples(int64_t n) const { return split(n, row_unit_, thread_, count_); }

  // In whole vectors where there are enough of them: the neurons are columns of the gradient of a layer's input.
  Range neurons(int64_t n) const {
    return split(n, n >= 4 * Vec<T>::width * count_ ? Vec<T>::width : kDotColumns, thread_, count_);
  }

  // The neurons are the rows of a weight's gradient, which is what has an update, and the columns of other products.
  Share share(const Product<T>& p, Sharing sharing) const {
    if (sharing == Sharing::examples) return {examples(p.M), {0, p.N}};
    if (!p.update.param) return {{0, p.M}, neurons(p.N)};
    const Block<T> gradient(p);  // of a large batch the weight's way between the cores is the shorter one
    const bool by_row = !p.c || row_threads(gradient, kernel_of(gradient), count_) == count_;
    if (by_row && p.M >= 2 * kTileRows * count_) return {neurons(p.M), {0, p.N}};
    return {{0, p.M}, split(p.N, Vec<T>::width, thread_, count_)};
  }

  // A few sums are one thread's: they are on the same cache line.
  Range sums_share(const Product<T>& p) const {
    if (p.M >= 2 * kTileRows * count_) return neurons(p.M);
    return {0, thread_ == 0 ? p.M : 0};
  }

  void run(const Product<T>& p, Sharing sharing) const {
    if (p.update.param) {
      const Share part = share(p, sharing);
      update_part(p, part.rows, part.columns);
    } else if (p.c && sharing == Sharing::any) {
      product_share(Block<T>(p), thread_, count_);
    } else if (p.c) {
      const Share part = share(p, sharing);
      product_part(Block<T>(p), part.rows, part.columns);
    }
    if (p.forms_row_sums()) row_sums(p, sums_share(p));
  }

  ForwardPass<T> pass_of(const CrossEntropyForward<T>& loss) const {
    const double divisor = loss.divisor ? static_cast<double>(*loss.divisor) : check_targets(loss.problem).total_weight;
    return {loss, workspace_, divisor};
  }

  int thread_, count_;
  int64_t row_unit_;
  void* workspace_;
};

template <class T>
double multiply_adds(const Program<T>& program) {
  double total = 0;
  for (int64_t i = 0; i < program.count; ++i) {
    if (const auto* product = std::get_if<Product<T>>(&program.entries[i].work)) total += multiply_adds(*product);
  }
  return total;
}

// So that a thread has the same rows in each entry.
template <class T>
int64_t row_unit(const Program<T>& program) {
  int64_t unit = 1;
  for (int64_t i = 0; i < program.count; ++i) {
    const auto* loss = std::get_if<CrossEntropyForward<T>>(&program.entries[i].work);
    if (loss && unit < rows_together(loss->problem)) unit = rows_together(loss->problem);
  }
  return unit;
}

template <class T>
void run_program(const Program<T>& program, void* workspace, const Launch& launch) {
  const int threads = threads_for(multiply_adds(program), program.grain, launch.threads);
  const int64_t unit = row_unit(program);
  const Entry<T>*begin = program.entries, *end = begin + program.count;
  const CrossEntropyForward<T>* last_loss = nullptr;  // that nothing waits for
  bool waits = false;
  for (const Entry<T>* entry = begin; entry < end; ++entry) {
    if (entry->waits) last_loss = nullptr;
    if (const auto* loss = std::get_if<CrossEntropyForward<T>>(&entry->work)) last_loss = loss;
    waits = waits || entry->waits;
  }
  if (waits) {
    parallel_in_phases(
        threads,
        [&](int thread, int count) {
          const Worker<T> worker(thread, count, unit, workspace);
          for (const Entry<T>* entry = begin; entry < end; ++entry) worker.reserve(*entry);
        },
        [&](int thread, int count, SpinBarrier& barrier) {
          const Worker<T> worker(thread, count, unit, workspace);
          const CrossEntropyForward<T>* loss = nullptr;  // to be reduced behind the next barrier
          for (const Entry<T>* entry = begin; entry < end; ++entry) {
            if (entry->waits) {
              barrier.wait(count);
              if (loss && thread == 0) worker.reduce(*loss);
              loss = nullptr;
            }
            worker.run(*entry);
            if (const auto* of_step = std::get_if<CrossEntropyForward<T>>(&entry->work)) loss = of_step;
          }
        });
  } else {
    parallel(threads, [&](int thread, int count) {
      const Worker<T> worker(thread, count, unit, workspace);
      for (const Entry<T>* entry = begin; entry < end; ++entry) worker.run(*entry);
    });
  }
  if (last_loss) Worker<T>(0, 1, unit, workspace).reduce(*last_loss);
}

// Of products alone, none of which reads what another one writes.
template <class T>
void run_program_half(const Program<T>& program, void* workspace, const Launch& launch) {
  for (int64_t i = 0; i < program.count; ++i) {
    run_widened(*std::get_if<Product<T>>(&program.entries[i].work), launch.threads, [&](const Product<float>& product) {
      const Entry<float> entry = {product};
      run_program<float>({&entry, 1, program.grain}, workspace, launch);
    });
  }
}

template <class T>
int64_t workspace_bytes(const Program<T>& program) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < program.count; ++i) {
    const auto* loss = std::get_if<CrossEntropyForward<T>>(&program.entries[i].work);
    if (loss && bytes < ForwardPass<T>::workspace_bytes(*loss)) bytes = ForwardPass<T>::workspace_bytes(*loss);
  }
  return bytes;
}

}  // namespace mnist_ext::MNIST_EXT_ISA
