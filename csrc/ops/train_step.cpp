// train_steps: checks, and the arguments in the kernels' terms. What needs the values of labels and order is left to
// the kernels; on CUDA nothing here waits for the device.
#include <algorithm>
#include <string>
#include <vector>

#include "device.h"
#include "schemas.h"
#include "step_graphs.h"

namespace mnist_ext::ops {
namespace {

using Refused = std::invalid_argument;  // ValueError in Python, as TrainStep promises

constexpr int64_t kFrozen = -1;  // in place of a group

// Beyond, a step takes so long that its launches do not count, and is no reason to hold so much memory.
constexpr int64_t kLargestHeld = int64_t{64} << 20;

// The weights of all layers, or their biases, and what else there is for each.
struct Parameters {
  const char *kind, *name;  // "weight", "weights"
  const std::vector<std::optional<Tensor>>& tensors;
  const std::vector<std::optional<Tensor>>& momentum_buffers;
  const std::vector<int64_t>& groups;
  const std::vector<bool>& first_step;
};

struct Model {
  Parameters weights, biases;
  const std::vector<bool>& relu;
  const std::vector<SgdOptions>& groups;

  const Tensor& weight(std::size_t l) const { return *weights.tensors[l]; }
  bool has_momentum(int64_t group) const { return group != kFrozen && groups[group].momentum != 0; }
};

template <class List, class... Name>
void check_length(const List& list, std::size_t expected, const char* of, const Name&... name) {
  check<Refused>(list.size() == expected, kTrainSteps, ": ", name..., ": expected one for each of ", expected, " ", of,
                 ", got ", list.size());
}

std::vector<SgdOptions> groups_of(const std::vector<double>& momentum, const std::vector<double>& dampening,
                                  const std::vector<double>& weight_decay, const std::vector<bool>& nesterov,
                                  const std::vector<bool>& maximize) {
  const std::size_t count = momentum.size();
  check_length(dampening, count, "groups", "dampening");
  check_length(weight_decay, count, "groups", "weight_decay");
  check_length(nesterov, count, "groups", "nesterov");
  check_length(maximize, count, "groups", "maximize");
  std::vector<SgdOptions> groups;
  groups.reserve(count);
  for (std::size_t g = 0; g < count; ++g) {
    groups.push_back({0, momentum[g], dampening[g], weight_decay[g], nesterov[g], maximize[g], false});
  }
  return groups;
}

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

void check_parameter(const Model& model, const Parameters& params, std::size_t l, ExpectedShape shape) {
  const Tensor &p = *params.tensors[l], &first = model.weight(0);
  check<Refused>(on_same_device(p, first) && dtype_of(p) == dtype_of(first) && p.is_contiguous() && shape.fits(p),
                 kTrainSteps, ": ", params.name, "[", l, "]: expected ", shape, " ", DtypeName(first), " on ",
                 DeviceName(first), ", contiguous, got ", Shape(p), " ", DtypeName(p), " on ", DeviceName(p),
                 p.is_contiguous() ? "" : ", not contiguous");
  const int64_t group = params.groups[l], last_group = static_cast<int64_t>(model.groups.size()) - 1;
  check<Refused>(kFrozen <= group && group <= last_group, kTrainSteps, ": ", params.kind, "_groups: expected -1 to ",
                 last_group, ", got ", group);
  const std::optional<Tensor>& buffer = params.momentum_buffers[l];
  check<Refused>(buffer || !model.has_momentum(group), kTrainSteps, ": ", params.kind, "_momentum_buffers[", l,
                 "]: expected a tensor like ", params.name, "[", l, "], as its group has momentum, got none");
  if (!buffer) return;
  check<Refused>(have_same_layout(*buffer, p), kTrainSteps, ": ", params.kind, "_momentum_buffers[", l,
                 "]: expected a contiguous tensor like ", params.name, "[", l, "], ", Shape(p), " ", DtypeName(p),
                 " on ", DeviceName(p), ", got ", Shape(*buffer), " ", DtypeName(*buffer), " on ", DeviceName(*buffer));
}

void check_model(const Model& model) {
  const std::size_t count = model.weights.tensors.size();
  check<Refused>(count > 0, kTrainSteps, ": weights: expected at least one");
  const ScalarType dtype = model.weight(0).scalar_type();
  check<Refused>(dtype == ScalarType::Float || dtype == ScalarType::Double, kTrainSteps,
                 ": weights: expected float32 or float64, got ", DtypeName(model.weight(0)));
  check_length(model.relu, count, "layers", "relu");
  for (const Parameters* params : {&model.weights, &model.biases}) {
    check_length(params->tensors, count, "layers", params->name);
    check_length(params->momentum_buffers, count, "layers", params->kind, "_momentum_buffers");
    check_length(params->groups, count, "layers", params->kind, "_groups");
    check_length(params->first_step, count, "layers", params->kind, "_first_step");
  }
  for (std::size_t l = 0; l < count; ++l) {
    check_parameter(model, model.weights, l, {true, 0, l == 0 ? 0 : model.weight(l - 1).size(0)});
    if (model.biases.tensors[l]) check_parameter(model, model.biases, l, {false, model.weight(l).size(0), 0});
  }
}

// Images and labels, checked; copies where they are not read in place.
struct Examples {
  int64_t image_count, row_stride;
  bool pixels;
  Tensor images, labels;
  std::optional<Tensor> order;

