// Whole training steps in one parallel region. Threads wait for each other between phases only:
//
//   images    gathered and converted, where they are not rows of T already     each thread its rows
//   forward   of each layer but the last                                       its neurons
//   top       logits, loss, their gradient, the gradient of the layer's input  its rows
//   backward  the gradient of each layer's input, from above                   its columns, the neurons of the layer
//   below update    the gradient of each weight, a tile at a time, and the update    its neurons
//
// A thread reads and updates the same neurons' weights in every step, so that they stay in its core's cache.
#pragma once

#include "../train_step.h"
#include "barrier.h"
#include "cross_entropy_impl.h"
#include "linear_impl.h"
#include "sgd_impl.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Multiply-adds that are worth a thread of their own. Threads meet some six times a step, which costs nearly nothing
// between cores that share a cache, and more than a small step between others.
inline constexpr double kTrainStepGrain = 2e6;
// Workspaces up to this size are kept by the calling thread.
inline constexpr std::size_t kKeptWorkspace = 64 << 20;

// Hands out pieces of one block of memory; without one it counts what they take.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class E>
  E* take(int64_t elements) {
    char* piece = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += (static_cast<std::size_t>(elements) * sizeof(E) + 63) / 64 * 64;
    return reinterpret_cast<E*>(piece);
  }

  std::size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  std::size_t bytes_ = 0;
};

// What is kept of a layer during a step.
template <class T>
struct LayerBuffers {
  T* output;       // [rows, out_features]
  T* grad_output;  // [rows, out_features], 0 where ReLU's output was <= 0
  T* grad_weight;  // [out_features, in_features], for batches of more than one depth block; else null
};

template <class T>
struct TrainStepBuffers {
  LayerBuffers<T>* layers;
  T* images;        // [rows, in_features], or null where they are read in place
  int64_t* target;  // [examples]: checked, in order
  T *position_loss, *position_max, *position_log_sum;

  TrainStepBuffers(const TrainSteps<T>& x, Workspace& workspace) {
    const int64_t rows = x.batch_size < x.examples ? x.batch_size : x.examples;
    layers = workspace.take<LayerBuffers<T>>(x.depth);
    images = x.images.pixels || x.order ? workspace.take<T>(rows * x.layers[0].in_features) : nullptr;
    target = workspace.take<int64_t>(x.examples);
    position_loss = workspace.take<T>(rows);
    position_max = workspace.take<T>(rows);
    position_log_sum = workspace.take<T>(rows);
    for (int64_t l = 0; l < x.depth; ++l) {
      const TrainedLayer<T>& layer = x.layers[l];
      const LayerBuffers<T> of_layer = {
          workspace.take<T>(rows * layer.out_features), workspace.take<T>(rows * layer.out_features),
          rows > kDepthBlock ? workspace.take<T>(layer.out_features * layer.in_features) : nullptr};
      if (layers) layers[l] = of_layer;
    }
  }
};

// As many pixels as a vector of T has lanes.
template <class T>
struct PixelsOf {
  typedef uint8_t Raw __attribute__((vector_size(kVectorBytes / sizeof(T))));
};

// The part of a weight that a thread updates.
struct WeightShare {
  Range neurons, columns;
};

// One thread's part of one step.
template <class T>
class StepOfThread {
 public:
  StepOfThread(const TrainSteps<T>& args, const TrainStepBuffers<T>& buffers, int64_t step, int thread, int count)
      : x(args),
        at(buffers),
        step_(step),
        thread_(thread),
        count_(count),
        first_(step * args.batch_size) {
    rows_ = x.examples - first_ < x.batch_size ? x.examples - first_ : x.batch_size;
    if (at.images) {
      input_ = at.images;
      input_stride_ = x.layers[0].in_features;
    } else {
      input_stride_ = x.images.row_stride;
      input_ = x.images.values + first_ * input_stride_;
    }
  }

