// Training steps in one cluster of blocks. Each block has, in its shared memory, `slice` neurons of each layer: their
// weights, biases and momentum buffers. It computes their outputs for all examples of the batch and stores these to
// every block of the cluster, as all need them in the next layer.
//
//   first layer forward                                                       wait: nobody reads the last outputs
//   other layers forward, each                                                barrier before
//   logits -> loss and their gradient, by every block for itself              barrier before
//   gradient of each hidden layer's output from the top, own neurons          barrier between
//   weight gradients and update, own neurons; the first layer's come last, as they need nothing of other blocks:
//   arrive before them, so that the others can go on
//
// For the gradient of a layer's input a block needs the weights of its own neurons as inputs of the layer above, all
// rows of those columns: it fetches them while the weights of the step are still in place. That, and to begin to fetch
// the next step's images, is done while the block waits for the others' first outputs.
#pragma once

#include "bulk_copy.cuh"
#include "elements.cuh"
#include "groups.cuh"
#include "sgd.cuh"
#include "train_step.h"
#include "train_step_examples.cuh"
#include "train_step_pixels.cuh"

namespace mnist_ext::cuda {

inline constexpr unsigned kStepThreads = 256;
inline constexpr int kStepWarps = kStepThreads / kWarp;
inline constexpr int kTileRows = 8;  // a warp's products: so many rows by so many neurons
// Of images the block has usually 8 neurons, and each number of an image is to be converted once; above it has fewer.
inline constexpr int kImageNeurons = 8, kHiddenNeurons = 4;
inline constexpr int kLanesOfRow = 4;
inline constexpr int kSumRows = 64;  // images of bytes whose products with weights a warp has at once

inline constexpr int kClusterLayers = 8, kClusterGroups = 8, kClusterRates = 384;  // what a kernel's arguments hold

// Numbers of one access of 16 bytes; rows are padded to whole ones, with zeros.
struct alignas(16) Quad {
  float at[kQuad];
};

// Places in shared memory are in floats from its begin. Of a block where nothing else is said.
struct ClusterLayer {
  TrainedParameter<float> weight, bias;
  int features, neurons;          // of the layer
  int slice;                      // neurons of each block, a multiple of 4; the last blocks may have fewer, or none
  int input_pitch, output_pitch;  // features and neurons, rounded up to whole quads
  int weight_pitch;               // input_pitch, or a little more
  bool relu;
  int weights, weights_buffer;  // [slice, weight_pitch]
  int biases, biases_buffer;    // [slice]
  int columns;                  // [slice of the layer below, output_pitch], or -1: not needed
  int outputs;                  // [rows, output_pitch]: of the whole layer
  int grads, grads_pitch;       // of outputs; [rows, output_pitch] of the whole layer, or [rows, slice]
  bool grads_of_all;
};

struct ClusterWork {
  ClusterLayer layers[kClusterLayers];
  int depth, lowest;  // lowest: the first layer that is trained
  int batch_size, steps, rows;
  Images<float> images;
  int64_t image_count;
  PixelNumbers pixels;  // of images of bytes
  bool bulk;            // rows of images can be fetched by bulk copies
  ClassIndices target;
  const int64_t* order;
  int64_t first, examples;  // of this launch, in order
  const float* class_weight;
  int64_t ignore_index;
  float every, of_target;  // s / classes, 1 - s, with the label smoothing s
  bool mean;
  SgdOptions groups[kClusterGroups];
  int group_count;
  bool first_launch;
  float* losses;
  int images_at[2], image_bytes;  // [rows, image_bytes], of two steps
  int targets[2];                 // [rows] of int: -1 where ignored
  int row_losses;                 // [rows]
  int sums, sum_rows;             // of the warps: [kStepWarps, sum_rows, kImageNeurons]; with images of bytes
  int barriers;                   // two
  int floats;                     // all in all
  float lr[kClusterRates];        // [steps, group_count]
};
static_assert(sizeof(ClusterWork) <= 4096, "a kernel's arguments");

__device__ inline float relu_of(float x) { return x <= 0 ? 0 : x; }  // NaN stays

// Sums over groups of lanes, of 2 * kHalf numbers of each lane. Each exchange, with the lanes at kFirst, kFirst / 2,
// ... kLast, halves a lane's numbers: it keeps the lower half if it is the lower one of the two lanes.
template <int kHalf, int kFirst, int kLast, int kNumbers>
__device__ void exchange(float (&sums)[kNumbers]) {
  const bool upper = threadIdx.x & kFirst;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = upper ? sums[i] : sums[i + kHalf], kept = upper ? sums[i + kHalf] : sums[i];
    sums[i] = kept + __shfl_xor_sync(kAllLanes, given, kFirst);
  }
  if constexpr (kFirst > kLast) exchange<kHalf / 2, kFirst / 2, kLast>(sums);
}

