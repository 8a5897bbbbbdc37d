// Training steps by the kernels of each op: what they are given, in which order, each by a launch of its own or all of
// a step by that of a graph.
#include <algorithm>
#include <bit>
#include <vector>

#include "cross_entropy.h"
#include "linear.h"
#include "sgd.h"
#include "train_step_examples.cuh"
#include "train_step_sequence.h"

namespace mnist_ext::cuda {
namespace {

// Stands for the workspace while its bytes are counted: what a product needs depends on which results it is to have,
// and on their alignment.
char* const kNowhere = reinterpret_cast<char*>(uintptr_t{256});

// Where everything of a step lies in the workspace.
template <class T>
class Sequence {
 public:
  Sequence(const TrainSteps<T>& steps, int64_t images, void* workspace)
      : x_(steps),
        images_(images),
        workspace_(static_cast<char*>(workspace)) {
    captured_ = take<CapturedSteps<T>>(1);
    const int64_t rows = std::min(x_.batch_size, x_.examples), classes = x_.layers[x_.depth - 1].out_features;
    while (lowest_ < x_.depth && x_.layers[lowest_].weight.group < 0 && x_.layers[lowest_].bias.group < 0) ++lowest_;
    examples_ = {take<T>(rows * x_.layers[0].in_features), take<int64_t>(rows)};
    for (int64_t l = 0; l < x_.depth; ++l) {
      const TrainedLayer<T>& layer = x_.layers[l];
      const int64_t outputs = rows * layer.out_features;
      layers_.push_back({take<T>(outputs), l >= lowest_ ? take<T>(outputs) : nullptr,
                         layer.weight.group >= 0 ? take<T>(layer.out_features * layer.in_features) : nullptr,
                         layer.bias.group >= 0 ? take<T>(layer.out_features) : nullptr});
    }
    loss_workspace_ = take<char>(cross_entropy_workspace_bytes(rows, classes, 1));
    product_workspace_ = take<char>(0);
  }

  // All that is needed. To plan the products takes longer than all else here.
  int64_t bytes() {
    int64_t of_products = 0;
    rows_ = 0;
    // Of a whole step or of the last, smaller one.
    for (const int64_t of_step :
         {std::min(x_.batch_size, x_.examples), x_.examples - (x_.steps() - 1) * x_.batch_size}) {
      if (of_step == rows_) continue;
      rows_ = of_step;
      for (int64_t l = 0; l < x_.depth; ++l) {
        for (const Product<T>& p : {forward(l), grad_input(l), grad_weight(l)}) {
          if (p.rows > 0) of_products = std::max(of_products, product_workspace_bytes(p, Precision::full));
        }
      }
    }
    return bytes_ + of_products;
  }

  void run(StepGraph* graph, cudaStream_t stream) {
    const int64_t steps = x_.steps(), whole = x_.examples / x_.batch_size;
    int64_t done = 0;
    if (graph && whole > 0 && x_.group_count <= kCapturedGroups) done = run_whole_steps(*graph, whole, stream);
    for (; done < steps; ++done) start_step(done, stream);
  }

 private:
  struct OfLayer {
    T *outputs, *grads;          // [rows, out_features]; grads before the gate of ReLU
    T *grad_weight, *grad_bias;  // null: frozen
  };

  // What differs between steps; in those that are captured, it is told on the device.
  struct OfStep {
    ExampleSource<T> examples;
    const double* lr;  // [group_count]
    T* loss;
    bool first;
    CapturedSteps<T>* captured;  // null, or in place of the above
  };

  // Returns how many of the first `whole` steps it has made.
  int64_t run_whole_steps(StepGraph& graph, int64_t whole, cudaStream_t stream) {
    const std::vector<int64_t> settings = fixed_settings();
    const bool known = graph.holds == settings;
    int64_t done = 0;
    // The first step with new momentum buffers, and the first one at all: it also loads the kernels, which a capture
    // might not.
    if (has_new_buffers() || (!known && graph.started != settings)) start_step(done++, stream);
    graph.started = settings;
    if (done == whole || graph.refused) return done;
    if (!known && !capture(graph, settings)) return done;
    const int64_t told_at_once = kToldRates / std::max<int64_t>(x_.group_count, 1);
    while (done < whole) {
      const int64_t steps = std::min(told_at_once, whole - done);
      tell_steps(done, steps, stream);
      for (int64_t i = 0; i < steps; ++i) graph.graph.launch(stream);
      done += steps;
    }
    return done;
  }

  bool capture(StepGraph& graph, const std::vector<int64_t>& settings) {
    rows_ = x_.batch_size;
    graph.holds.clear();
    graph.refused = !graph.graph.capture([&](cudaStream_t stream) {
      start({.examples = {}, .lr = nullptr, .loss = nullptr, .first = false, .captured = captured_}, stream);
    });
    if (!graph.refused) graph.holds = settings;
    return !graph.refused;
  }

