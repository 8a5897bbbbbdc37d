// Steps of SGD on a multilayer perceptron, as programs: forward, softmax cross-entropy, backward and update.
//
//   x_0 = images;  x_{l+1} = activation_l(x_l * weight_l^T + bias_l);  loss = cross_entropy(x_layers, target)
//   and every parameter that has a group is updated from the loss's gradient, as in api/sgd.h
//
// What each layer computes, in which precision and order of summation, is product.h's, the loss cross_entropy.h's, the
// update sgd.h's: the results are the bits of those called one after the other.
// Aliasing: parameters and momentum buffers overlap neither each other nor anything else; ops/tensors.h checks that.
#pragma once

#include <algorithm>
#include <vector>

#include "layer.h"

namespace mnist_ext {

template <class T>
struct TrainedParameter {
  T* data;             // contiguous; a bias may be null
  T* momentum_buffer;  // laid out as data; null if its group has no momentum
  int group;           // its options in TrainSteps::groups; -1: frozen
  bool first_step;     // the momentum buffer holds nothing yet
};

template <class T>
struct TrainedLayer {
  int64_t in_features, out_features;  // at least 1
  TrainedParameter<T> weight;         // [out_features, in_features]
  TrainedParameter<T> bias;           // [out_features]
  bool relu;

  bool is_trained() const { return weight.group >= 0 || bias.group >= 0; }
};

template <class T>
struct TrainSteps {
  std::vector<TrainedLayer<T>> layers;  // at least 1
  ExampleSource<T> source;
  int64_t examples;       // in all steps together
  int64_t batch_size;     // of each step but the last, which has what is left; a single step may have 0 examples
  const T* class_weight;  // [classes], or null
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;             // mean or sum
  std::vector<SgdOptions> groups;  // lr and first_step do not count
  const double* lr;                // [steps, groups]
  T* losses;                       // [steps]

  int64_t steps() const { return examples <= batch_size ? 1 : (examples + batch_size - 1) / batch_size; }
  int64_t rows_of(int64_t step) const { return std::min(batch_size, examples - step * batch_size); }
  int64_t classes() const { return layers.back().out_features; }
};

struct BadExample {
  enum What { none, order, label } what = none;
  int64_t position = 0;  // of the example, counted in order
};

// How a device wants its programs made.
struct StepTraits {
  int64_t largest_fused_k;  // a weight's gradient that sums over more examples than this is formed in memory
  bool always_gathers;      // copies images that could be read in place
};

template <class T>
class TrainStepProgram {
 public:
  TrainStepProgram(const TrainSteps<T>& steps, StepTraits traits, void* workspace)
      : steps_(steps),
        traits_(traits),
        memory_(static_cast<char*>(workspace)) {
    const int64_t rows = std::min(steps.batch_size, steps.examples);
    const ExampleSource<T>& source = steps.source;
    if (traits.always_gathers || source.images.pixels || source.order) {
      images_ = take<T>(rows * steps.layers[0].in_features);
      labels_ = take<int64_t>(rows);
    }
    while (lowest_ < steps.layers.size() && !steps.layers[lowest_].is_trained()) ++lowest_;
    const bool fused = is_fused(rows);
    for (std::size_t l = 0; l < steps.layers.size(); ++l) {
      const TrainedLayer<T>& layer = steps.layers[l];
      const int64_t outputs = rows * layer.out_features;
      const bool trained = l >= lowest_;
      buffers_.push_back(
          {.output = take<T>(outputs),
           .grad_output = trained || l + 1 == steps.layers.size() ? take<T>(outputs) : nullptr,
           .grad_weight = !fused && layer.weight.group >= 0 ? take<T>(layer.out_features * layer.in_features) : nullptr,
           .grad_bias = !fused && layer.bias.group >= 0 ? take<T>(layer.out_features) : nullptr});
    }
  }

  int64_t workspace_bytes() const { return bytes_; }

  void append(int64_t step, std::vector<Entry<T>>& program) const {
    append(
        {.rows = steps_.rows_of(step), .first = step * steps_.batch_size, .step = step, .loss = steps_.losses + step},
        program);
  }

  // A step of a whole batch, and not the first one, whose examples, learning rates and place of the loss are read from
  // the device's memory.
  void append_replayed(StepValues<T>* values, T* const* loss_place, const double* lr,
                       std::vector<Entry<T>>& program) const {
    append({.rows = steps_.batch_size, .values = values, .loss_place = loss_place, .lr = lr}, program);
  }

 private:
  struct Buffers {
    T *output, *grad_output;     // [rows, out_features]
    T *grad_weight, *grad_bias;  // null: the update is fused, or there is none
  };

  struct Step {
    int64_t rows;
    int64_t first = 0;
    int64_t step = -1;  // one that is replayed
    T* loss = nullptr;
    StepValues<T>* values = nullptr;
    T* const* loss_place = nullptr;
    const double* lr = nullptr;
  };

  bool is_fused(int64_t rows) const { return rows <= traits_.largest_fused_k; }