// Neighbours in a row of outputs, that one lane has.
template <int kNumbers>
struct alignas(4 * kNumbers) Neighbours {
  float at[kNumbers];
};

// Products of 8 rows of x with kNeurons rows of w, of which there are x_rows and w_rows (at least 1; the others'
// results do not count). Each lane gets the sums of the row lane / 4 with kNeurons / 4 rows of w from
// lane % 4 * kNeurons / 4 on.
template <int kNeurons>
__device__ Neighbours<kNeurons / 4> tile_products(const float* x, int x_pitch, int x_rows, const float* w, int w_pitch,
                                                  int w_rows, int quads) {
  const int lane = threadIdx.x % kWarp;
  float sums[kTileRows * kNeurons] = {};
  const auto quad_of_x = [&](int row, int q) {
    return load_vector<Quad>(x + (row < x_rows ? row : 0) * x_pitch + kQuad * q);
  };
  const auto quad_of_w = [&](int n, int q) {
    return load_vector<Quad>(w + (n < w_rows ? n : 0) * w_pitch + kQuad * q);
  };
  const auto multiply = [](const Quad& of_x, const Quad& of_w, float& sum) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) sum = fmaf(of_x.at[i], of_w.at[i], sum);
  };
  // While there is a quad for each lane, lanes go along the rows, and each makes the whole tile's products of it.
  const int whole = quads / kWarp * kWarp;
  for (int q = lane; q < whole; q += kWarp) {
    Quad of_w[kNeurons];
#pragma unroll
    for (int n = 0; n < kNeurons; ++n) of_w[n] = quad_of_w(n, q);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const Quad of_x = quad_of_x(r, q);
#pragma unroll
      for (int n = 0; n < kNeurons; ++n) multiply(of_x, of_w[n], sums[r * kNeurons + n]);
    }
  }
  if (whole > 0) exchange<kTileRows * kNeurons / 2, kWarp / 2, kLanesOfRow>(sums);
  // Now a lane has the row lane / 4 alone, and goes on with it: a turn takes four quads.
  for (int q = whole + lane % kLanesOfRow; q < quads; q += kLanesOfRow) {
    const Quad of_x = quad_of_x(lane / kLanesOfRow, q);
#pragma unroll
    for (int n = 0; n < kNeurons; ++n) multiply(of_x, quad_of_w(n, q), sums[n]);
  }
  exchange<kNeurons / 2, kLanesOfRow / 2, 1>(sums);
  Neighbours<kNeurons / 4> own;
#pragma unroll
  for (int i = 0; i < kNeurons / 4; ++i) own.at[i] = sums[i];
  return own;
}

// Number: of the images.
template <class Number>
struct ClusterSteps {
  const ClusterWork& w;
  float* shared;
  int rank, cluster;
  int step = 0, rows = 0;  // rows: of this step

  __device__ ClusterSteps(const ClusterWork& work)
      : w(work),
        shared(reinterpret_cast<float*>(shared_memory())),
        rank(static_cast<int>(cluster_rank())),
        cluster(static_cast<int>(cluster_size())) {}

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int warp() const { return thread() / kWarp; }
  __device__ int lane() const { return thread() % kWarp; }

  __device__ int first_neuron(const ClusterLayer& layer) const { return rank * layer.slice; }
  __device__ int neurons(const ClusterLayer& layer) const {
    const int left = layer.neurons - first_neuron(layer);
    return left < 0 ? 0 : left < layer.slice ? left : layer.slice;
  }

  __device__ int rows_of(int of_step) const {
    const int64_t left = w.examples - static_cast<int64_t>(of_step) * w.batch_size;
    return static_cast<int>(left < w.batch_size ? left : w.batch_size);
  }