  void run(SpinBarrier& barrier) const {
    if (at.images) {
      convert_images();
      barrier.wait(count_);
    }
    for (int64_t l = 0; l + 1 < x.depth; ++l) {
      forward(l, {0, rows_}, neurons(l));
      barrier.wait(count_);
    }
    const int64_t lowest = lowest_trained();
    top(lowest);
    barrier.wait(count_);
    if (thread_ == 0) reduce_loss();
    for (int64_t l = x.depth - 2; l > lowest; --l) {
      backward(l, {0, rows_}, neurons(l - 1));
      barrier.wait(count_);
    }
    for (int64_t l = lowest; l < x.depth; ++l) update(l);
  }

 private:
  using V = Vec<T>;

  bool is_last(int64_t l) const { return l + 1 == x.depth; }

  // The first layer that any gradient is needed for.
  int64_t lowest_trained() const {
    int64_t l = 0;
    while (l < x.depth && x.layers[l].weight.group < 0 && x.layers[l].bias.group < 0) ++l;
    return l;
  }

  // In whole vectors where there are enough of them: the neurons are the columns of the gradient.
  Range neurons(int64_t l) const {
    const int64_t n = x.layers[l].out_features;
    return split(n, n >= 4 * V::width * count_ ? V::width : kDotColumns, thread_, count_);
  }

  WeightShare weight_share(int64_t l) const {
    const TrainedLayer<T>& layer = x.layers[l];
    if (layer.out_features >= 2 * kTileRows * count_) return {neurons(l), {0, layer.in_features}};
    return {{0, layer.out_features}, split(layer.in_features, V::width, thread_, count_)};
  }

  const T* input(int64_t l) const { return l == 0 ? input_ : at.layers[l - 1].output; }
  int64_t input_stride(int64_t l) const { return l == 0 ? input_stride_ : x.layers[l].in_features; }

  void convert_images() const {
    const int64_t features = x.layers[0].in_features;
    const Range share = split(rows_, 1, thread_, count_);
    for (int64_t row = share.begin; row < share.end; ++row) {
      const int64_t from = (x.order ? x.order[first_ + row] : first_ + row) * x.images.row_stride;
      T* to = at.images + row * features;
      if (x.images.pixels) {
        convert_pixels(x.images.pixels + from, features, to);
      } else {
        std::memcpy(to, x.images.values + from, features * sizeof(T));
      }
    }
  }

  void convert_pixels(const uint8_t* pixels, int64_t n, T* to) const {
    const V scale = V::broadcast(x.images.scale), shift = V::broadcast(x.images.shift);
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

  // The given neurons' outputs of the given rows.
  void forward(int64_t l, Range rows, Range columns) const {
    const TrainedLayer<T>& layer = x.layers[l];
    product_part(forward_product<T>({.rows = rows_,
                                     .in_features = layer.in_features,
                                     .out_features = layer.out_features,
                                     .input = {input(l), input_stride(l), 1},
                                     .weight = {layer.weight.data, layer.in_features, 1},
                                     .bias = layer.bias.data,
                                     .activation = layer.activation,
                                     .out = at.layers[l].output}),
                 rows, columns);
  }

  // The gradient of layer l's input, which is the output of the layer below.
  void backward(int64_t l, Range rows, Range columns) const {
    const TrainedLayer<T>& layer = x.layers[l];
    product_part<T>({.rows = rows_,
                     .columns = layer.in_features,
                     .depth = layer.out_features,
                     .a = at.layers[l].grad_output,
                     .a_row = layer.out_features,
                     .a_depth = 1,
                     .b = layer.weight.data,
                     .b_depth = layer.in_features,
                     .b_column = 1,
                     .c = at.layers[l - 1].grad_output,
                     .c_row = layer.in_features},
                    rows, columns);
    gate(l - 1, rows, columns);
  }

  // The gradient of ReLU.
  void gate(int64_t l, Range rows, Range columns) const {
    if (x.layers[l].activation != Activation::relu) return;
    const int64_t stride = x.layers[l].out_features;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const T* output = at.layers[l].output + row * stride + columns.begin;
      T* grad = at.layers[l].grad_output + row * stride + columns.begin;
      for_each_vector<T>(columns.size(), [&](int64_t i, int lanes) __attribute__((always_inline)) {
        store(grad + i, where_positive(load(output + i, lanes), load(grad + i, lanes)), lanes);
      });
    }
  }

