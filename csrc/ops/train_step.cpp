// The arguments of train_steps, whatever the device: checked, and in the kernels' terms.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels/train_step.h"
#include "extents.h"
#include "layers.h"
#include "tensors.h"

namespace mnist_ext::ops {

inline constexpr const char* kTrainSteps = "mnist_ext.train_steps";
using Refused = std::invalid_argument;  // ValueError in Python, as TrainStep promises

// What the op is given; schemas.h says what each is.
struct TrainStepsArguments {
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

enum GroupFlags : int64_t { kFrozen = -1, kFirstStep = 1 };
constexpr int64_t kOptions = 5;  // of a group: momentum, dampening, weight_decay, nesterov, maximize

// "[20, 784]", with a name where any number would do.
struct ExpectedShape {
  bool weight;
  int64_t out_features, in_features;  // 0: any
  friend std::ostream& operator<<(std::ostream& out, const ExpectedShape& s) {
    out << '[';
    s.out_features ? out << s.out_features : out << "out_features";
    if (s.weight) s.in_features ? out << ", " << s.in_features : out << ", in_features";
    return out << ']';
  }
  bool fits(const Tensor& t) const {
    return t.dim() == (weight ? 2 : 1) && t.numel() > 0 && (out_features == 0 || t.size(0) == out_features) &&
           (in_features == 0 || t.size(1) == in_features);
  }
};

inline void check_parameter(const TrainStepsArguments& a, std::size_t i, ExpectedShape shape, int64_t group_count) {
  const Tensor& p = a.params[i];
  check<Refused>(
      on_same_device(p, a.params[0]) && dtype_of(p) == dtype_of(a.params[0]) && p.is_contiguous() && shape.fits(p),
      kTrainSteps, ": params[", i, "]: expected ", shape, " ", DtypeName(a.params[0]), " on ", DeviceName(a.params[0]),
      ", contiguous, got ", Shape(p), " ", DtypeName(p), " on ", DeviceName(p),
      p.is_contiguous() ? "" : ", not contiguous");
  const int64_t group = a.groups[2 * i];
  check<Refused>(kFrozen <= group && group < group_count, kTrainSteps, ": groups: expected -1 to ", group_count - 1,
                 ", got ", group);
  if (a.momentum_buffers.empty() || a.momentum_buffers[i].numel() == 0) {
    check<Refused>(group == kFrozen || a.options[group * kOptions] == 0, kTrainSteps, ": momentum_buffers[", i,
                   "]: expected a tensor like params[", i, "], as its group has momentum, got none");
    return;
  }
  const Tensor& buffer = a.momentum_buffers[i];
  bool same = on_same_device(buffer, p) && buffer.scalar_type() == p.scalar_type() && buffer.dim() == p.dim() &&
              buffer.is_contiguous();
  for (int64_t d = 0; same && d < p.dim(); ++d) same = buffer.size(d) == p.size(d);
  check<Refused>(same, kTrainSteps, ": momentum_buffers[", i, "]: expected a contiguous tensor like params[", i, "], ",
                 Shape(p), " ", DtypeName(p), " on ", DeviceName(p), ", got ", Shape(buffer), " ", DtypeName(buffer),
                 " on ", DeviceName(buffer));
}

template <class T>
TrainedParameter<T> parameter(const TrainStepsArguments& a, std::size_t i) {
  const int64_t group = a.groups[2 * i];
  const bool has_buffer = group != kFrozen && a.options[group * kOptions] != 0;
  return {static_cast<T*>(a.params[i].mutable_data_ptr()),
          has_buffer ? static_cast<T*>(a.momentum_buffers[i].mutable_data_ptr()) : nullptr, static_cast<int>(group),
          (a.groups[2 * i + 1] & kFirstStep) != 0};
}

template <class T>
std::vector<TrainedLayer<T>> layers_of(const TrainStepsArguments& a, int64_t group_count) {
  std::vector<TrainedLayer<T>> layers;
  std::size_t i = 0;
  for (const int64_t flags : a.layers) {
    const bool bias = flags & kBias;
    check<Refused>(i + (bias ? 2 : 1) <= a.params.size(), kTrainSteps,
                   ": params: expected one weight, and a bias where there is one, ", "for each of ", a.layers.size(),
                   " layers, got ", a.params.size());
    const Tensor& weight = a.params[i];
    check_parameter(a, i, {true, 0, layers.empty() ? 0 : layers.back().out_features}, group_count);
    const int64_t features = weight.size(1), neurons = weight.size(0);
    TrainedLayer<T> layer = {features,
                             neurons,
                             parameter<T>(a, i),
                             {nullptr, nullptr, -1, false},
                             flags & kRelu ? Activation::relu : Activation::none};
    ++i;
    if (bias) {
      check_parameter(a, i, {false, neurons, 0}, group_count);
      layer.bias = parameter<T>(a, i++);
    }
    layers.push_back(layer);
  }
  check<Refused>(i == a.params.size(), kTrainSteps, ": params: expected ", i, " for these layers, got ",
                 a.params.size());
  return layers;
}

inline ClassIndices::Type label_type(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Long: return ClassIndices::Type::int64;
    case ScalarType::Int: return ClassIndices::Type::int32;
    case ScalarType::Byte: return ClassIndices::Type::uint8;
    default:
      fail<Refused>(kTrainSteps, ": labels: expected class indices of dtype int64, int32 or uint8, got ",
                    DtypeName(labels));
  }
}

// images are a copy where they are not read in place.
inline void check_apart(const TrainStepsArguments& a, const Tensor& images) {
  const auto count = static_cast<int32_t>(a.params.size());
  std::vector<Extent> extents;
  for (int32_t i = 0; i < count; ++i) {
    extents.push_back(extent_of(a.params[i], i, true));
    if (!a.momentum_buffers.empty()) extents.push_back(extent_of(a.momentum_buffers[i], count + i, true));
  }
  extents.push_back(extent_of(images, 2 * count, false));
  if (a.class_weight) extents.push_back(extent_of(*a.class_weight, 2 * count + 1, false));
  const auto found = overlapping(extents);
  if (!found) return;
  const auto name = [count](const Extent& e) {
    if (e.number == 2 * count) return std::string("images");
    if (e.number > 2 * count) return std::string("class_weight");
    const bool is_buffer = e.number >= count;
    return (is_buffer ? "momentum_buffers[" : "params[") + std::to_string(e.number % count) + "]";
  };
  fail<Refused>(kTrainSteps, ": ", name(found->second), " and ", name(found->first),
                " share memory: an update in place needs tensors of their own");
}

// The arguments, checked, in the kernels' terms; holds what these point to. What needs the values of labels and order
// is left to the kernels.
template <class T>
class TrainStepsOperands {
 public:
  explicit TrainStepsOperands(const TrainStepsArguments& a)
      : group_count_(static_cast<int64_t>(a.options.size()) / kOptions),
        layers_(layers_of<T>(a, group_count_)) {
    const int64_t features = layers_[0].in_features, classes = layers_.back().out_features;
    const bool pixels = a.images.scalar_type() == ScalarType::Byte;
    check_device<Refused>(kTrainSteps, "images", a.images, "params[0]", a.params[0]);
    check<Refused>(a.images.dim() >= 1 && a.images.dim() <= kMaxDims &&
                       (pixels || a.images.scalar_type() == a.params[0].scalar_type()),
                   kTrainSteps, ": images: expected a tensor of uint8 or of the dtype of params[0], ",
                   DtypeName(a.params[0]), ", got ", Shape(a.images), " ", DtypeName(a.images));
    image_count = a.images.size(0);
    check<Refused>(image_count == 0 || a.images.numel() == image_count * features, kTrainSteps, ": images: expected ",
                   features, " numbers each, as the first layer has in_features, got ", Shape(a.images));
    // Rows of numbers that follow one another: in place where only the rows have a stride of their own.
    std::optional<int64_t> inner = merged_stride(a.images, 1, a.images.dim());
    const bool in_place = image_count == 0 || features == 1 || (inner && *inner == 1);
    rows_ = in_place ? a.images : torch::stable::contiguous(a.images);
    const int64_t row_stride = image_count == 0 ? features : rows_.stride(0);
    check<Refused>(row_stride >= 0, kTrainSteps, ": images: expected a stride that is not negative, got ", row_stride);

    const ClassIndices::Type type = label_type(a.labels);
    check_device<Refused>(kTrainSteps, "labels", a.labels, "params[0]", a.params[0]);
    check<Refused>(a.labels.dim() == 1, kTrainSteps, ": labels: expected shape [", image_count, "], got ",
                   Shape(a.labels));
    check<Refused>(a.labels.size(0) == image_count, kTrainSteps, ": labels: expected shape [", image_count,
                   "], one for each of images ", Shape(a.images), ", got ", Shape(a.labels));
    labels_ = a.labels.is_contiguous() ? a.labels : torch::stable::contiguous(a.labels);

    const int64_t* order = nullptr;
    int64_t examples = image_count;
    if (a.order) {
      check_device<Refused>(kTrainSteps, "order", *a.order, "params[0]", a.params[0]);
      check<Refused>(a.order->dim() == 1 && a.order->scalar_type() == ScalarType::Long, kTrainSteps,
                     ": order: expected a tensor of int64 [examples], got ", Shape(*a.order), " ", DtypeName(*a.order));
      order_ = a.order->is_contiguous() ? *a.order : torch::stable::contiguous(*a.order);
      order = static_cast<const int64_t*>(order_.const_data_ptr());
      examples = a.order->size(0);
    }
    if (a.class_weight) {
      check_like<Refused>(kTrainSteps, "class_weight", *a.class_weight, "params[0]", a.params[0]);
      check<Refused>(
          a.class_weight->dim() == 1 && a.class_weight->size(0) == classes && a.class_weight->is_contiguous(),
          kTrainSteps, ": class_weight: expected shape [", classes, "], contiguous, got ", Shape(*a.class_weight));
    }

    check_apart(a, rows_);

    for (int64_t g = 0; g < group_count_; ++g) {
      const double* o = a.options.data() + g * kOptions;
      groups_.push_back({0, o[0], o[1], o[2], o[3] != 0, o[4] != 0, false});
    }
    steps = {.layers = layers_.data(),
             .depth = static_cast<int64_t>(layers_.size()),
             .images = {pixels ? nullptr : static_cast<const T*>(rows_.const_data_ptr()),
                        pixels ? static_cast<const uint8_t*>(rows_.const_data_ptr()) : nullptr, row_stride,
                        static_cast<T>(a.scale), static_cast<T>(a.shift)},
             .target = {labels_.const_data_ptr(), type},
             .order = order,
             .examples = examples,
             .batch_size = a.batch_size > 0 ? a.batch_size : std::max<int64_t>(examples, 1),
             .class_weight = a.class_weight ? static_cast<const T*>(a.class_weight->const_data_ptr()) : nullptr,
             .ignore_index = a.ignore_index,
             .label_smoothing = a.label_smoothing,
             .reduction = static_cast<Reduction>(a.reduction),
             .groups = groups_.data(),
             .group_count = group_count_,
             .lr = a.lr.data(),
             .losses = nullptr};
    check<Refused>(static_cast<int64_t>(a.lr.size()) == steps.steps() * group_count_, kTrainSteps, ": lr: expected ",
                   steps.steps(), " steps times ", group_count_, " groups, got ", a.lr.size());
    const int64_t sizes[] = {steps.steps()};
    losses = empty(device_of(a.params[0]), dtype_of(a.params[0]), sizes, a.batch_size > 0 ? 1 : 0);
    steps.losses = static_cast<T*>(losses.mutable_data_ptr());
  }
  TrainStepsOperands(const TrainStepsOperands&) = delete;
  TrainStepsOperands& operator=(const TrainStepsOperands&) = delete;