  __device__ const Number* images() const { return reinterpret_cast<const Number*>(shared + w.images_at[step % 2]); }
  __device__ int image_pitch() const { return w.image_bytes / static_cast<int>(sizeof(Number)); }
  __device__ int* targets(int of_step) const { return reinterpret_cast<int*>(shared + w.targets[of_step % 2]); }
  __device__ CopyBarrier* barrier(int of_step) const {
    return reinterpret_cast<CopyBarrier*>(shared + w.barriers) + of_step % 2;
  }

  // What is copied at begin and end: calls f(global, shared) for every number of the block's parameters.
  template <class F>
  __device__ void for_parameters(const F& f) const {
    for (int l = 0; l < w.depth; ++l) {
      const ClusterLayer& layer = w.layers[l];
      const int64_t first = first_neuron(layer);
      const int count = neurons(layer), features = layer.features;
      for (int i = thread(); i < count * features; i += kStepThreads) {
        const int at = i / features * layer.weight_pitch + i % features;
        f(layer.weight, first * features + i, layer.weights + at, layer.weights_buffer + at);
      }
      if (!layer.bias.data) continue;
      for (int i = thread(); i < count; i += kStepThreads) {
        f(layer.bias, first + i, layer.biases + i, layer.biases_buffer + i);
      }
    }
  }

  __device__ void begin() const {
    const int end = w.bulk ? w.images_at[0] : w.floats;  // the images come last
    for (int i = thread(); i < end; i += kStepThreads) shared[i] = 0;
    __syncthreads();
    for_parameters([&](const TrainedParameter<float>& p, int64_t from, int to, int buffer_to) {
      shared[to] = p.data[from];
      if (p.momentum_buffer && !(p.first_step && w.first_launch)) shared[buffer_to] = p.momentum_buffer[from];
    });
    if (thread() == 0) {
      barrier(0)->init();
      barrier(1)->init();
    }
    announce_images(0);
    __syncthreads();
  }

  __device__ void end() const {
    for_parameters([&](const TrainedParameter<float>& p, int64_t to, int from, int buffer_from) {
      if (p.group < 0) return;
      p.data[to] = shared[from];
      if (p.momentum_buffer) p.momentum_buffer[to] = shared[buffer_from];
    });
  }

  __device__ int64_t example_of(int of_step, int row) const {
    return w.first + static_cast<int64_t>(of_step) * w.batch_size + row;
  }
  __device__ int64_t checked_image_of(int of_step, int row, int64_t image) const {
    return checked_image(image, example_of(of_step, row), w.image_count);
  }

  // The first row that a thread fetches: as many for each warp. The others are kStepThreads apart.
  __device__ int first_row() const { return lane() * kStepWarps + warp(); }

  // Device memory answers after some hundred cycles. So what a thread reads of its first row is asked for a good while
  // before it is needed: first_image(), then its label along with fetch_images(), then fetch_targets().
  __device__ int64_t first_image(int of_step) const {
    return first_row() < rows_of(of_step) ? image_at(w.order, example_of(of_step, first_row())) : -1;
  }

  // Calls f(row, image) for the thread's rows of a step; image is unchecked. first: first_image().
  template <class F>
  __device__ void for_own_rows(int of_step, int64_t first, const F& f) const {
    const int count = rows_of(of_step);
    if (first_row() < count) f(first_row(), first);
    for (int row = first_row() + static_cast<int>(kStepThreads); row < count; row += kStepThreads) {
      f(row, image_at(w.order, example_of(of_step, row)));
    }
  }

  // Before the block's barrier before fetch_images().
  __device__ void announce_images(int of_step) const {
    if (!w.bulk || thread() != 0) return;
    barrier(of_step)->expect(static_cast<unsigned>(rows_of(of_step) * w.image_bytes));
  }

