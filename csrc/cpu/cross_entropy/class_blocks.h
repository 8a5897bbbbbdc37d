// Softmax cross-entropy of rows whose classes come block by block, none of which has a whole row.
#pragma once

#include "../simd/tanh.h"
#include "rows.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Room for a block of a row.
template <class T>
T* logits_scratch(const ClassBlock<T>& block) {
  return static_cast<T*>(scratch(Scratch::exponentials, block.size * sizeof(T)));
}

// With tanhs = tanh(logits / softcap) in place of the logits: softcap * tanhs. The derivative is of the tanhs, which
// the product rounds.
template <class T>
const T* capped_logits(const ClassBlock<T>& block, const T* tanhs) {
  T* logits = logits_scratch(block);
  const Vec<T> cap = Vec<T>::broadcast(block.softcap);
  for_each_vector<T>(block.size, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    store(logits + c, cap * load(tanhs + c, lanes), lanes);
  });
  return logits;
}

template <class T>
void replace_by_tanhs(const ClassBlock<T>& block, T* logits) {
  const Vec<T> cap = Vec<T>::broadcast(block.softcap);
  for_each_vector<T>(block.size, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    store(logits + c, tanh(load(logits + c, lanes) / cap), lanes);
  });
}

// Adds the block to the sums of a row; the last one finishes the loss.
template <class T>
void sum_block_of_row(const CrossEntropyWork<T>& work, const ClassBlock<T>& block, const T* logits, int64_t i) {
  const CrossEntropyProblem<T>& p = work.problem;
  const PositionResults<T>& results = *work.forward;
  const int64_t t = p.target[i], end = block.first + block.size;
  RunningSum<T> sum;
  if (block.first > 0) sum = {results.max[i], block.sums[i]};
  sum = add_to_sum(sum, logits, block.size);
  results.max[i] = sum.max;
  block.sums[i] = sum.sum;
  if (block.first <= t && t < end) block.target_logits[i] = logits[t - block.first];
  if (end < p.classes) return;
  const T log_sum = sum.result().log_sum, lse = sum.max + log_sum;
  results.log_sum[i] = log_sum;
  if (block.lse) block.lse[i] = lse;
  results.loss[i] = 0;
  if (t == p.ignore_index) return;
  results.loss[i] = -((block.target_logits[i] - sum.max) - log_sum) * work.q.weight_of(t);
  if (block.z_loss != 0) results.loss[i] += block.z_loss * lse * lse;
}

// of_loss * (softmax - [c == t]) + of_lse * softmax, times the derivative of the cap; in place of the logits or tanhs,
// or elsewhere. tanhs: null without a cap.
template <class T>
void gradient_of_block_of_row(const CrossEntropyWork<T>& work, const ClassBlock<T>& block, const T* logits,
                              const T* tanhs, int64_t i) {
  using V = Vec<T>;
  const CrossEntropyProblem<T>& p = work.problem;
  const CrossEntropyBackward<T>& args = *work.backward;
  T* grad = args.grad_logits + i * block.size;
  const int64_t t = p.target[i];
  const bool ignored = t == p.ignore_index;
  if (ignored && !block.grad_lse) {
    std::memset(grad, 0, block.size * sizeof(T));
    return;
  }
  const T of_loss = ignored ? T(0) : work.scales[i] * work.q.weight_of(t);
  T of_lse = block.grad_lse ? block.grad_lse[i * block.grad_lse_stride] : T(0);
  if (!ignored && block.z_loss != 0) {
    of_lse += work.scales[i] * 2 * block.z_loss * (args.position_max[i] + args.position_log_sum[i]);
  }
  const RecomputedSoftmax<T, T, Row<T>> softmax(args, {logits, 1}, Row<T>{block.size}, i);
  const auto scaled_softmax = softmax.times(V::broadcast(of_loss + of_lse));
  const V one = V::broadcast(T(1));
  const auto of_uncapped = [&](V g, V tanh)
                               __attribute__((always_inline)) { return g * ((one - tanh) * (one + tanh)); };
  const int64_t of_target = t - block.first;
  const bool has_target = !ignored && 0 <= of_target && of_target < block.size;
  T g = 0;
  if (has_target) {  // from p - 1, so that it is not lost to rounding as p approaches 1
    const T p_target = softmax.of_class(of_target);
    g = of_loss * (p_target - T(1)) + of_lse * p_target;
    if (tanhs) g = of_uncapped(V::broadcast(g), V::broadcast(tanhs[of_target])).raw[0];
  }
  for_each_vector<T>(block.size, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    V gradient = scaled_softmax(c, lanes);
    if (tanhs) gradient = of_uncapped(gradient, load(tanhs + c, lanes));
    store(grad + c, gradient, lanes);
  });
  if (has_target) grad[of_target] = g;
}

template <class T>
void do_block_of_row(const CrossEntropyWork<T>& work, const ClassBlock<T>& block, int64_t i) {
  const T* logits = work.problem.logits.data + i * block.size;
  const T* tanhs = nullptr;
  if (block.softcap != 0) {
    if (block.uncapped) replace_by_tanhs(block, block.uncapped + i * block.size);
    tanhs = logits;
    logits = capped_logits(block, tanhs);
  }
  if (block.is_gradient) return gradient_of_block_of_row(work, block, logits, tanhs, i);
  sum_block_of_row(work, block, logits, i);
}

}  // namespace mnist_ext::MNIST_EXT_ISA