  void tell_steps(int64_t first, int64_t steps, cudaStream_t stream) const {
    ToldSteps<T> told{};
    told.examples = examples_from(first);
    told.losses = x_.losses + first;
    told.steps = static_cast<int>(steps);
    told.group_count = static_cast<int>(x_.group_count);
    std::copy_n(x_.lr + first * x_.group_count, steps * x_.group_count, told.lr);
    launch("train_steps tell_steps", tell_steps_kernel<T>, Shape{1, kTellThreads}, stream, told, captured_);
  }

  void start_step(int64_t step, cudaStream_t stream) {
    rows_ = std::min(x_.batch_size, x_.examples - step * x_.batch_size);
    start({.examples = examples_from(step),
           .lr = x_.lr + step * x_.group_count,
           .loss = x_.losses + step,
           .first = step == 0,
           .captured = nullptr},
          stream);
  }

  // Starts the kernels of a step of rows_ examples.
  void start(const OfStep& of, cudaStream_t stream) const {
    gather(of, stream);
    for (int64_t l = 0; l < x_.depth; ++l) make(forward(l), stream);
    loss(of, stream);
    for (int64_t l = x_.depth - 1; l >= lowest_; --l) {
      make(grad_weight(l), stream);
      if (l > lowest_) make(grad_input(l), stream);
    }
    update(of, stream);
  }

  // All that is fixed in a captured step.
  std::vector<int64_t> fixed_settings() const {
    const auto address = [](const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)); };
    std::vector<int64_t> all = {address(workspace_),
                                address(product_workspace_),
                                static_cast<int64_t>(sizeof(T)),
                                x_.batch_size,
                                address(x_.class_weight),
                                x_.ignore_index,
                                std::bit_cast<int64_t>(x_.label_smoothing),
                                static_cast<int64_t>(x_.reduction),
                                x_.depth,
                                x_.group_count};
    const auto add = [&](const TrainedParameter<T>& p) {
      all.insert(all.end(), {address(p.data), address(p.momentum_buffer), p.group});
    };
    for (int64_t l = 0; l < x_.depth; ++l) {
      const TrainedLayer<T>& layer = x_.layers[l];
      all.insert(all.end(), {layer.in_features, layer.out_features, static_cast<int64_t>(layer.activation)});
      add(layer.weight);
      add(layer.bias);
    }
    for (int64_t g = 0; g < x_.group_count; ++g) {
      const SgdOptions& o = x_.groups[g];
      for (const double number : {o.momentum, o.dampening, o.weight_decay}) {
        all.push_back(std::bit_cast<int64_t>(number));
      }
      all.insert(all.end(), {o.nesterov, o.maximize});
    }
    return all;
  }

  bool has_new_buffers() const {
    return std::any_of(x_.layers, x_.layers + x_.depth, [](const TrainedLayer<T>& layer) {
      return (layer.weight.momentum_buffer && layer.weight.first_step) ||
             (layer.bias.momentum_buffer && layer.bias.first_step);
    });
  }

  ExampleSource<T> examples_from(int64_t step) const {
    return {x_.images, x_.target, x_.order, images_, step * x_.batch_size};
  }

  template <class E>
  E* take(int64_t elements) {
    char* place = workspace_ + bytes_;
    bytes_ += (elements * static_cast<int64_t>(sizeof(E)) + 15) / 16 * 16;
    return reinterpret_cast<E*>(place);
  }

  const T* input(int64_t l) const { return l == 0 ? examples_.images : layers_[l - 1].outputs; }

  // Of the gradient of a layer's outputs: ReLU lets it through where the output is not <= 0.
  Operand<T> gate(int64_t l, int64_t outer_stride, int64_t depth_stride) const {
    if (x_.layers[l].activation != Activation::relu) return {nullptr, 0, 0};
    return {layers_[l].outputs, outer_stride, depth_stride};
  }

  Product<T> forward(int64_t l) const {
    const TrainedLayer<T>& layer = x_.layers[l];
    return {.rows = rows_,
            .columns = layer.out_features,
            .depth = layer.in_features,
            .a = {input(l), layer.in_features, 1},
            .gate = {nullptr, 0, 0},
            .b = {layer.weight.data, layer.in_features, 1},
            .bias = layer.bias.data,
            .relu = layer.activation == Activation::relu,
            .out = layers_[l].outputs,
            .row_sums = nullptr};
  }

  Product<T> grad_input(int64_t l) const {
    if (l <= lowest_) return {};
    const TrainedLayer<T>& layer = x_.layers[l];
    return {.rows = rows_,
            .columns = layer.in_features,
            .depth = layer.out_features,
            .a = {layers_[l].grads, layer.out_features, 1},
            .gate = gate(l, layer.out_features, 1),
            .b = {layer.weight.data, 1, layer.in_features},
            .bias = nullptr,
            .relu = false,
            .out = layers_[l - 1].grads,
            .row_sums = nullptr};
  }

