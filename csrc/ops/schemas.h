// The schemas of every op, and their kernels, which are the same source for both devices. mnist_ext/_autograd.py gives
// them gradients and mnist_ext/_fake.py their shapes under torch.compile.
#pragma once

#include <torch/csrc/stable/library.h>

namespace mnist_ext::ops {

using Library = torch::stable::detail::StableLibrary;

inline void define_ops(Library& m) {
  // relu(input @ weight.T + bias), or without relu. allow_tf32: products of float32 may round their factors, as
  // api/product.h says.
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, bool relu, bool allow_tf32=False) -> Tensor");

  // (grad_input if weight is given, grad_weight if input is given, grad_bias if need_bias); the others are undefined
  // (None). output: what `linear` returned if relu was set, else None.
  m.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? output, bool need_bias, "
      "bool allow_tf32=False) -> (Tensor, Tensor, Tensor)");

  // The layers of a multilayer perceptron, one after the other, as `linear` computes each: (output, hidden: the outputs
  // of all layers but the last, in one tensor; without keep_hidden empty). weights: of each layer; biases: of each that
  // has one; layers: 1 (has a bias) + 2 (ReLU). Both are undefined (None) where the tensors are none that the kernels
  // take: of float32 or float64, dense, on the CPU or on one CUDA device, of sizes that fit together.
  m.def(
      "mlp(Tensor input, Tensor[] weights, Tensor[] biases, int[] layers, bool keep_hidden, bool allow_tf32=False) -> "
      "(Tensor, Tensor)");

  // The gradients of input, if need_input, of each of weights and of each of biases. hidden, output: what `mlp`
  // returned; output only where the last layer has a ReLU.
  m.def(
      "mlp_backward(Tensor grad_output, Tensor input, Tensor hidden, Tensor? output, Tensor[] weights, "
      "Tensor[] biases, int[] layers, bool need_input, bool allow_tf32=False) -> Tensor[]");

  // (loss, stats: each position's maximum and log-sum-exp above it, total_weight: what the mean divides by).
  // logits [C], [N, C] or [N, C, d1, ...]; target: class indices (int64, int32, uint8) of that shape without C, or
  // probabilities of that shape. reduction: 0 none, 1 mean, 2 sum. stats and total_weight are float32 for logits of
  // bfloat16 and float16.
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
      "int reduction) -> (Tensor, Tensor, Tensor)");

  // (loss, its gradient with respect to logits), for reductions mean and sum: one pass over the logits for both.
  m.def(
      "cross_entropy_with_gradient(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
      "float label_smoothing, int reduction) -> (Tensor, Tensor)");

  // Makes the gradient that `cross_entropy_with_gradient` returned that of grad_output, unless that is 1, for which it
  // is already. The device decides, so that the host does not wait.
  m.def(
      "cross_entropy_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, "
      "int ignore_index, float label_smoothing, int reduction) -> ()");

  // (grad_logits if need_logits, grad_target if need_target), from what `cross_entropy` returned; the others are
  // undefined (None). need_target: with probabilities only.
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor stats, "
      "Tensor total_weight, int ignore_index, float label_smoothing, int reduction, bool need_logits, "
      "bool need_target) -> (Tensor, Tensor)");

  // (loss, grad_input if need_input, grad_weight if need_weight, grad_bias if need_bias) of the cross-entropy of
  // linear(input, linear_weight, linear_bias), whose logits are never in memory as a whole; the others are undefined
  // (None). input [N, in] or [in], linear_weight [C, in] or [C, d1, ..., in], linear_bias [C, d1, ...], of float32 or
  // float64; target, weight and options as in `cross_entropy` of logits [N, C, d1, ...]. The gradients are those of
  // grad_output, as the loss, without which the loss is formed and they are those of 1. At the end lse, [N] or [], if
  // need_lse: the log-sum-exps of the logits. softcap (0: none), z_loss, need_lse and grad_lse as api/cross_entropy.h
  // has them: on the CPU, of class indices, without d1 and label smoothing, and z_loss without weight.
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
      "int ignore_index, float label_smoothing, int reduction, Tensor? grad_output, bool need_input, "
      "bool need_weight, bool need_bias, bool allow_tf32=False, float softcap=0, float z_loss=0, "
      "bool need_lse=False, Tensor? grad_lse=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // One step of torch.optim.SGD over all params, whose momentum buffers (one each, or none at all) hold nothing yet if
  // first_step. Returns -1, or, having changed nothing, an index at which the tensors are none that the kernels take:
  // of a dtype of theirs, dense, all of the same shape, strides and dtype, and what is written shares no memory.
  m.def(
      "sgd_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, float momentum, "
      "float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step) -> int");

  // Steps of SGD on a multilayer perceptron, which new_train_step has described; returns their losses [steps]. The
  // examples are those that `order` names, or all, batch_size to a step; batch_size 0: one step of all, and its loss
  // []. lr: of each step, of each group. params: the weight of each layer, then the bias of each that has one.
  // momentum_buffers: of each parameter whose group has momentum; first_step: of each of those, whether it holds
  // nothing yet. A wrong call changes nothing.
  m.def(
      "train_steps(int step, Tensor images, Tensor labels, Tensor? order, int batch_size, float[] lr, "
      "Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, bool[] first_step) -> Tensor");

  // What stays the same between those calls, for tensors on like's device: a handle, valid until it is freed. relu,
  // bias: of each layer, whether it has one. groups: of each of params its group, -1 if it is frozen. momentum to
  // maximize: of each group. A number of uint8 images counts as number * scale + shift. reduction: 1 mean, 2 sum.
  // graph: on CUDA, whether steps that repeat are replayed as a CUDA graph, which stays with the handle.
  m.def(
      "new_train_step(Tensor like, bool[] relu, bool[] bias, int[] groups, float[] momentum, float[] dampening, "
      "float[] weight_decay, bool[] nesterov, bool[] maximize, float scale, float shift, Tensor? class_weight, "
      "int ignore_index, float label_smoothing, int reduction, bool graph=True) -> int");
  m.def("free_train_step(Tensor like, int step) -> ()");
}

// Registers the kernels of one of the libraries, for the device that is its own.
void implement_layers(Library& m);
void implement_cross_entropy(Library& m);
void implement_linear_cross_entropy(Library& m);
void implement_sgd_step(Library& m);
void implement_train_steps(Library& m);

inline void implement_ops(Library& m) {
  implement_layers(m);
  implement_cross_entropy(m);
  implement_linear_cross_entropy(m);
  implement_sgd_step(m);
  implement_train_steps(m);
}

// For tensors that neither library takes.
void implement_mlp_of_other_tensors(Library& m);

}  // namespace mnist_ext::ops
