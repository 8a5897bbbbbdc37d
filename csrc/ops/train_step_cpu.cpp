// train_steps on the CPU: checks, dispatch on the dtype.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../kernels/train_step.h"
#include "tensors.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kOp = "mnist_ext.train_steps";

// What lies in [begin, end) of memory.
struct Extent {
  const char *begin, *end;
  bool written;
  const char* argument;
  int64_t index;
};

Extent extent_of(const Tensor& t, bool written, const char* argument, int64_t index) {
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return {begin, begin, written, argument, index};
    last += (t.size(i) - 1) * t.stride(i);
  }
  return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size()), written, argument, index};
}

void check_apart(std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const Extent* furthest = nullptr;  // of those before, which all begin before
  const Extent* furthest_written = nullptr;
  for (const Extent& e : extents) {
    if (e.begin == e.end) continue;
    const Extent* other = e.written ? furthest : furthest_written;
    check(!other || other->end <= e.begin, kOp, ": ", e.argument, "[", e.index, "] and ", other ? other->argument : "",
          "[", other ? other->index : 0, "] share memory: an update in place needs tensors of their own");
    if (!furthest || furthest->end < e.end) furthest = &e;
    if (e.written && (!furthest_written || furthest_written->end < e.end)) furthest_written = &e;
  }
}

struct Arguments {
  const Tensor& images;
  const Tensor& labels;
  const std::optional<Tensor>& order;
  int64_t batch_size;
  const std::vector<Tensor>& params;
  const std::vector<Tensor>& momentum_buffers;
  const std::vector<int64_t>& layers;
  const std::vector<int64_t>& groups;
  const std::vector<double>& options;
  const std::vector<double>& lr;
  double scale, shift;
  const std::optional<Tensor>& class_weight;
  int64_t ignore_index;
  double label_smoothing;
  int64_t reduction;
};

enum LayerFlags : int64_t { kBias = 1, kRelu = 2 };
enum GroupFlags : int64_t { kFrozen = -1, kFirstStep = 1 };
constexpr int64_t kOptions = 5;  // of a group: momentum, dampening, weight_decay, nesterov, maximize

void check_parameter(const Arguments& a, std::size_t i, bool fitting, int64_t group_count) {
  const Tensor& p = a.params[i];
  check(p.is_cpu() && p.scalar_type() == a.params[0].scalar_type() && p.is_contiguous() && fitting, kOp, ": params[", i,
        "]: expected a contiguous CPU tensor of the dtype of params[0], weights [out, in] that follow one another, "
        "biases [out], got ",
        Shape(p), " ", DtypeName(p));
  const int64_t group = a.groups[2 * i];
  check(kFrozen <= group && group < group_count, kOp, ": groups: expected -1 to ", group_count - 1, ", got ", group);
  if (a.momentum_buffers.empty() || a.momentum_buffers[i].numel() == 0) {
    check(group == kFrozen || a.options[group * kOptions] == 0, kOp, ": momentum_buffers[", i,
          "]: expected a tensor like params[", i, "], as its group has momentum, got none");
    return;
  }
  const Tensor& buffer = a.momentum_buffers[i];
  bool same =
      buffer.is_cpu() && buffer.scalar_type() == p.scalar_type() && buffer.dim() == p.dim() && buffer.is_contiguous();
  for (int64_t d = 0; same && d < p.dim(); ++d) same = buffer.size(d) == p.size(d);
  check(same, kOp, ": momentum_buffers[", i, "]: expected a contiguous tensor like params[", i, "], ", Shape(p), " ",
        DtypeName(p), ", got ", Shape(buffer), " ", DtypeName(buffer));
}

template <class T>
TrainedParameter<T> parameter(const Arguments& a, std::size_t i) {
  const int64_t group = a.groups[2 * i];
  const bool has_buffer = group != kFrozen && a.options[group * kOptions] != 0;
  return {static_cast<T*>(a.params[i].mutable_data_ptr()),
          has_buffer ? static_cast<T*>(a.momentum_buffers[i].mutable_data_ptr()) : nullptr, static_cast<int>(group),
          (a.groups[2 * i + 1] & kFirstStep) != 0};
}