  Examples(const Tensor& x, const Tensor& y, const std::optional<Tensor>& permutation, const Tensor& weight)
      : pixels(x.scalar_type() == ScalarType::Byte) {
    take_images(x, weight);
    check_device<Refused>(kTrainSteps, "labels", y, "weights[0]", weight);
    check<Refused>(has_class_indices(y), kTrainSteps,
                   ": labels: expected class indices of dtype int64, int32 or uint8, got ", DtypeName(y));
    check<Refused>(y.dim() == 1 && y.size(0) == image_count, kTrainSteps, ": labels: expected shape [", image_count,
                   "], one for each of images ", Shape(x), ", got ", Shape(y));
    labels = made_contiguous(y);
    if (!permutation) return;
    check_device<Refused>(kTrainSteps, "order", *permutation, "weights[0]", weight);
    check<Refused>(permutation->dim() == 1 && permutation->scalar_type() == ScalarType::Long, kTrainSteps,
                   ": order: expected a tensor of int64 [examples], got ", Shape(*permutation), " ",
                   DtypeName(*permutation));
    order = made_contiguous(*permutation);
  }

  int64_t count() const { return order ? order->size(0) : image_count; }

  template <class T>
  ExampleSource<T> source(double scale, double shift) const {
    const void* data = images.const_data_ptr();
    const Images<T> rows = {pixels ? nullptr : static_cast<const T*>(data),
                            pixels ? static_cast<const uint8_t*>(data) : nullptr, row_stride, static_cast<T>(scale),
                            static_cast<T>(shift)};
    const int64_t* indices = order ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr;
    return {rows, class_indices(labels), indices, image_count, 0};
  }