  template <class E>
  E* take(int64_t elements) {
    char* place = memory_ + bytes_;
    bytes_ += (elements * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64;
    return reinterpret_cast<E*>(place);
  }

  void append(const Step& step, std::vector<Entry<T>>& program) const {
    const bool continues = !program.empty();
    const std::size_t first = program.size();
    if (images_ && step.rows > 0) program.push_back({gather(step), false, Sharing::examples});
    std::vector<Layer<T>> layers = layers_of(step);
    const std::span<const Layer<T>> all(layers);
    Layer<T>& last = layers.back();
    // By neurons every thread reads the whole batch, which is worth weights that stay in a core's cache if it is small.
    const Sharing sharing = is_fused(step.rows) ? Sharing::neurons : Sharing::any;
    append_forward(all.first(all.size() - 1), sharing, program);
    // A thread's rows of logits, their loss, and the gradient of the last layer's input.
    program.push_back({forward_product(last), !program.empty(), Sharing::examples});
    program.push_back({loss(step, last), false, Sharing::examples});
    if (last.grad_input) program.push_back({grad_input_product(last), false, Sharing::examples});
    last.grad_input = nullptr;
    if (lowest_ < all.size()) append_backward(all.subspan(lowest_), sharing, program);
    program[first].waits = continues;
  }

  Gather<T> gather(const Step& step) const {
    ExampleSource<T> from = step.values ? ExampleSource<T>{} : steps_.source;
    from.first = step.first;
    return {.from = from,
            .rows = step.rows,
            .features = steps_.layers[0].in_features,
            .classes = steps_.classes(),
            .ignore_index = steps_.ignore_index,
            .images = images_,
            .labels = labels_,
            .step = step.values};
  }

  std::vector<Layer<T>> layers_of(const Step& step) const {
    const Images<T>& images = steps_.source.images;
    MatrixView<T> input = {images_, steps_.layers[0].in_features, 1};
    if (!images_) input = {images.values + step.first * images.row_stride, images.row_stride, 1};
    const bool fused = is_fused(step.rows);
    std::vector<Layer<T>> layers;
    layers.reserve(buffers_.size());
    for (std::size_t l = 0; l < buffers_.size(); ++l) {
      const TrainedLayer<T>& layer = steps_.layers[l];
      const Buffers& buffers = buffers_[l];
      const bool is_last = l + 1 == buffers_.size(), follows_relu = l > 0 && steps_.layers[l - 1].relu;
      const MatrixView<T> output = {buffers.output, layer.out_features, 1};
      layers.push_back({.batch = step.rows,
                        .in_features = layer.in_features,
                        .out_features = layer.out_features,
                        .input = input,
                        .weight = {layer.weight.data, layer.in_features, 1},
                        .bias = layer.bias.data,
                        .relu = layer.relu,
                        .allow_tf32 = false,
                        .out = buffers.output,
                        .grad_output = {buffers.grad_output, layer.out_features, 1},
                        .output = is_last && layer.relu ? output : MatrixView<T>{},
                        .input_mask = follows_relu ? buffers_[l - 1].output : nullptr,
                        .grad_input = l > lowest_ ? buffers_[l - 1].grad_output : nullptr,
                        .grad_weight = fused ? nullptr : buffers.grad_weight,
                        .grad_bias = fused ? nullptr : buffers.grad_bias,
                        .update_weight = update(step, layer.weight),
                        .update_bias = update(step, layer.bias)});
      input = output;
    }
    return layers;
  }

  CrossEntropyForward<T> loss(const Step& step, const Layer<T>& last) const {
    ClassIndices target = {labels_, ClassIndices::Type::int64};
    if (!labels_) target = steps_.source.target.from(step.first);
    return {.problem = {.batch = step.rows,
                        .classes = last.out_features,
                        .positions = 1,
                        .logits = {last.out, last.out_features, 1},
                        .kind = TargetKind::indices,
                        .target = target,
                        .probabilities = {},
                        .weight = steps_.class_weight,
                        .ignore_index = steps_.ignore_index,
                        .label_smoothing = steps_.label_smoothing,
                        .reduction = steps_.reduction},
            .loss = step.loss,
            .grad_logits = buffers_.back().grad_output,
            .loss_place = step.loss_place};
  }

  ParameterUpdate<T> update(const Step& step, const TrainedParameter<T>& p) const {
    if (p.group < 0) return {};
    ParameterUpdate<T> update = {p.data, p.momentum_buffer, steps_.groups[p.group], nullptr};
    const bool replayed = step.step < 0;
    update.options.lr = replayed ? 0 : steps_.lr[step.step * static_cast<int64_t>(steps_.groups.size()) + p.group];
    update.options.first_step = p.first_step && step.step == 0;
    update.lr = replayed ? step.lr + p.group : nullptr;
    return update;
  }

  const TrainSteps<T>& steps_;
  StepTraits traits_;
  char* memory_;
  int64_t bytes_ = 0;
  T* images_ = nullptr;        // of the step, where they are not read in place
  int64_t* labels_ = nullptr;  // with images_
  std::size_t lowest_ = 0;     // the first layer that any gradient is needed for
  std::vector<Buffers> buffers_;
};

}  // namespace mnist_ext