  // Begins to fetch the images of a step. Returns the label of the thread's first row.
  __device__ int64_t fetch_images(int of_step, int64_t first) const {
    char* to = reinterpret_cast<char*>(shared + w.images_at[of_step % 2]);
    const Number* from;
    if constexpr (sizeof(Number) == 1) {
      from = w.images.pixels;
    } else {
      from = w.images.values;
    }
    int64_t label = 0;
    if (first_row() < rows_of(of_step)) label = label_at(w.target, checked_image_of(of_step, first_row(), first));
    if (w.bulk) {
      for_own_rows(of_step, first, [&](int row, int64_t image) {
        bulk_copy(to + row * w.image_bytes, from + checked_image_of(of_step, row, image) * w.images.row_stride,
                  static_cast<unsigned>(w.image_bytes), barrier(of_step));
      });
      return label;
    }
    const int count = rows_of(of_step), features = w.layers[0].features;
    for (int row = warp(); row < count; row += kStepWarps) {
      const int64_t image = checked_image_of(of_step, row, image_at(w.order, example_of(of_step, row)));
      Number* place = reinterpret_cast<Number*>(to + row * w.image_bytes);
      for (int i = lane(); i < features; i += kWarp) place[i] = from[image * w.images.row_stride + i];
    }
    return label;
  }

  // The targets of a step are there after the block's next barrier. first_label: what fetch_images() returned.
  __device__ void fetch_targets(int of_step, int64_t first, int64_t first_label) const {
    const int classes = w.layers[w.depth - 1].neurons;
    for_own_rows(of_step, first, [&](int row, int64_t image) {
      image = checked_image_of(of_step, row, image);
      int64_t target = row == first_row() ? first_label : label_at(w.target, image);
      target = checked_label(target, image, w.ignore_index, classes);
      targets(of_step)[row] = target == w.ignore_index ? -1 : static_cast<int>(target);
    });
  }

  // To the same place in every block.
  template <int kNumbers>
  __device__ void store_to_all(float* place, const Neighbours<kNumbers>& numbers) const {
    for (int block = 0; block < cluster; ++block) store_vector(shared_memory_of(block, place), numbers);
  }

  // Calls f(first row, first neuron) for each tile of the warp, of the block's so many neurons.
  template <int kNeurons, class F>
  __device__ void for_tiles(int count, const F& f) const {
    const int tiles_of_row = (count + kNeurons - 1) / kNeurons;
    const int tiles = (rows + kTileRows - 1) / kTileRows * tiles_of_row;
    for (int tile = warp(); tile < tiles; tile += kStepWarps) {
      f(tile / tiles_of_row * kTileRows, tile % tiles_of_row * kNeurons);
    }
  }