  TrainSteps<T> steps;
  int64_t image_count;
  Tensor losses;  // what the op returns

 private:
  int64_t group_count_;
  std::vector<TrainedLayer<T>> layers_;
  std::vector<SgdOptions> groups_;
  Tensor rows_, labels_, order_;
};

// Calls run(operands) for the dtype of params; returns the losses.
template <class Run>
Tensor train_steps_by_dtype(const TrainStepsArguments& a, const Run& run) {
  const auto& [images, labels, order, batch_size, params, momentum_buffers, layers, groups, options, lr, scale, shift,
               class_weight, ignore_index, label_smoothing, reduction] = a;
  check<Refused>(!layers.empty() && !params.empty(), kTrainSteps, ": layers: expected at least one");
  check<Refused>(params[0].scalar_type() == ScalarType::Float || params[0].scalar_type() == ScalarType::Double,
                 kTrainSteps, ": params: expected float32 or float64, got ", DtypeName(params[0]));
  check<Refused>(groups.size() == 2 * params.size(), kTrainSteps, ": groups: expected two numbers for each of ",
                 params.size(), " params, got ", groups.size());
  check<Refused>(momentum_buffers.empty() || momentum_buffers.size() == params.size(), kTrainSteps,
                 ": momentum_buffers: expected none or one for each of ", params.size(), " params, got ",
                 momentum_buffers.size());
  check<Refused>(options.size() % kOptions == 0, kTrainSteps, ": options: expected ", kOptions, " for each group, got ",
                 options.size());
  check<Refused>(batch_size >= 0, kTrainSteps, ": batch_size: expected at least 0, got ", batch_size);
  check<Refused>(0 <= label_smoothing && label_smoothing <= 1, kTrainSteps,
                 ": label_smoothing: expected a number in [0, 1], got ", label_smoothing);
  check<Refused>(reduction == 1 || reduction == 2, kTrainSteps, ": reduction: expected 1 (mean) or 2 (sum), got ",
                 reduction);
  const auto run_as = [&](auto zero) {
    const TrainStepsOperands<decltype(zero)> operands(a);
    run(operands);
    return operands.losses;
  };
  return params[0].scalar_type() == ScalarType::Float ? run_as(float{}) : run_as(double{});
}

}  // namespace mnist_ext::ops