  CrossEntropyProblem<T> loss_problem() const {
    const int64_t l = x.depth - 1, classes = x.layers[l].out_features;
    return {.batch = rows_,
            .classes = classes,
            .positions = 1,
            .logits = {at.layers[l].output, classes, 1},
            .kind = TargetKind::indices,
            .target = {at.target + first_, ClassIndices::Type::int64},
            .probabilities = {},
            .weight = x.class_weight,
            .ignore_index = x.ignore_index,
            .label_smoothing = x.label_smoothing,
            .reduction = x.reduction};
  }

  void reduce_loss() const {
    const CrossEntropyProblem<T> problem = loss_problem();
    const CrossEntropyForward<T> loss = {.problem = problem,
                                         .position_loss = at.position_loss,
                                         .position_max = nullptr,
                                         .position_log_sum = nullptr,
                                         .total_weight = nullptr,
                                         .grad_logits = nullptr,
                                         .loss = x.losses + step_};
    reduce_losses(loss, check_targets(problem).total_weight);
  }

  // The last layer forward, the loss, and both backward.
  void top(int64_t lowest) const {
    const int64_t l = x.depth - 1, classes = x.layers[l].out_features;
    const CrossEntropyProblem<T> problem = loss_problem();
    const Range rows = split(rows_, rows_together(problem), thread_, count_);
    forward(l, rows, {0, classes});

    T total_weight = static_cast<T>(check_targets(problem).total_weight);
    const T one = 1;
    const CrossEntropyForward<T> loss = {.problem = problem,
                                         .position_loss = at.position_loss,
                                         .position_max = at.position_max,
                                         .position_log_sum = at.position_log_sum,
                                         .total_weight = &total_weight,
                                         .grad_logits = at.layers[l].grad_output,
                                         .loss = nullptr};
    const CrossEntropyBackward<T> gradient = {.problem = problem,
                                              .grad_output = &one,
                                              .grad_output_stride = 0,
                                              .position_max = at.position_max,
                                              .position_log_sum = at.position_log_sum,
                                              .total_weight = &total_weight,
                                              .grad_logits = at.layers[l].grad_output,
                                              .grad_probabilities = nullptr};
    const Coefficients<T> q(problem);
    const GradientScale<T> scales(&gradient);
    cross_entropy_part<T>({&loss, &gradient, problem, q, scales}, thread_, count_);
    gate(l, rows, {0, classes});
    if (l > lowest) backward(l, rows, {0, x.layers[l].in_features});
  }

  SgdOptions options(const TrainedParameter<T>& p) const {
    SgdOptions o = x.groups[p.group];
    o.lr = x.lr[step_ * x.group_count + p.group];
    o.first_step = p.first_step && step_ == 0;
    return o;
  }

  void update(int64_t l) const {
    const TrainedLayer<T>& layer = x.layers[l];
    const WeightShare share = weight_share(l);
    if (layer.weight.group >= 0 && share.neurons.size() > 0 && share.columns.size() > 0) {
      const SgdOptions o = options(layer.weight);
      if (at.layers[l].grad_weight) {
        update_from_memory(l, share, o);
      } else {
        update_from_tiles(l, share, SgdUpdate<T>(o));
      }
    }
    if (layer.bias.group >= 0 && share.columns.begin == 0) update_bias(l, share.neurons);
  }

  Product<T> grad_weight(int64_t l) const {
    const TrainedLayer<T>& layer = x.layers[l];
    return {.rows = layer.out_features,
            .columns = layer.in_features,
            .depth = rows_,
            .a = at.layers[l].grad_output,
            .a_row = 1,
            .a_depth = layer.out_features,
            .b = input(l),
            .b_depth = input_stride(l),
            .b_column = 1,
            .c = at.layers[l].grad_weight,
            .c_row = layer.in_features};
  }

