// The schemas of every op. torch.ops.mnist_ext.* calls them; mnist_ext/_autograd.py gives them gradients and
// mnist_ext/_fake.py their shapes under torch.compile.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mnist_ext, m) {
  // relu(input @ weight.T + bias), or without relu.
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor");

  // (grad_input if weight is given, grad_weight if input is given, grad_bias if need_bias); the others are undefined
  // (None). output: what `linear` returned if relu was set, else None.
  m.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? output, bool need_bias) "
      "-> (Tensor, Tensor, Tensor)");

  // (loss, stats [2, N]: each row's maximum and log-sum-exp above it, total_weight []). reduction: 0 none, 1 mean, 2
  // sum.
  m.def("cross_entropy(Tensor logits, Tensor target, int ignore_index, int reduction) -> (Tensor, Tensor, Tensor)");

  // grad_logits, from what `cross_entropy` returned.
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor stats, Tensor total_weight, "
      "int ignore_index, int reduction) -> Tensor");
}