template <class T>
std::vector<TrainedLayer<T>> layers_of(const Arguments& a, int64_t group_count) {
  std::vector<TrainedLayer<T>> layers;
  std::size_t i = 0;
  for (const int64_t flags : a.layers) {
    const bool bias = flags & kBias;
    check(i + (bias ? 2 : 1) <= a.params.size(), kOp, ": params: expected one weight, and a bias where there is one, ",
          "for each of ", a.layers.size(), " layers, got ", a.params.size());
    const Tensor& weight = a.params[i];
    const int64_t features = weight.dim() == 2 ? weight.size(1) : 0, neurons = weight.dim() == 2 ? weight.size(0) : 0;
    const bool follows = layers.empty() || features == layers.back().out_features;
    check_parameter(a, i, weight.dim() == 2 && follows && features > 0 && neurons > 0, group_count);
    TrainedLayer<T> layer = {features,
                             neurons,
                             parameter<T>(a, i),
                             {nullptr, nullptr, -1, false},
                             flags & kRelu ? Activation::relu : Activation::none};
    ++i;
    if (bias) {
      check_parameter(a, i, a.params[i].dim() == 1 && a.params[i].size(0) == neurons, group_count);
      layer.bias = parameter<T>(a, i++);
    }
    layers.push_back(layer);
  }
  check(i == a.params.size(), kOp, ": params: expected ", i, " for these layers, got ", a.params.size());
  return layers;
}

ClassIndices::Type index_type(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Long: return ClassIndices::Type::int64;
    case ScalarType::Int: return ClassIndices::Type::int32;
    case ScalarType::Byte: return ClassIndices::Type::uint8;
    default:
      fail<std::runtime_error>(kOp, ": labels: expected class indices of dtype int64, int32 or uint8, got ",
                               DtypeName(labels));
  }
}

template <class T>
Tensor train_steps_of(const Arguments& a) {
  const int64_t group_count = static_cast<int64_t>(a.options.size()) / kOptions;
  const std::vector<TrainedLayer<T>> layers = layers_of<T>(a, group_count);
  const int64_t features = layers[0].in_features, classes = layers.back().out_features;

  const bool pixels = a.images.scalar_type() == ScalarType::Byte;
  check(a.images.is_cpu() && a.images.dim() >= 1 && a.images.dim() <= kMaxDims &&
            (pixels || a.images.scalar_type() == a.params[0].scalar_type()),
        kOp, ": images: expected a CPU tensor of uint8 or of the dtype of params[0], ", DtypeName(a.params[0]),
        ", got ", Shape(a.images), " ", DtypeName(a.images));
  const int64_t images = a.images.size(0);
  check(images == 0 || a.images.numel() == images * features, kOp, ": images: expected ", features,
        " numbers each, as the first layer has in_features, got ", Shape(a.images));
  // Rows of numbers that follow one another: in place where only the rows have a stride of their own.
  std::optional<int64_t> inner = merged_stride(a.images, 1, a.images.dim());
  const bool in_place = images == 0 || features == 1 || (inner && *inner == 1);
  const Tensor rows = in_place ? a.images : torch::stable::contiguous(a.images);
  const int64_t row_stride = images == 0 ? features : rows.stride(0);
  check(row_stride >= 0, kOp, ": images: expected a stride that is not negative, got ", row_stride);

  const ClassIndices::Type type = index_type(a.labels);
  check(a.labels.is_cpu() && a.labels.dim() == 1, kOp, ": labels: expected a CPU tensor of shape [", images, "], got ",
        Shape(a.labels));
  check<std::invalid_argument>(a.labels.size(0) == images, kOp, ": labels: expected shape [", images,
                               "], one for each of images ", Shape(a.images), ", got ", Shape(a.labels));
  const Tensor labels = a.labels.is_contiguous() ? a.labels : torch::stable::contiguous(a.labels);

  const int64_t* order = nullptr;
  int64_t examples = images;
  Tensor indices;
  if (a.order) {
    check(a.order->is_cpu() && a.order->dim() == 1 && a.order->scalar_type() == ScalarType::Long, kOp,
          ": order: expected a CPU tensor of int64 [examples], got ", Shape(*a.order), " ", DtypeName(*a.order));
    indices = a.order->is_contiguous() ? *a.order : torch::stable::contiguous(*a.order);
    order = static_cast<const int64_t*>(indices.const_data_ptr());
    examples = a.order->size(0);
    for (int64_t i = 0; i < examples; ++i) {
      check<std::out_of_range>(0 <= order[i] && order[i] < images, kOp, ": order: expected indices of ", images,
                               " images, got ", order[i], " at position ", i);
    }
  }
  if (a.class_weight) {
    check_like(kOp, "class_weight", *a.class_weight, "params[0]", a.params[0]);
    check(a.class_weight->dim() == 1 && a.class_weight->size(0) == classes && a.class_weight->is_contiguous(), kOp,
          ": class_weight: expected shape [", classes, "], contiguous, got ", Shape(*a.class_weight));
  }

  std::vector<Extent> extents;
  for (std::size_t i = 0; i < a.params.size(); ++i) {
    extents.push_back(extent_of(a.params[i], true, "params", static_cast<int64_t>(i)));
    if (!a.momentum_buffers.empty()) {
      extents.push_back(extent_of(a.momentum_buffers[i], true, "momentum_buffers", static_cast<int64_t>(i)));
    }
  }
  extents.push_back(extent_of(rows, false, "images", 0));
  if (a.class_weight) extents.push_back(extent_of(*a.class_weight, false, "class_weight", 0));
  check_apart(extents);

  std::vector<SgdOptions> groups;
  for (int64_t g = 0; g < group_count; ++g) {
    const double* o = a.options.data() + g * kOptions;
    groups.push_back({0, o[0], o[1], o[2], o[3] != 0, o[4] != 0, false});
  }
  TrainSteps<T> args = {
      .layers = layers.data(),
      .depth = static_cast<int64_t>(layers.size()),
      .images = {pixels ? nullptr : static_cast<const T*>(rows.const_data_ptr()),
                 pixels ? static_cast<const uint8_t*>(rows.const_data_ptr()) : nullptr, row_stride,
                 static_cast<T>(a.scale), static_cast<T>(a.shift)},
      .target = {labels.const_data_ptr(), type},
      .order = order,
      .examples = examples,
      .batch_size = a.batch_size > 0 ? a.batch_size : std::max<int64_t>(examples, 1),
      .class_weight = a.class_weight ? static_cast<const T*>(a.class_weight->const_data_ptr()) : nullptr,
      .ignore_index = a.ignore_index,
      .label_smoothing = a.label_smoothing,
      .reduction = static_cast<Reduction>(a.reduction),
      .groups = groups.data(),
      .group_count = group_count,
      .lr = a.lr.data(),
      .losses = nullptr};
  check(static_cast<int64_t>(a.lr.size()) == args.steps() * group_count, kOp, ": lr: expected ", args.steps(),
        " steps times ", group_count, " groups, got ", a.lr.size());
  const int64_t sizes[] = {args.steps()};
  const Tensor losses = empty(dtype_of(a.params[0]), sizes, a.batch_size > 0 ? 1 : 0);
  args.losses = static_cast<T*>(losses.mutable_data_ptr());
  const int64_t bad = mnist_ext::train_steps<T>(args, threads());
  if (bad >= 0) {
    const int64_t at = order ? order[bad] : bad;
    fail<std::out_of_range>(kOp, ": labels: expected class indices in [0, ", classes, ") or ignore_index ",
                            a.ignore_index, ", got ", args.target[at], " at position ", at);
  }
  return losses;
}