  void update_from_memory(int64_t l, const WeightShare& share, const SgdOptions& o) const {
    const Product<T> g = grad_weight(l);
    const TrainedParameter<T>& weight = x.layers[l].weight;
    product_part(g, share.neurons, share.columns);
    const SgdTensor<T> tensor = {g.rows * g.columns, weight.data, g.c, weight.momentum_buffer};
    for (int64_t n = share.neurons.begin; n < share.neurons.end; ++n) {
      sgd_range(tensor, o, {n * g.columns + share.columns.begin, n * g.columns + share.columns.end});
    }
  }

  // A column of tiles after the other: its part of the input stays in the first-level cache, and the gradient of the
  // outputs, packed once, passes by.
  void update_from_tiles(int64_t l, const WeightShare& share, const SgdUpdate<T>& sgd) const {
    const Product<T> g = grad_weight(l);
    const TrainedParameter<T>& weight = x.layers[l].weight;
    const int64_t row_tiles = (share.neurons.size() + kTileRows - 1) / kTileRows;
    const int64_t packed_tile = rows_ * kTileRows;
    T* packed = static_cast<T*>(scratch(Scratch::grad_tiles, grad_tiles_bytes(share.neurons.size(), rows_)));
    for (int64_t tile = 0; tile < row_tiles; ++tile) {
      const Range rows = split(share.neurons.size(), 1, tile, row_tiles);
      pack_a_columns<T>(g, share.neurons.begin + rows.begin, static_cast<int>(rows.size()), {0, rows_},
                        packed + tile * packed_tile);
    }
    for (int64_t column = share.columns.begin; column < share.columns.end; column += kTileColumns<T>) {
      const int64_t rest = share.columns.end - column, n = rest < kTileColumns<T> ? rest : kTileColumns<T>;
      const int vectors = static_cast<int>((n + V::width - 1) / V::width);
      for (int64_t tile = 0; tile < row_tiles; ++tile) {
        const Range rows = split(share.neurons.size(), 1, tile, row_tiles);
        const int64_t offset = (share.neurons.begin + rows.begin) * g.columns + column;
        const Tile<T> t = {.a = packed + tile * packed_tile,
                           .a_row = 1,
                           .a_depth = kTileRows,
                           .b = g.b + column,
                           .b_depth = g.b_depth,
                           .depth = rows_,
                           .c = weight.data + offset,
                           .c_row = g.columns,
                           .last = static_cast<int>(n - (vectors - 1) * V::width),
                           .add = nullptr,
                           .add_row = 0,
                           .relu = false};
        T* buffer = weight.momentum_buffer ? weight.momentum_buffer + offset : nullptr;
        with_tile_shape<T>(static_cast<int>(rows.size()), vectors, t.last, [&](auto s) __attribute__((always_inline)) {
          update_tile<s.rows, s.vectors, s.is_partial>(t, buffer, sgd);
        });
      }
    }
  }