  Product<T> grad_weight(int64_t l) const {
    if (l < lowest_) return {};
    const TrainedLayer<T>& layer = x_.layers[l];
    return {.rows = layer.out_features,
            .columns = layer.in_features,
            .depth = rows_,
            .a = {layers_[l].grads, 1, layer.out_features},
            .gate = gate(l, 1, layer.out_features),
            .b = {input(l), 1, layer.in_features},
            .bias = nullptr,
            .relu = false,
            .out = layers_[l].grad_weight,
            .row_sums = layers_[l].grad_bias};
  }

  void make(const Product<T>& p, cudaStream_t stream) const {
    if (p.out || p.row_sums) product(p, Precision::full, product_workspace_, stream);
  }

  void gather(const OfStep& of, cudaStream_t stream) const {
    if (rows_ == 0) return;
    gather_examples<T>({.from = of.examples,
                        .captured = of.captured,
                        .rows = rows_,
                        .features = x_.layers[0].in_features,
                        .classes = x_.layers[x_.depth - 1].out_features,
                        .ignore_index = x_.ignore_index,
                        .out = examples_},
                       stream);
  }

  void loss(const OfStep& of, cudaStream_t stream) const {
    const int64_t top = x_.depth - 1, classes = x_.layers[top].out_features;
    cross_entropy_forward<T>({.problem = {.batch = rows_,
                                          .classes = classes,
                                          .positions = 1,
                                          .logits = {layers_[top].outputs, classes, 1},
                                          .kind = TargetKind::indices,
                                          .target = {examples_.labels, ClassIndices::Type::int64},
                                          .probabilities = {},
                                          .weight = x_.class_weight,
                                          .ignore_index = x_.ignore_index,
                                          .label_smoothing = x_.label_smoothing,
                                          .reduction = x_.reduction},
                              .position_loss = nullptr,
                              .position_max = nullptr,
                              .position_log_sum = nullptr,
                              .total_weight = nullptr,
                              .grad_logits = layers_[top].grads,
                              .loss = of.loss},
                             nullptr, false, of.captured ? &of.captured->loss : nullptr, loss_workspace_, stream);
  }

  // One launch for the parameters of a group, and one for those whose momentum buffers hold nothing yet.
  void update(const OfStep& of, cudaStream_t stream) const {
    for (int group = 0; group < x_.group_count; ++group) {
      for (const bool first_step : {false, true}) {
        std::vector<SgdTensor<T>> tensors;
        for (int64_t l = lowest_; l < x_.depth; ++l) {
          const TrainedLayer<T>& layer = x_.layers[l];
          const auto add = [&](const TrainedParameter<T>& p, int64_t size, const T* gradient) {
            if (p.group != group || (p.first_step && of.first) != first_step) return;
            tensors.push_back({size, p.data, gradient, p.momentum_buffer});
          };
          add(layer.weight, layer.out_features * layer.in_features, layers_[l].grad_weight);
          add(layer.bias, layer.out_features, layers_[l].grad_bias);
        }
        if (tensors.empty()) continue;
        SgdOptions options = x_.groups[group];
        options.lr = of.lr ? of.lr[group] : 0;
        options.first_step = first_step;
        sgd_step(tensors.data(), static_cast<int64_t>(tensors.size()), options,
                 of.captured ? of.captured->lr + group : nullptr, stream);
      }
    }
  }

  const TrainSteps<T>& x_;
  int64_t images_;
  char* workspace_;
  int64_t bytes_ = 0, lowest_ = 0, rows_ = 0;  // rows_: of the step that is started
  CapturedSteps<T>* captured_;
  Examples<T> examples_{};
  std::vector<OfLayer> layers_;
  char *product_workspace_, *loss_workspace_;
};

}  // namespace

template <class T>
int64_t train_steps_sequence_workspace_bytes(const TrainSteps<T>& x) {
  return Sequence<T>(x, 0, kNowhere).bytes();
}

template <class T>
void train_steps_in_sequence(const TrainSteps<T>& x, int64_t images, void* workspace, StepGraph* graph,
                             cudaStream_t stream) {
  Sequence<T>(x, images, workspace).run(graph, stream);
}

template int64_t train_steps_sequence_workspace_bytes(const TrainSteps<float>&);
template int64_t train_steps_sequence_workspace_bytes(const TrainSteps<double>&);
template void train_steps_in_sequence(const TrainSteps<float>&, int64_t, void*, StepGraph*, cudaStream_t);
template void train_steps_in_sequence(const TrainSteps<double>&, int64_t, void*, StepGraph*, cudaStream_t);

}  // namespace mnist_ext::cuda