Tensor train_steps(const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order, int64_t batch_size,
                   const std::vector<Tensor>& params, const std::vector<Tensor>& momentum_buffers,
                   const std::vector<int64_t>& layers, const std::vector<int64_t>& groups,
                   const std::vector<double>& options, const std::vector<double>& lr, double scale, double shift,
                   const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                   int64_t reduction) {
  check(!layers.empty() && !params.empty(), kOp, ": layers: expected at least one");
  check(params[0].scalar_type() == ScalarType::Float || params[0].scalar_type() == ScalarType::Double, kOp,
        ": params: expected float32 or float64, got ", DtypeName(params[0]));
  check(groups.size() == 2 * params.size(), kOp, ": groups: expected two numbers for each of ", params.size(),
        " params, got ", groups.size());
  check(momentum_buffers.empty() || momentum_buffers.size() == params.size(), kOp,
        ": momentum_buffers: expected none or one for each of ", params.size(), " params, got ",
        momentum_buffers.size());
  check(options.size() % kOptions == 0, kOp, ": options: expected ", kOptions, " for each group, got ", options.size());
  check(batch_size >= 0, kOp, ": batch_size: expected at least 0, got ", batch_size);
  check(0 <= label_smoothing && label_smoothing <= 1, kOp, ": label_smoothing: expected a number in [0, 1], got ",
        label_smoothing);
  check<std::invalid_argument>(reduction == 1 || reduction == 2, kOp, ": reduction: expected 1 (mean) or 2 (sum), got ",
                               reduction);
  const Arguments a = {images,  labels, order, batch_size, params,       momentum_buffers, layers,          groups,
                       options, lr,     scale, shift,      class_weight, ignore_index,     label_smoothing, reduction};
  return params[0].scalar_type() == ScalarType::Float ? train_steps_of<float>(a) : train_steps_of<double>(a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) { m.impl("train_steps", TORCH_BOX(&train_steps)); }

}  // namespace mnist_ext::ops
