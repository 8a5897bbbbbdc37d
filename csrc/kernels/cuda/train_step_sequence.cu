// Training steps by the kernels of each op: what they are given, in which order.
#include <algorithm>
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
  Sequence(const TrainSteps<T>& steps, void* workspace) : x_(steps), workspace_(static_cast<char*>(workspace)) {
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
    // Of a whole step or of the last, smaller one.
    for (const int64_t of_step : {rows, x_.examples - (x_.steps() - 1) * x_.batch_size}) {
      rows_ = of_step;
      loss_bytes_ = std::max(loss_bytes_, cross_entropy_workspace_bytes(rows_, classes, 1));
      for (int64_t l = 0; l < x_.depth; ++l) {
        for (const Product<T>& p : {forward(l), grad_input(l), grad_weight(l)}) {
          if (p.rows > 0) product_bytes_ = std::max(product_bytes_, product_workspace_bytes(p, Precision::full));
        }
      }
    }
    product_workspace_ = take<char>(product_bytes_);
    loss_workspace_ = take<char>(loss_bytes_);
  }

  int64_t bytes() const { return bytes_; }

  void run(int64_t images, cudaStream_t stream) {
    for (int64_t step = 0; step < x_.steps(); ++step) {
      const int64_t first = step * x_.batch_size;
      rows_ = std::min(x_.batch_size, x_.examples - first);
      gather_examples(x_, images, first, rows_, examples_, stream);
      for (int64_t l = 0; l < x_.depth; ++l) make(forward(l), stream);
      loss(step, stream);
      for (int64_t l = x_.depth - 1; l >= lowest_; --l) {
        make(grad_weight(l), stream);
        if (l > lowest_) make(grad_input(l), stream);
      }
      update(step, stream);
    }
  }

 private:
  struct OfLayer {
    T *outputs, *grads;          // [rows, out_features]; grads before the gate of ReLU
    T *grad_weight, *grad_bias;  // null: frozen
  };

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

  void loss(int64_t step, cudaStream_t stream) const {
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
                              .loss = x_.losses + step},
                             nullptr, false, loss_workspace_, stream);
  }

  // One launch for the parameters of a group, and one for those whose momentum buffers hold nothing yet.
  void update(int64_t step, cudaStream_t stream) const {
    for (int group = 0; group < x_.group_count; ++group) {
      for (const bool first_step : {false, true}) {
        std::vector<SgdTensor<T>> tensors;
        for (int64_t l = lowest_; l < x_.depth; ++l) {
          const TrainedLayer<T>& layer = x_.layers[l];
          const auto add = [&](const TrainedParameter<T>& p, int64_t size, const T* gradient) {
            if (p.group != group || (p.first_step && step == 0) != first_step) return;
            tensors.push_back({size, p.data, gradient, p.momentum_buffer});
          };
          add(layer.weight, layer.out_features * layer.in_features, layers_[l].grad_weight);
          add(layer.bias, layer.out_features, layers_[l].grad_bias);
        }
        if (tensors.empty()) continue;
        SgdOptions options = x_.groups[group];
        options.lr = x_.lr[step * x_.group_count + group];
        options.first_step = first_step;
        sgd_step(tensors.data(), static_cast<int64_t>(tensors.size()), options, stream);
      }
    }
  }

  const TrainSteps<T>& x_;
  char* workspace_;
  int64_t bytes_ = 0, lowest_ = 0, rows_ = 0, product_bytes_ = 0, loss_bytes_ = 0;
  Examples<T> examples_{};
  std::vector<OfLayer> layers_;
  char *product_workspace_, *loss_workspace_;
};

}  // namespace

template <class T>
int64_t train_steps_sequence_workspace_bytes(const TrainSteps<T>& x) {
  return Sequence<T>(x, kNowhere).bytes();
}

template <class T>
void train_steps_in_sequence(const TrainSteps<T>& x, int64_t images, void* workspace, cudaStream_t stream) {
  Sequence<T>(x, workspace).run(images, stream);
}

template int64_t train_steps_sequence_workspace_bytes(const TrainSteps<float>&);
template int64_t train_steps_sequence_workspace_bytes(const TrainSteps<double>&);
template void train_steps_in_sequence(const TrainSteps<float>&, int64_t, void*, cudaStream_t);
template void train_steps_in_sequence(const TrainSteps<double>&, int64_t, void*, cudaStream_t);

}  // namespace mnist_ext::cuda
