// A linear layer and the softmax cross-entropy of what it gives, with their gradients, as a program: some rows of the
// batch after the others, or some classes after the others, so that the whole of the logits and of their gradient is
// never in memory beyond that of the results.
//
//   logits = input * weight^T + bias;  loss = cross_entropy(logits, target)
//
// Rows: the three products of a layer for each block. All of the weight is read, and its gradient added to, once more
// for each of them, which counts where a row of logits is so long that few fit into a block.
// Classes: a softmax needs all of them, so that they are passed twice, for the sums and for the gradient. The logits
// are kept in between where the gradient of the weight will lie, which has room for as many rows as there are features;
// of the rows beyond they are formed again, part of a fourth product. Each element of the weight is read twice, three
// times then, and its gradient is written once.
//
// What a product computes, in which precision, is product.h's, the loss cross_entropy.h's; of a single block the
// results are the bits of the ops called one after the other. Gradients are accumulated over the blocks in T, one
// addition for each.
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
  T* loss;  // none: [batch, positions]. mean or sum: [losses()], to be added up. Null: not wanted
  // As in ClassBlock, of class indices at a single position, of one class at least, without label smoothing.
  T softcap = 0, z_loss = 0;
  T* lse = nullptr;
  const T* grad_lse = nullptr;
  int64_t grad_lse_stride = 0;

  bool needs_class_blocks() const { return softcap != 0 || z_loss != 0 || lse || grad_lse; }
  bool has_gradient() const { return layer.grad_input || layer.grad_weight || layer.grad_bias; }
  int64_t logits_of_row() const { return problem.classes * problem.positions; }
};

// How a device wants its blocks made.
struct BlockTraits {
  int64_t cached_bytes;   // of logits, that stay in a cache from product to product
  int64_t most_bytes;     // of logits, in memory
  bool in_place;          // the gradient of logits may take their place, where class indices are not smoothed
  double flops_per_byte;  // that a product of cached operands makes while a byte comes from memory; 0: no ClassBlocks
};

template <class T>
class LinearCrossEntropyProgram {
 public:
  LinearCrossEntropyProgram(const LinearCrossEntropy<T>& args, BlockTraits traits, void* workspace)
      : args_(args),
        matrices_(is_in_place(args.problem, traits) ? 1 : 2),
        rows_(rows_of_block(traits)),
        classes_(is_by_classes(traits) ? classes_of_block(traits) : 0),
        logits_(static_cast<T*>(workspace)),
        grad_logits_(logits_ + (matrices_ - 1) * logits_size()),
        sums_(reinterpret_cast<double*>(logits_ + matrices_ * logits_size())),
        position_max_(reinterpret_cast<ComputeType<T>*>(sums_ + args.problem.batch)),
        position_log_sum_(position_max_ + args.problem.batch),
        target_logits_(position_log_sum_ + args.problem.batch) {}

  // So many losses a mean or a sum has.
  int64_t losses() const { return classes_ ? std::ssize(row_groups()) : blocks_of_rows(); }

  int64_t workspace_bytes() const {
    constexpr int64_t of_row = sizeof(double) + 3 * sizeof(ComputeType<T>);
    const int64_t of_rows = classes_ ? ceil_div(args_.problem.batch * of_row, 64) * 64 : 0;
    return matrices_ * logits_size() * static_cast<int64_t>(sizeof(T)) + of_rows;
  }

  std::vector<Entry<T>> entries() const {
    std::vector<Entry<T>> program;
    if (classes_) {
      append_classes(program);
      return program;
    }
    int64_t first = 0;
    do {  // once for no rows too: the loss and the gradients of nothing
      append_rows({first, std::min(rows_, args_.problem.batch - first)}, program);
      first += rows_;
    } while (first < args_.problem.batch);
    return program;
  }

 private:
  // Of the batch, or of the classes.
  struct Slice {
    int64_t first, size;
  };

  static int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

  static bool is_in_place(const CrossEntropyProblem<T>& p, BlockTraits traits) {
    return traits.in_place && p.kind == TargetKind::indices && p.label_smoothing == 0;
  }

