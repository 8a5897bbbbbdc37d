// A linear layer and the softmax cross-entropy of what it gives, with their gradients, as a program: some rows of the
// batch after the others, so that their logits and the gradient of these stay in a cache and the whole of them is never
// in memory.
//
//   logits = input * weight^T + bias;  loss = cross_entropy(logits, target)
//
// What a product computes, in which precision, is product.h's, the loss cross_entropy.h's; of a single block the
// results are the bits of the ops called one after the other. The gradients of weight and bias are accumulated over
// the blocks in T, one addition for each.
#pragma once

#include <algorithm>
#include <vector>

#include "layer.h"

namespace mnist_ext {

template <class T>
struct LinearCrossEntropy {
  Layer<T> layer;                  // of all rows; without out and grad_output
  CrossEntropyProblem<T> problem;  // of all rows; without logits
  ComputeType<T>* divisor;         // [1], of a mean
  const T* grad_output;            // as in CrossEntropyForward; null: 1
  int64_t grad_output_stride;
  T* loss;  // none: [batch, positions]. mean or sum: [blocks], to be added up. Null: not wanted

  bool has_gradient() const { return layer.grad_input || layer.grad_weight || layer.grad_bias; }
  int64_t logits_of_row() const { return problem.classes * problem.positions; }
};

// How a device wants its blocks made.
struct BlockTraits {
  int64_t cached_bytes;  // of logits, that stay in a cache from product to product
  int64_t most_bytes;    // of logits, in memory
  bool in_place;         // the gradient of logits may take their place, where class indices are not smoothed
};

template <class T>
class LinearCrossEntropyProgram {
 public:
  LinearCrossEntropyProgram(const LinearCrossEntropy<T>& args, BlockTraits traits, void* workspace)
      : args_(args),
        matrices_(is_in_place(args.problem, traits) ? 1 : 2),
        rows_(rows_of_block(traits)),
        logits_(static_cast<T*>(workspace)),
        grad_logits_(logits_ + (matrices_ - 1) * logits_size()) {}

  int64_t blocks() const { return rows_ == 0 ? 1 : (args_.problem.batch + rows_ - 1) / rows_; }

  int64_t workspace_bytes() const { return matrices_ * logits_size() * static_cast<int64_t>(sizeof(T)); }

  std::vector<Entry<T>> entries() const {
    std::vector<Entry<T>> program;
    int64_t first = 0;
    do {  // once for no rows too: the loss and the gradients of nothing
      append(first, std::min(rows_, args_.problem.batch - first), program);
      first += rows_;
    } while (first < args_.problem.batch);
    return program;
  }

 private:
  static bool is_in_place(const CrossEntropyProblem<T>& p, BlockTraits traits) {
    return traits.in_place && p.kind == TargetKind::indices && p.label_smoothing == 0;
  }

  // Of each element of the weight a block reads three copies and its gradient, and writes that; of each logit as much
  // is read and written where they stay in no cache. So few rows that they do, or as many as there is memory for.
  int64_t rows_of_block(BlockTraits traits) const {
    const int64_t batch = args_.problem.batch;
    const int64_t row_bytes = matrices_ * std::max<int64_t>(1, args_.logits_of_row()) * static_cast<int64_t>(sizeof(T));
    const int64_t cached = std::max<int64_t>(1, traits.cached_bytes / row_bytes);
    const int64_t most = std::max<int64_t>(1, traits.most_bytes / row_bytes);
    const double in_features = static_cast<double>(args_.layer.in_features);
    const double of_cached = in_features / static_cast<double>(cached);
    const double of_most = in_features / static_cast<double>(most) + 1;
    const int64_t rows = of_most < of_cached ? most : cached;
    const int64_t blocks = std::max<int64_t>(1, (batch + rows - 1) / rows);
    return (batch + blocks - 1) / blocks;  // all blocks of nearly the same size
  }

  // Of a block, in whole cache lines.
  int64_t logits_size() const { return (rows_ * args_.logits_of_row() + 63) / 64 * 64; }

  void append(int64_t first, int64_t rows, std::vector<Entry<T>>& program) const {
    const Layer<T> layer = layer_of(first, rows);
    program.push_back({forward_product(layer), first > 0});
    program.push_back({loss_of(first, rows), true});
    if (layer.grad_input) program.push_back({grad_input_product(layer), true});
    Product<T> grad_weight = grad_weight_product(layer);
    grad_weight.accumulate = first > 0;
    if (grad_weight.forms_c() || grad_weight.forms_row_sums()) program.push_back({grad_weight, !layer.grad_input});
  }

  Layer<T> layer_of(int64_t first, int64_t rows) const {
    Layer<T> layer = args_.layer;
    layer.batch = rows;
    layer.input.data += first * layer.input.row_stride;
    layer.out = logits_;
    layer.grad_output = {grad_logits_, layer.out_features, 1};
    if (layer.grad_input) layer.grad_input += first * layer.in_features;
    return layer;
  }

  CrossEntropyForward<T> loss_of(int64_t first, int64_t rows) const {
    CrossEntropyProblem<T> problem = args_.problem;
    const bool none = problem.reduction == Reduction::none;
    const int64_t position = first * problem.positions;
    problem.batch = rows;
    const int64_t batch_stride = args_.logits_of_row(), class_stride = problem.positions;
    problem.logits = {logits_, batch_stride, class_stride};
    if (problem.kind == TargetKind::indices) {
      problem.target = problem.target.from(position);
    } else {
      problem.probabilities.data += first * problem.probabilities.batch_stride;
    }
    T* loss = args_.loss ? args_.loss + (none ? position : first / std::max<int64_t>(1, rows_)) : nullptr;
    return {.problem = problem,
            .divisor = problem.reduction == Reduction::mean ? args_.divisor : nullptr,
            .loss = loss,
            .grad_logits = args_.has_gradient() ? grad_logits_ : nullptr,
            .grad_output = args_.grad_output ? args_.grad_output + position * args_.grad_output_stride : nullptr,
            .grad_output_stride = args_.grad_output_stride};
  }

  const LinearCrossEntropy<T>& args_;
  int64_t matrices_;  // in memory: of logits, and of their gradient, wanted or not: the same blocks, and loss
  int64_t rows_;      // of a block
  T* logits_;
  T* grad_logits_;
};

}  // namespace mnist_ext
