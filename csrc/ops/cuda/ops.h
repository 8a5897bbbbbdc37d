// The ops that have CUDA kernels. ../schemas.h says what they do.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"

namespace mnist_ext::ops::cuda {

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& weight, int64_t ignore_index,
                                                 double label_smoothing, int64_t reduction);

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(const Tensor& logits, const Tensor& target,
                                                       const std::optional<Tensor>& weight, int64_t ignore_index,
                                                       double label_smoothing, int64_t reduction);

void cross_entropy_gradient_(Tensor gradient, const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                             const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing,
                             int64_t reduction);

std::tuple<Tensor, Tensor> cross_entropy_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                                  const std::optional<Tensor>& weight, const Tensor& stats,
                                                  const Tensor& total_weight, int64_t ignore_index,
                                                  double label_smoothing, int64_t reduction, bool need_logits,
                                                  bool need_target);

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool relu, bool allow_tf32);

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& output, bool need_bias,
                                                   bool allow_tf32);

int64_t sgd_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                 const std::vector<Tensor>& momentum_buffers, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool first_step);

Tensor train_steps(const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order, int64_t batch_size,
                   const std::vector<Tensor>& params, const std::vector<Tensor>& momentum_buffers,
                   const std::vector<int64_t>& layers, const std::vector<int64_t>& groups,
                   const std::vector<double>& options, const std::vector<double>& lr, double scale, double shift,
                   const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                   int64_t reduction, int64_t captured);

// For tests and benchmarks, which compare the two: whether train_steps may replay a step as a CUDA graph instead of
// launching its kernels one by one.
void set_train_step_graphs(bool enabled);

int64_t new_captured_step();
void free_captured_step(int64_t number);

// Registers those that are given tensors.
template <class Library>
void implement_ops(Library& m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&cross_entropy_with_gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("sgd_step", TORCH_BOX(&sgd_step));
  m.impl("train_steps", TORCH_BOX(&train_steps));
}

// Registers the others.
template <class Library>
void implement_ops_without_tensors(Library& m) {
  m.impl("new_captured_step", TORCH_BOX(&new_captured_step));
  m.impl("free_captured_step", TORCH_BOX(&free_captured_step));
}

}  // namespace mnist_ext::ops::cuda