  // Outputs of a row's neurons from `neuron` on, from their sums of products, to all blocks.
  template <int kNumbers>
  __device__ void finish_outputs(const ClusterLayer& layer, int row, int neuron, Neighbours<kNumbers> sums) const {
    if (row >= rows || neuron >= layer.slice || first_neuron(layer) + neuron >= layer.output_pitch) return;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      if (layer.bias.data) sums.at[i] += shared[layer.biases + neuron + i];
      if (layer.relu) sums.at[i] = relu_of(sums.at[i]);
      if (neuron + i >= neurons(layer)) sums.at[i] = 0;
    }
    store_to_all(shared + layer.outputs + row * layer.output_pitch + first_neuron(layer) + neuron, sums);
  }

  // Outputs of a layer's own neurons from x [rows, input_pitch]. before_storing is called once, by whole warps.
  template <int kNeurons, class Before>
  __device__ void forward(const ClusterLayer& layer, const float* x, int pitch, const Before& before_storing) const {
    const int count = neurons(layer);
    bool stored = false;
    for_tiles<kNeurons>(count, [&](int row, int neuron) {
      const auto sums = tile_products<kNeurons>(x + row * pitch, pitch, rows - row,
                                                shared + layer.weights + neuron * layer.weight_pitch,
                                                layer.weight_pitch, count - neuron, layer.input_pitch / kQuad);
      if (!stored) before_storing();
      stored = true;
      finish_outputs(layer, row + lane() / kLanesOfRow, neuron + lane() % kLanesOfRow * (kNeurons / kLanesOfRow), sums);
    });
    if (!stored) before_storing();
  }

  // The same of the first layer, by tensor cores: each warp multiplies some of the inputs of kSumRows images, and then
  // the warps' sums are added up, in the order of the warps.
  template <class Before>
  __device__ void forward(const ClusterLayer& layer, const uint8_t* x, int pitch, const Before& before_storing) const {
    const int count = neurons(layer);
    bool stored = false;
    for (int neuron = 0; neuron < count; neuron += kImageNeurons) {
      for (int row = 0; row < rows; row += kSumRows) {
        TensorSums sums[kSumRows / 16];
        pixels_times_weights(sums, x + row * pitch, pitch, rows - row,
                             shared + layer.weights + neuron * layer.weight_pitch, layer.weight_pitch, count - neuron,
                             layer.input_pitch / kQuad, warp(), kStepWarps, w.pixels);
        float* of_warps = shared + w.sums;
        if (stored) __syncthreads();  // the sums before have been read
        store_sums(sums, of_warps + warp() * w.sum_rows * kImageNeurons);
        __syncthreads();
        if (!stored) before_storing();
        stored = true;
        constexpr int kPair = 2, kPairs = kImageNeurons / kPair;
        for (int i = thread(); i < w.sum_rows * kPairs; i += kStepThreads) {
          Neighbours<kPair> sum = {};
#pragma unroll
          for (int of = 0; of < kStepWarps; ++of) {
            const auto part = load_vector<Neighbours<kPair>>(of_warps + (of * w.sum_rows * kPairs + i) * kPair);
#pragma unroll
            for (int k = 0; k < kPair; ++k) sum.at[k] += part.at[k];
          }
          finish_outputs(layer, row + i / kPairs, neuron + i % kPairs * kPair, sum);
        }
      }
    }
    if (!stored) before_storing();
  }

  __device__ void store_sums(const TensorSums (&sums)[kSumRows / 16], float* to) const {
#pragma unroll
    for (int half = 0; half < kSumRows / 8; ++half) {
      const int row = 8 * half + lane() / 4;
      const float* pair = sums[half / 2].at + 2 * (half % 2);
      if (row < w.sum_rows) store_vector(to + row * kImageNeurons + lane() % 4 * 2, Neighbours<2>{{pair[0], pair[1]}});
    }
  }

  template <class Before>
  __device__ void forward_images(const Before& before_storing) const {
    if constexpr (sizeof(Number) == 1) {
      forward(w.layers[0], images(), image_pitch(), before_storing);
    } else {
      forward<kImageNeurons>(w.layers[0], images(), image_pitch(), before_storing);
    }
  }

  __device__ void forward(int l) const {
    forward<kHiddenNeurons>(w.layers[l], shared + w.layers[l - 1].outputs, w.layers[l - 1].output_pitch, [] {});
  }

  // The weights of a layer that belong to the block's own neurons of the layer below.
  __device__ void fetch_columns(int l) const {
    const ClusterLayer &layer = w.layers[l], &below = w.layers[l - 1];
    if (layer.columns < 0) return;
    const int quads = (neurons(below) + kQuad - 1) / kQuad, first = first_neuron(below);
    for (int i = thread(); i < quads * layer.neurons; i += kStepThreads) {
      const int neuron = i / quads, column = i % quads * kQuad;
      const float* row = shared + layer.weights + neuron % layer.slice * layer.weight_pitch + first + column;
      const Quad quad = load_vector<Quad>(shared_memory_of(neuron / layer.slice, row));
#pragma unroll
      for (int k = 0; k < kQuad; ++k) shared[layer.columns + (column + k) * layer.output_pitch + neuron] = quad.at[k];
    }
  }

  __device__ double weight_of_targets() const {
    double total = 0;
    for (int row = lane(); row < rows; row += kWarp) {
      const int target = targets(step)[row];
      if (target >= 0) total += static_cast<double>(weight_of_class(target));
    }
    return reduce_warp(total, Add{});
  }

  // The loss of each row, and in place of the logits their gradient; see ../cross_entropy.h.
  // total: weight_of_targets(). Ends with a barrier of the block.
  __device__ void loss(double total) const {
    const ClusterLayer& top = w.layers[w.depth - 1];
    const int* target = targets(step);
    const float scale = w.mean ? static_cast<float>(1 / total) : 1;
    const int sub = thread() % kLanesOfRow;
    for (int first = 0; first < rows; first += kStepThreads / kLanesOfRow) {
      if (first + warp() * (kWarp / kLanesOfRow) >= rows) continue;
      // What lies beyond the last row goes through its sums, as the whole warp makes them, and writes nothing.
      const int row = first + thread() / kLanesOfRow;
      const bool counts = row < rows;
      const int of_row = counts ? row : rows - 1;
      loss_of_row(shared + top.outputs + of_row * top.output_pitch, target[of_row], sub, scale, counts,
                  shared + w.row_losses + of_row);
    }
    __syncthreads();
    if (rank != 0 || warp() != 0) return;
    double sum = 0;
    for (int row = lane(); row < rows; row += kWarp) sum += static_cast<double>(shared[w.row_losses + row]);
    sum = reduce_warp(sum, Add{});
    if (lane() == 0) w.losses[step] = static_cast<float>(w.mean ? sum / total : sum);
  }

  __device__ float weight_of_class(int c) const { return w.class_weight ? w.class_weight[c] : 1; }

  template <class Operation>
  __device__ static float reduce_row(float x, Operation operation) {
#pragma unroll
    for (int distance = kLanesOfRow / 2; distance > 0; distance /= 2) {
      x = operation(x, __shfl_xor_sync(kAllLanes, x, distance));
    }
    return x;
  }

  __device__ void loss_of_row(float* x, int target, int sub, float scale, bool counts, float* loss) const {
    const ClusterLayer& top = w.layers[w.depth - 1];
    const bool smooth = w.every > 0;
    const float x_target = target >= 0 ? x[target] : 0;
    float max = -INFINITY;
    for (int c = sub; c < top.neurons; c += kLanesOfRow) max = Max{}(max, x[c]);
    max = reduce_row(max, Max{});
    float others = 0, of_every = 0, loss_of_every = 0;  // others: the exponentials of all classes but the target
    for (int c = sub; c < top.neurons; c += kLanesOfRow) {
      if (c != target) others += expf(x[c] - max);
      if (smooth) {
        of_every += w.every * weight_of_class(c);
        loss_of_every -= w.every * weight_of_class(c) * (x[c] - max);
      }
    }
    others = reduce_row(others, Add{});
    const float sum = others + (target >= 0 ? expf(x_target - max) : 0);
    const float log_sum = logf(sum), inverse_sum = 1 / sum;
    if (smooth) {
      of_every = reduce_row(of_every, Add{});
      loss_of_every = reduce_row(loss_of_every, Add{}) + of_every * log_sum;
    }
    if (!counts) return;
    const float of_target = target >= 0 ? w.of_target * weight_of_class(target) : 0;
    if (sub == 0) *loss = target >= 0 ? of_target * (log_sum - (x_target - max)) + loss_of_every : 0;
    for (int c = sub; c < top.neurons; c += kLanesOfRow) {
      const float p = expf(x[c] - max) * inverse_sum, e = smooth ? w.every * weight_of_class(c) : 0;
      // p - 1 of the target from the others: the difference would be lost as p approaches 1.
      float gradient = p * of_every - e + of_target * (c == target ? -(others * inverse_sum) : p);
      gradient *= scale;
      if (target < 0 || (top.relu && x[c] <= 0)) gradient = 0;
      x[c] = gradient;
    }
  }

  // The gradient of the own neurons' outputs in the layer below, from that of all outputs of layer l.
  __device__ void backward(int l) const {
    const ClusterLayer &layer = w.layers[l], &below = w.layers[l - 1];
    const int count = neurons(below);
    for_tiles<kHiddenNeurons>(count, [&](int row, int neuron) {
      auto sums = tile_products<kHiddenNeurons>(shared + layer.grads + row * layer.output_pitch, layer.output_pitch,
                                                rows - row, shared + layer.columns + neuron * layer.output_pitch,
                                                layer.output_pitch, count - neuron, layer.output_pitch / kQuad);
      constexpr int kOwn = kHiddenNeurons / 4;
      const int r = row + lane() / 4, n = neuron + lane() % 4 * kOwn, of_layer = first_neuron(below) + n;
      if (r >= rows || n >= below.slice || of_layer >= below.output_pitch) return;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float output = shared[below.outputs + r * below.output_pitch + of_layer + i];
        if (n + i >= count || (below.relu && output <= 0)) sums.at[i] = 0;
      }
      if (below.grads_of_all) {
        store_to_all(shared + below.grads + r * below.grads_pitch + of_layer, sums);
      } else {
        store_vector(shared + below.grads + r * below.grads_pitch + n, sums);
      }
    });
  }

  // Of the outputs of the own neurons: [rows, grads_pitch].
  __device__ const float* own_grads(const ClusterLayer& layer) const {
    return shared + layer.grads + (layer.grads_of_all ? first_neuron(layer) : 0);
  }

  __device__ SgdOptions options(const TrainedParameter<float>& p) const {
    SgdOptions o = w.groups[p.group];
    o.lr = static_cast<double>(w.lr[step * w.group_count + p.group]);
    o.first_step = p.first_step && w.first_launch && step == 0;
    return o;
  }

  // Weight gradients and update of the own neurons: a thread has kNeurons neurons' weights of 4 inputs. Each layer
  // begins with another warp: the work of those above is little, and is done beside that of the first one.
  template <int kNeurons>
  __device__ void update_weights(int l, const float* x, int pitch) const {
    const ClusterLayer& layer = w.layers[l];
    const int first = static_cast<int>((threadIdx.x - 2 * kWarp * static_cast<unsigned>(l + 1)) % kStepThreads);
    const int count = neurons(layer), quads = layer.input_pitch / kQuad;
    const SgdOptions o = options(layer.weight);
    for (int i = first; i < (count + kNeurons - 1) / kNeurons * quads; i += kStepThreads) {
      const int neuron = i / quads * kNeurons, quad = i % quads;
      const float* grads = own_grads(layer) + neuron;
      constexpr int kTogether = kNeurons < kQuad ? kNeurons : kQuad;
      float sums[kNeurons][kQuad] = {};
#pragma unroll 4
      for (int row = 0; row < rows; ++row) {
        const Quad of_x = load_vector<Quad>(x + row * pitch + kQuad * quad);
        Neighbours<kTogether> of_g[kNeurons / kTogether];
#pragma unroll
        for (int n = 0; n < kNeurons; n += kTogether) {  // the slice may end in the middle of eight
          const int there = neuron + n < layer.slice ? n : 0;
          of_g[n / kTogether] = load_vector<Neighbours<kTogether>>(grads + row * layer.grads_pitch + there);
        }
#pragma unroll
        for (int n = 0; n < kNeurons; ++n) {
#pragma unroll
          for (int k = 0; k < kQuad; ++k) {
            sums[n][k] = fmaf(of_g[n / kTogether].at[n % kTogether], of_x.at[k], sums[n][k]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kNeurons; ++n) {
        if (neuron + n < count) update_quad(layer, o, neuron + n, quad, sums[n]);
      }
    }
  }

  // The same of the first layer, by tensor cores: a warp has units of 8 quads of inputs, the last warp the first one.
  __device__ void update_weights(const uint8_t* x, int pitch) const {
    const ClusterLayer& layer = w.layers[0];
    const SgdOptions o = options(layer.weight);
    const int units = (layer.input_pitch / kQuad + kUnitQuads - 1) / kUnitQuads;
    for (int neuron = 0; neuron < neurons(layer); neuron += kImageNeurons) {
      for (int unit = kStepWarps - 1 - warp(); unit < units; unit += 4 * kStepWarps) {
        if (unit + 3 * kStepWarps < units) {
          update_units<4>(layer, o, x, pitch, neuron, unit);
        } else {
          update_units<3>(layer, o, x, pitch, neuron, unit);
        }
      }
    }
  }

  // Of kUnits units of inputs, kStepWarps apart, and kImageNeurons neurons.
  template <int kUnits>
  __device__ void update_units(const ClusterLayer& layer, const SgdOptions& o, const uint8_t* x, int pitch, int neuron,
                               int unit) const {
    const int count = neurons(layer), quads = layer.input_pitch / kQuad;
    float sums[kUnits][2][kQuad];
    pixels_times_gradients(sums, x, pitch, rows, own_grads(layer) + neuron, layer.grads_pitch, count - neuron, quads,
                           unit, kStepWarps, w.pixels);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int quad = (unit + u * kStepWarps) * kUnitQuads + lane() / 4;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int n = neuron + lane() % 4 * 2 + k;
        if (n < count && quad < quads) update_quad(layer, o, n, quad, sums[u][k]);
      }
    }
  }

  __device__ void update_biases(int l) const {
    const ClusterLayer& layer = w.layers[l];
    const float* grads = own_grads(layer);
    const int count = neurons(layer);
    const int first = static_cast<int>((threadIdx.x + kWarp * static_cast<unsigned>(l + 5)) % kStepThreads);
    for (int n = first; n < count; n += kStepThreads) {
      Pack<float, 1> gradient = {}, bias, buffer;
#pragma unroll 8
      for (int row = 0; row < rows; ++row) gradient.at[0] += grads[row * layer.grads_pitch + n];
      bias.at[0] = shared[layer.biases + n];
      float* of_buffer = layer.bias.momentum_buffer ? shared + layer.biases_buffer + n : nullptr;
      if (of_buffer) {
        buffer.at[0] = *of_buffer;
        sgd_elements<float, 1>(options(layer.bias), bias, gradient, &buffer);
        *of_buffer = buffer.at[0];
      } else {
        sgd_elements<float, 1>(options(layer.bias), bias, gradient, nullptr);
      }
      shared[layer.biases + n] = bias.at[0];
    }
  }

  __device__ void update_quad(const ClusterLayer& layer, const SgdOptions& o, int neuron, int quad,
                              const float (&gradient)[kQuad]) const {
    const int at = neuron * layer.weight_pitch + kQuad * quad;
    Pack<float, kQuad> p = load_pack<float, kQuad>(shared + layer.weights + at), g;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) g.at[k] = gradient[k];
    if (kQuad * quad + kQuad > layer.features) {  // the padding has no gradient, so that it stays 0
#pragma unroll
      for (int k = 1; k < kQuad; ++k) {
        if (kQuad * quad + k >= layer.features) g.at[k] = 0;
      }
    }
    if (layer.weight.momentum_buffer) {
      Pack<float, kQuad> buffer = load_pack<float, kQuad>(shared + layer.weights_buffer + at);
      sgd_elements<float, kQuad>(o, p, g, &buffer);
      store_pack(shared + layer.weights_buffer + at, buffer);
    } else {
      sgd_elements<float, kQuad>(o, p, g, nullptr);
    }
    store_pack(shared + layer.weights + at, p);
  }

  __device__ void update(int l) const {
    const ClusterLayer& layer = w.layers[l];
    if (layer.weight.group >= 0) {
      if (l > 0) {
        update_weights<2>(l, shared + w.layers[l - 1].outputs, w.layers[l - 1].output_pitch);
      } else if constexpr (sizeof(Number) == 1) {
        update_weights(images(), image_pitch());
      } else {
        update_weights<kImageNeurons>(0, images(), image_pitch());
      }
    }
    if (layer.bias.group >= 0) update_biases(l);
  }

  __device__ void run_step() {
    rows = rows_of(step);
    const bool more = step + 1 < w.steps;
    if (more) announce_images(step + 1);
    __syncthreads();  // the images of the step before have been read; those of this one are there, if plainly copied
    const int64_t first = more ? first_image(step + 1) : -1;
    if (w.bulk) barrier(step)->wait(static_cast<unsigned>(step / 2));
    forward_images([] { cluster_wait(); });
    cluster_arrive();
    // While the others come: all weights of layers above are those of this step.
    const int64_t first_label = more ? fetch_images(step + 1, first) : 0;
    for (int l = w.lowest + 1; l < w.depth; ++l) fetch_columns(l);
    const double total = weight_of_targets();
    cluster_wait();
    for (int l = 1; l < w.depth; ++l) {
      forward(l);
      cluster_sync();
    }
    loss(total);
    if (more) fetch_targets(step + 1, first, first_label);
    for (int l = w.depth - 1; l > w.lowest; --l) {
      backward(l);
      if (w.layers[l - 1].grads_of_all) {
        cluster_sync();
      } else {
        __syncthreads();
      }
    }
    for (int l = w.depth - 1; l > 0 && l >= w.lowest; --l) update(l);
    if (w.depth > 1) cluster_arrive();  // what other blocks store here has been read
    if (w.lowest == 0) update(0);
    if (w.depth == 1) cluster_arrive();
  }

  __device__ void run() {
    begin();
    const int64_t first = first_image(0);
    fetch_targets(0, first, fetch_images(0, first));
    cluster_arrive();
    for (; step < w.steps; ++step) run_step();
    cluster_wait();
    __syncthreads();
    end();
  }
};

template <class Number>
__global__ void __launch_bounds__(kStepThreads, 1) train_steps_kernel(const ClusterWork work) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  ClusterSteps<Number>(work).run();
#endif
}

}  // namespace mnist_ext::cuda