  int64_t blocks_of_rows() const { return rows_ == 0 ? 1 : ceil_div(args_.problem.batch, rows_); }

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
    const int64_t blocks = std::max<int64_t>(1, ceil_div(batch, rows));
    return ceil_div(batch, blocks);  // all blocks of nearly the same size
  }

  // Whose logits stay in a cache; but the gradient of the input is read and written once for each block.
  int64_t classes_of_block(BlockTraits traits) const {
    constexpr int64_t fewest = 2048;
    const int64_t class_bytes = std::max<int64_t>(1, args_.problem.batch) * static_cast<int64_t>(sizeof(T));
    const int64_t classes = std::max(fewest, traits.cached_bytes / class_bytes);
    return std::max<int64_t>(1, std::min({classes, traits.most_bytes / class_bytes, args_.problem.classes}));
  }

  // So many rows of logits fit where the gradient of the weight will lie.
  int64_t fitting_rows() const { return std::min(args_.problem.batch, args_.layer.in_features); }

  // Those rows and the ones beyond, whether or not that gradient is wanted: the same loss. One group of no rows, too.
  std::vector<Slice> row_groups() const {
    const int64_t fitting = fitting_rows(), others = args_.problem.batch - fitting;
    if (fitting == 0 || others == 0) return {{0, args_.problem.batch}};
    return {{0, fitting}, {fitting, others}};
  }

  bool are_kept(Slice rows) const { return args_.layer.grad_weight && rows.first < fitting_rows(); }
  bool are_formed_again(Slice rows) const { return !are_kept(rows) && classes_ < args_.problem.classes; }

  // Which of both ways moves less, a product that is made again counted as what memory would move meanwhile. Of all
  // gradients, wanted or not, so that the loss is the same with and without.
  bool is_by_classes(BlockTraits traits) const {
    const CrossEntropyProblem<T>& p = args_.problem;
    if (args_.needs_class_blocks()) return true;
    const bool has_class_blocks = traits.flops_per_byte > 0 && is_in_place(p, traits) && p.positions == 1;
    if (!has_class_blocks || blocks_of_rows() == 1) return false;
    const double rows = static_cast<double>(p.batch), classes = static_cast<double>(p.classes);
    const double features = static_cast<double>(args_.layer.in_features), bytes = sizeof(T);
    const double weight = classes * features * bytes, logits = rows * classes * bytes, input = rows * features * bytes;
    const double kept = std::min(rows, features) / rows;
    const double again = kept * 2 * logits + (1 - kept) * 2 * rows * classes * features / traits.flops_per_byte;
    // Weight and its gradient; input and its gradient.
    const double by_rows = 4 * weight * static_cast<double>(blocks_of_rows());
    const double by_classes =
        3 * weight + 4 * input * static_cast<double>(ceil_div(p.classes, classes_of_block(traits))) + again;
    return by_classes < by_rows;
  }

  // Of a block, in whole cache lines.
  int64_t logits_size() const {
    const int64_t size = classes_ ? args_.problem.batch * classes_ : rows_ * args_.logits_of_row();
    return ceil_div(size, 64) * 64;
  }

  void append_rows(Slice rows, std::vector<Entry<T>>& program) const {
    const Layer<T> layer = layer_of_rows(rows);
    program.push_back({forward_product(layer), rows.first > 0});
    program.push_back({loss_of_rows(rows), true});
    append_gradients(layer, rows.first > 0, false, program);
  }

  void append_classes(std::vector<Entry<T>>& program) const {
    const std::vector<Slice> blocks = class_blocks(), groups = row_groups();
    for (const Slice classes : blocks) {
      for (const Slice rows : groups) {
        // Waits for those who read what it overwrites, and lets the loss of the group before be summed up.
        const bool waits = (!are_kept(rows) && classes.first > 0) || rows.first > 0;
        program.push_back({forward_product(layer_of_classes(classes, rows)), waits});
        program.push_back({loss_of_classes(classes, rows, false), true});
      }
    }
    if (!args_.has_gradient()) return;
    for (const Slice classes : blocks) {
      for (const Slice rows : groups) {
        if (are_formed_again(rows)) program.push_back({forward_product(layer_of_classes(classes, rows)), true});
        program.push_back({loss_of_classes(classes, rows, true), true});
      }
      append_gradients(layer_of_classes(classes, {0, args_.problem.batch}), false, classes.first > 0, program);
    }
  }

  std::vector<Slice> class_blocks() const {
    std::vector<Slice> blocks;
    for (int64_t first = 0; first < args_.problem.classes; first += classes_) {
      blocks.push_back({first, std::min(classes_, args_.problem.classes - first)});
    }
    return blocks;
  }

  // accumulate: to what the blocks before have left there.
  void append_gradients(const Layer<T>& layer, bool accumulate_weight, bool accumulate_input,
                        std::vector<Entry<T>>& program) const {
    Product<T> grad_input = grad_input_product(layer), grad_weight = grad_weight_product(layer);
    grad_input.accumulate = accumulate_input;
    grad_weight.accumulate = accumulate_weight;
    if (layer.grad_input) program.push_back({grad_input, true});
    if (grad_weight.forms_c() || grad_weight.forms_row_sums()) program.push_back({grad_weight, !layer.grad_input});
  }

  Layer<T> layer_of_rows(Slice rows) const {
    Layer<T> layer = args_.layer;
    layer.batch = rows.size;
    layer.input.data += rows.first * layer.input.row_stride;
    layer.out = logits_;
    layer.grad_output = {grad_logits_, layer.out_features, 1};
    if (layer.grad_input) layer.grad_input += rows.first * layer.in_features;
    return layer;
  }

  Layer<T> layer_of_classes(Slice classes, Slice rows) const {
    Layer<T> layer = layer_of_rows(rows);
    layer.out_features = classes.size;
    layer.weight.data += classes.first * layer.weight.row_stride;
    if (layer.bias) layer.bias += classes.first;
    if (layer.grad_weight) layer.grad_weight += classes.first * layer.in_features;
    if (layer.grad_bias) layer.grad_bias += classes.first;
    T* gradient = logits_ + rows.first * classes.size;
    layer.out = are_kept(rows) ? layer.grad_weight : gradient;
    layer.grad_output = {gradient, classes.size, 1};
    return layer;
  }

  CrossEntropyForward<T> loss_of_rows(Slice rows) const {
    CrossEntropyProblem<T> problem = args_.problem;
    const int64_t position = rows.first * problem.positions;
    problem.batch = rows.size;
    const int64_t batch_stride = args_.logits_of_row(), class_stride = problem.positions;
    problem.logits = {logits_, batch_stride, class_stride};
    if (problem.kind == TargetKind::indices) {
      problem.target = problem.target.from(position);
    } else {
      problem.probabilities.data += rows.first * problem.probabilities.batch_stride;
    }
    return {.problem = problem,
            .divisor = divisor(),
            .loss = loss_from(position, rows.first / std::max<int64_t>(1, rows_)),
            .grad_logits = args_.has_gradient() ? grad_logits_ : nullptr,
            .grad_output = args_.grad_output ? args_.grad_output + position * args_.grad_output_stride : nullptr,
            .grad_output_stride = args_.grad_output_stride};
  }

  CrossEntropyForward<T> loss_of_classes(Slice classes, Slice rows, bool is_gradient) const {
    const Layer<T> layer = layer_of_classes(classes, rows);
    const bool last = classes.first + classes.size == args_.problem.classes;
    CrossEntropyForward<T> loss = loss_of_rows(rows);
    loss.problem.logits = {layer.out, classes.size, 1};
    loss.position_max = position_max_ + rows.first;
    loss.position_log_sum = position_log_sum_ + rows.first;
    loss.loss = last && !is_gradient ? loss_from(rows.first, rows.first > 0 ? 1 : 0) : nullptr;
    loss.grad_logits = is_gradient ? logits_ + rows.first * classes.size : nullptr;
    loss.block = {.first = classes.first,
                  .size = classes.size,
                  .is_gradient = is_gradient,
                  .sums = sums_ + rows.first,
                  .target_logits = target_logits_ + rows.first,
                  .uncapped = args_.softcap != 0 && (!is_gradient || are_formed_again(rows)) ? layer.out : nullptr,
                  .softcap = args_.softcap,
                  .z_loss = args_.z_loss,
                  .lse = args_.lse ? args_.lse + rows.first : nullptr,
                  .grad_lse = args_.grad_lse ? args_.grad_lse + rows.first * args_.grad_lse_stride : nullptr,
                  .grad_lse_stride = args_.grad_lse_stride};
    return loss;
  }

  // Of the position where there is no reduction, else that of all of a block's, by the block's number.
  T* loss_from(int64_t position, int64_t block) const {
    if (!args_.loss) return nullptr;
    return args_.loss + (args_.problem.reduction == Reduction::none ? position : block);
  }

  const ComputeType<T>* divisor() const { return args_.problem.reduction == Reduction::mean ? args_.divisor : nullptr; }

  const LinearCrossEntropy<T>& args_;
  int64_t matrices_;  // in memory: of logits, and of their gradient, wanted or not: the same blocks, and loss
  int64_t rows_;      // of a block
  int64_t classes_;   // of a block; 0: blocks of rows
  T* logits_;
  T* grad_logits_;
  // Of all rows, for blocks of classes.
  double* sums_;
  ComputeType<T>*position_max_, *position_log_sum_, *target_logits_;
};

}  // namespace mnist_ext