 private:
  void take_images(const Tensor& t, const Tensor& weight) {
    const int64_t features = weight.size(1);
    check_device<Refused>(kTrainSteps, "images", t, "weights[0]", weight);
    check<Refused>(t.dim() >= 1 && t.dim() <= kMaxDims && (pixels || t.scalar_type() == weight.scalar_type()),
                   kTrainSteps, ": images: expected a tensor of uint8 or of the dtype of weights[0], ",
                   DtypeName(weight), ", got ", Shape(t), " ", DtypeName(t));
    image_count = t.size(0);
    check<Refused>(image_count == 0 || t.numel() == image_count * features, kTrainSteps, ": images: expected ",
                   features, " numbers each, as the first layer has in_features, got ", Shape(t));
    // Rows of numbers that follow one another: in place where only the rows have a stride of their own.
    const bool in_place = image_count == 0 || features == 1 || merged_stride(t, 1, t.dim()) == 1;
    images = in_place ? t : torch::stable::contiguous(t);
    row_stride = image_count == 0 ? features : images.stride(0);
    check<Refused>(row_stride >= 0, kTrainSteps, ": images: expected a stride that is not negative, got ", row_stride);
  }
};

// images are a copy where they are not read in place.
void check_apart(const Model& model, const Tensor& images, const std::optional<Tensor>& class_weight) {
  constexpr int32_t kImages = -1, kClassWeight = -2;
  const auto count = static_cast<int32_t>(model.relu.size());
  const Parameters* const kinds[] = {&model.weights, &model.biases};
  std::vector<Extent> extents;
  extents.reserve(4 * count + 2);
  for (int32_t i = 0; i < 2 * count; ++i) {
    const Parameters& params = *kinds[i / count];
    if (const auto& t = params.tensors[i % count]) extents.push_back(extent_of(*t, 2 * i, true));
    if (const auto& t = params.momentum_buffers[i % count]) extents.push_back(extent_of(*t, 2 * i + 1, true));
  }
  extents.push_back(extent_of(images, kImages, false));
  if (class_weight) extents.push_back(extent_of(*class_weight, kClassWeight, false));
  const auto found = overlapping(extents);
  if (!found) return;
  const auto name = [&](const Extent& e) {
    if (e.number < 0) return std::string(e.number == kImages ? "images" : "class_weight");
    const Parameters& params = *kinds[e.number / 2 / count];
    const bool is_buffer = e.number % 2 == 1;
    return (is_buffer ? std::string(params.kind) + "_momentum_buffers" : params.name) + "[" +
           std::to_string(e.number / 2 % count) + "]";
  };
  fail<Refused>(kTrainSteps, ": ", name(found->second), " and ", name(found->first),
                " share memory: an update in place needs tensors of their own");
}

template <class T>
TrainedParameter<T> trained(const Model& model, const Parameters& params, std::size_t l) {
  if (!params.tensors[l]) return {nullptr, nullptr, kFrozen, false};
  const int64_t group = params.groups[l];
  T* buffer = model.has_momentum(group) ? data_of<T>(*params.momentum_buffers[l]) : nullptr;
  return {data_of<T>(*params.tensors[l]), buffer, static_cast<int>(group), params.first_step[l]};
}

template <class T>
std::vector<TrainedLayer<T>> trained_layers(const Model& model) {
  std::vector<TrainedLayer<T>> layers;
  layers.reserve(model.relu.size());
  for (std::size_t l = 0; l < model.relu.size(); ++l) {
    layers.push_back({.in_features = model.weight(l).size(1),
                      .out_features = model.weight(l).size(0),
                      .weight = trained<T>(model, model.weights, l),
                      .bias = trained<T>(model, model.biases, l),
                      .relu = model.relu[l]});
  }
  return layers;
}

template <class T>
BadExample run(const TrainSteps<T>& steps, HeldGraph* held, const Tensor& like) {
  OnDevice device(like);
  const Launch launch = device.launch();
  const int64_t bytes = kernels<T>().train_steps_workspace_bytes(steps);
  const auto is_capturing = kernel_table().is_capturing;
  // What the caller captures uses memory of the capture, and may run when ours is gone.
  if (!held || bytes > kLargestHeld || (is_capturing && is_capturing(launch))) {
    return kernels<T>().train_steps(steps, device.workspace(bytes), nullptr, launch);
  }
  const std::lock_guard lock(held->mutex);
  return kernels<T>().train_steps(steps, held->workspace_for(like, launch.stream, bytes), held->graph.get(), launch);
}

// Raises for the example that a kernel found, if it found one.
template <class T>
void check_example(const TrainSteps<T>& steps, BadExample bad) {
  if (bad.what == BadExample::none) return;
  const ExampleSource<T>& source = steps.source;
  const int64_t at = source.order ? source.order[bad.position] : bad.position;
  check<std::out_of_range>(bad.what != BadExample::order, kTrainSteps, ": order: expected indices of ",
                           source.image_count, " images, got ", at, " at position ", bad.position);
  fail<std::out_of_range>(kTrainSteps, ": labels: expected class indices in [0, ", steps.classes(),
                          ") or ignore_index ", steps.ignore_index, ", got ", source.target[at], " at position ", at);
}

Tensor train_steps(const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order, int64_t batch_size,
                   double scale, double shift, const std::vector<Tensor>& weights,
                   const std::vector<std::optional<Tensor>>& biases,
                   const std::vector<std::optional<Tensor>>& weight_momentum_buffers,
                   const std::vector<std::optional<Tensor>>& bias_momentum_buffers, const std::vector<bool>& relu,
                   const std::vector<int64_t>& weight_groups, const std::vector<int64_t>& bias_groups,
                   const std::vector<bool>& weight_first_step, const std::vector<bool>& bias_first_step,
                   const std::vector<double>& momentum, const std::vector<double>& dampening,
                   const std::vector<double>& weight_decay, const std::vector<bool>& nesterov,
                   const std::vector<bool>& maximize, const std::vector<double>& lr,
                   const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                   int64_t reduction, int64_t graph) {
  const std::vector<std::optional<Tensor>> all_weights(weights.begin(), weights.end());
  const std::vector<SgdOptions> groups = groups_of(momentum, dampening, weight_decay, nesterov, maximize);
  const Model model = {{"weight", "weights", all_weights, weight_momentum_buffers, weight_groups, weight_first_step},
                       {"bias", "biases", biases, bias_momentum_buffers, bias_groups, bias_first_step},
                       relu,
                       groups};
  check_model(model);
  check<Refused>(batch_size >= 0, kTrainSteps, ": batch_size: expected at least 0, got ", batch_size);
  check<Refused>(0 <= label_smoothing && label_smoothing <= 1, kTrainSteps,
                 ": label_smoothing: expected a number in [0, 1], got ", label_smoothing);
  check<Refused>(reduction == 1 || reduction == 2, kTrainSteps, ": reduction: expected 1 (mean) or 2 (sum), got ",
                 reduction);
  const Tensor& first = weights[0];
  const Examples examples(images, labels, order, first);
  if (class_weight) {
    const int64_t classes = weights.back().size(0);
    check_operand<Refused>(
        kTrainSteps, "class_weight", *class_weight, "weights[0]", first,
        class_weight->dim() == 1 && class_weight->size(0) == classes && class_weight->is_contiguous(), "shape [",
        classes, "], contiguous");
  }
  check_apart(model, examples.images, class_weight);
  const auto held = held_graph(graph);
  Tensor losses;
  dispatch_float_or_double(first, [&](auto zero) {
    using T = decltype(zero);
    TrainSteps<T> steps = {
        .layers = trained_layers<T>(model),
        .source = examples.source<T>(scale, shift),
        .examples = examples.count(),
        .batch_size = batch_size > 0 ? batch_size : std::max<int64_t>(examples.count(), 1),
        .class_weight = class_weight ? static_cast<const T*>(class_weight->const_data_ptr()) : nullptr,
        .ignore_index = ignore_index,
        .label_smoothing = label_smoothing,
        .reduction = static_cast<Reduction>(reduction),
        .groups = model.groups,
        .lr = lr.data(),
        .losses = nullptr};
    check<Refused>(lr.size() == steps.steps() * model.groups.size(), kTrainSteps, ": lr: expected ", steps.steps(),
                   " steps times ", model.groups.size(), " groups, got ", lr.size());
    const int64_t sizes[] = {steps.steps()};
    losses = empty(first, dtype_of(first), sizes, batch_size > 0 ? 1 : 0);
    steps.losses = data_of<T>(losses);
    check_example(steps, run(steps, held.get(), first));
  });
  return losses;
}

}  // namespace

void implement_train_steps(Library& m) {
  m.impl("train_steps", TORCH_BOX(&train_steps));
  m.impl("new_step_graph", TORCH_BOX(&new_step_graph));
  m.impl("free_step_graph", TORCH_BOX(&free_step_graph));
}

}  // namespace mnist_ext::ops