  // c -= lr * the tile's products, or what the options make of it.
  template <int R, int N, bool partial>
  static void update_tile(const Tile<T>& t, T* buffer, const SgdUpdate<T>& sgd) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < N; ++v) prefetch(t.c + r * t.c_row + v * V::width);
    }
    V acc[R][N] = {};
    accumulate_tile<T, R, N, partial>(t, acc);
    if (!partial && !buffer && sgd.options.weight_decay == 0 && !sgd.options.maximize) {  // in registers
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) {
          T* p = t.c + r * t.c_row + v * V::width;
          fma(acc[r][v], sgd.minus_lr, V::load(p)).store(p);
        }
      }
      return;
    }
    V gradient[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) gradient[r][v] = uncontracted(acc[r][v]);
    }
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 1
      for (int v = 0; v < N; ++v) {
        const int64_t i = r * t.c_row + v * V::width;
        sgd(t.c + i, gradient[r][v], buffer ? buffer + i : nullptr, partial && v == N - 1 ? t.last : V::width);
      }
    }
  }

  void update_bias(int64_t l, Range columns) const {
    const TrainedParameter<T>& bias = x.layers[l].bias;
    const int64_t stride = x.layers[l].out_features;
    const SgdOptions o = options(bias);
    const SgdUpdate<T> sgd(o);
    const GatedRows<T> grad_output = {rows_, at.layers[l].grad_output, stride, nullptr, 0};
    T sums[kSummedColumns<T>];
    for (int64_t begin = columns.begin; begin < columns.end; begin += kSummedColumns<T>) {
      const int64_t end = columns.end - begin < kSummedColumns<T> ? columns.end : begin + kSummedColumns<T>;
      column_sums(grad_output, {begin, end}, sums);
      for_each_vector<T>(end - begin, [&](int64_t i, int lanes) {
        const int64_t column = begin + i;
        sgd(bias.data + column, V::load(sums + i), bias.momentum_buffer ? bias.momentum_buffer + column : nullptr,
            lanes);
      });
    }
  }

 public:
  static std::size_t grad_tiles_bytes(int64_t neurons, int64_t rows) {
    const int64_t tiles = (neurons + kTileRows - 1) / kTileRows;
    return static_cast<std::size_t>(tiles * rows * kTileRows) * sizeof(T) + kVectorBytes;
  }

  // All that this thread will ask scratch() for, so that it throws before anything is updated.
  void reserve() const {
    reserve_product<T>();
    if (rows_ > kDepthBlock) return;
    for (int64_t l = 0; l < x.depth; ++l) {
      scratch(Scratch::grad_tiles, grad_tiles_bytes(weight_share(l).neurons.size(), rows_));
    }
  }

 private:
  const TrainSteps<T>& x;
  const TrainStepBuffers<T>& at;
  int64_t step_;
  int thread_, count_;
  int64_t first_, rows_;  // the step's examples
  const T* input_;
  int64_t input_stride_;
};

template <class T>
double multiply_adds(const TrainSteps<T>& x) {
  double weights = 0;
  for (int64_t l = 0; l < x.depth; ++l) {
    weights += static_cast<double>(x.layers[l].in_features) * static_cast<double>(x.layers[l].out_features);
  }
  const int64_t rows = x.batch_size < x.examples ? x.batch_size : x.examples;
  return 3 * weights * static_cast<double>(rows);
}

// Copies the targets, in order, and returns the first that is neither ignored nor a class, or -1.
template <class T>
int64_t copy_targets(const TrainSteps<T>& x, int64_t* to) {
  const int64_t classes = x.layers[x.depth - 1].out_features;
  for (int64_t i = 0; i < x.examples; ++i) {
    const int64_t t = x.target[x.order ? x.order[i] : i];
    if (t != x.ignore_index && static_cast<uint64_t>(t) >= static_cast<uint64_t>(classes)) return i;
    to[i] = t;
  }
  return -1;
}

template <class T>
int64_t train_steps(const TrainSteps<T>& x, int threads) {
  Workspace counted(nullptr);
  TrainStepBuffers<T>(x, counted);
  const bool kept = counted.bytes() <= kKeptWorkspace;
  const Temporary temporary(kept ? 0 : counted.bytes());
  Workspace workspace(kept ? scratch(Scratch::train_step, counted.bytes()) : temporary.data());
  const TrainStepBuffers<T> buffers(x, workspace);
  const int64_t bad = copy_targets(x, buffers.target);
  if (bad >= 0) return bad;

  const int wanted = threads_for(multiply_adds(x), kTrainStepGrain, threads);
  parallel_in_phases(
      wanted, [&](int thread, int count) { StepOfThread<T>(x, buffers, 0, thread, count).reserve(); },
      [&](int thread, int count, SpinBarrier& barrier) {
        for (int64_t step = 0; step < x.steps(); ++step) {
          const StepOfThread<T> of_thread(x, buffers, step, thread, count);
          of_thread.run(barrier);
          if (step + 1 < x.steps()) barrier.wait(count);
        }
      });
  return -1;
}

}  // namespace mnist_ext::MNIST_EXT_ISA
