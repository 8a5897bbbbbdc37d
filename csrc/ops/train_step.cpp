// train_steps: checks, and the arguments in the kernels' terms. What needs the values of labels and order is left to
// the kernels; on CUDA nothing here waits for the device.
#include <algorithm>
#include <string>
#include <vector>

#include "device.h"
#include "extents.h"
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
  const char *name, *buffers_name, *groups_name, *first_step_name;  // in the schema
  std::vector<std::optional<Tensor>> tensors;
  const std::vector<std::optional<Tensor>>& momentum_buffers;
  const std::vector<int64_t>& groups;
  const std::vector<bool>& first_step;
};

// What the op is given; schemas.h says what each is.
struct Arguments {
  const Tensor& images;
  const Tensor& labels;
  const std::optional<Tensor>& order;
  int64_t batch_size;
  double scale, shift;
  Parameters weights, biases;
  const std::vector<bool>& relu;
  std::vector<SgdOptions> groups;
  const std::vector<double>& lr;
  const std::optional<Tensor>& class_weight;
  int64_t ignore_index;
  double label_smoothing;
  int64_t reduction;

  const Tensor& first_weight() const { return *weights.tensors[0]; }
};

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

template <class List>
void check_length(const char* name, const List& list, std::size_t expected, const char* of) {
  check<Refused>(list.size() == expected, kTrainSteps, ": ", name, ": expected one for each of ", expected, " ", of,
                 ", got ", list.size());
}

std::vector<SgdOptions> groups_of(const std::vector<double>& momentum, const std::vector<double>& dampening,
                                  const std::vector<double>& weight_decay, const std::vector<bool>& nesterov,
                                  const std::vector<bool>& maximize) {
  const std::size_t count = momentum.size();
  check_length("dampening", dampening, count, "groups");
  check_length("weight_decay", weight_decay, count, "groups");
  check_length("nesterov", nesterov, count, "groups");
  check_length("maximize", maximize, count, "groups");
  std::vector<SgdOptions> groups;
  groups.reserve(count);
  for (std::size_t g = 0; g < count; ++g) {
    groups.push_back({0, momentum[g], dampening[g], weight_decay[g], nesterov[g], maximize[g], false});
  }
  return groups;
}

bool has_momentum(const Arguments& a, int64_t group) { return group != kFrozen && a.groups[group].momentum != 0; }

void check_momentum_buffer(const Arguments& a, const Parameters& params, std::size_t l) {
  const Tensor& p = *params.tensors[l];
  const std::optional<Tensor>& buffer = params.momentum_buffers[l];
  if (!buffer) {
    check<Refused>(!has_momentum(a, params.groups[l]), kTrainSteps, ": ", params.buffers_name, "[", l,
                   "]: expected a tensor like ", params.name, "[", l, "], as its group has momentum, got none");
    return;
  }
  bool same = on_same_device(*buffer, p) && buffer->scalar_type() == p.scalar_type() && buffer->dim() == p.dim() &&
              buffer->is_contiguous();
  for (int64_t d = 0; same && d < p.dim(); ++d) same = buffer->size(d) == p.size(d);
  check<Refused>(same, kTrainSteps, ": ", params.buffers_name, "[", l, "]: expected a contiguous tensor like ",
                 params.name, "[", l, "], ", Shape(p), " ", DtypeName(p), " on ", DeviceName(p), ", got ",
                 Shape(*buffer), " ", DtypeName(*buffer), " on ", DeviceName(*buffer));
}

void check_parameter(const Arguments& a, const Parameters& params, std::size_t l, ExpectedShape shape) {
  const Tensor& p = *params.tensors[l];
  const Tensor& first = a.first_weight();
  check<Refused>(on_same_device(p, first) && dtype_of(p) == dtype_of(first) && p.is_contiguous() && shape.fits(p),
                 kTrainSteps, ": ", params.name, "[", l, "]: expected ", shape, " ", DtypeName(first), " on ",
                 DeviceName(first), ", contiguous, got ", Shape(p), " ", DtypeName(p), " on ", DeviceName(p),
                 p.is_contiguous() ? "" : ", not contiguous");
  const auto group_count = static_cast<int64_t>(a.groups.size());
  const int64_t group = params.groups[l];
  check<Refused>(kFrozen <= group && group < group_count, kTrainSteps, ": ", params.groups_name, ": expected -1 to ",
                 group_count - 1, ", got ", group);
  check_momentum_buffer(a, params, l);
}

void check_layers(const Arguments& a) {
  const std::size_t count = a.weights.tensors.size();
  check<Refused>(count > 0, kTrainSteps, ": weights: expected at least one");
  const ScalarType dtype = a.first_weight().scalar_type();
  check<Refused>(dtype == ScalarType::Float || dtype == ScalarType::Double, kTrainSteps,
                 ": weights: expected float32 or float64, got ", DtypeName(a.first_weight()));
  check_length("relu", a.relu, count, "layers");
  for (const Parameters* params : {&a.weights, &a.biases}) {
    check_length(params->name, params->tensors, count, "layers");
    check_length(params->buffers_name, params->momentum_buffers, count, "layers");
    check_length(params->groups_name, params->groups, count, "layers");
    check_length(params->first_step_name, params->first_step, count, "layers");
  }
  for (std::size_t l = 0; l < count; ++l) {
    const int64_t in_features = l == 0 ? 0 : a.weights.tensors[l - 1]->size(0);
    check_parameter(a, a.weights, l, {true, 0, in_features});
    if (a.biases.tensors[l]) check_parameter(a, a.biases, l, {false, a.weights.tensors[l]->size(0), 0});
  }
}

void check_settings(const Arguments& a) {
  check<Refused>(a.batch_size >= 0, kTrainSteps, ": batch_size: expected at least 0, got ", a.batch_size);
  check<Refused>(0 <= a.label_smoothing && a.label_smoothing <= 1, kTrainSteps,
                 ": label_smoothing: expected a number in [0, 1], got ", a.label_smoothing);
  check<Refused>(a.reduction == 1 || a.reduction == 2, kTrainSteps, ": reduction: expected 1 (mean) or 2 (sum), got ",
                 a.reduction);
  if (!a.class_weight) return;
  const Tensor& weight = *a.class_weight;
  const int64_t classes = a.weights.tensors.back()->size(0);
  check_like<Refused>(kTrainSteps, "class_weight", weight, "weights[0]", a.first_weight());
  check<Refused>(weight.dim() == 1 && weight.size(0) == classes && weight.is_contiguous(), kTrainSteps,
                 ": class_weight: expected shape [", classes, "], contiguous, got ", Shape(weight));
}

// Images and labels of the examples, checked; copies where they are not read in place.
struct Examples {
  int64_t image_count, row_stride, count;
  bool pixels;
  Tensor images, labels;
  std::optional<Tensor> order;

  explicit Examples(const Arguments& a) : pixels(a.images.scalar_type() == ScalarType::Byte) {
    take_images(a.images, a.first_weight());
    take_labels(a.labels, a.first_weight());
    count = image_count;
    if (a.order) take_order(*a.order, a.first_weight());
  }

  template <class T>
  ExampleSource<T> source(double scale, double shift) const {
    const void* data = images.const_data_ptr();
    return {
        .images = {pixels ? nullptr : static_cast<const T*>(data), pixels ? static_cast<const uint8_t*>(data) : nullptr,
                   row_stride, static_cast<T>(scale), static_cast<T>(shift)},
        .target = class_indices(labels),
        .order = order ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr,
        .image_count = image_count,
        .first = 0};
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
    const std::optional<int64_t> inner = merged_stride(t, 1, t.dim());
    const bool in_place = image_count == 0 || features == 1 || (inner && *inner == 1);
    images = in_place ? t : torch::stable::contiguous(t);
    row_stride = image_count == 0 ? features : images.stride(0);
    check<Refused>(row_stride >= 0, kTrainSteps, ": images: expected a stride that is not negative, got ", row_stride);
  }

  void take_labels(const Tensor& t, const Tensor& weight) {
    check<Refused>(has_class_indices(t), kTrainSteps,
                   ": labels: expected class indices of dtype int64, int32 or uint8, got ", DtypeName(t));
    check_device<Refused>(kTrainSteps, "labels", t, "weights[0]", weight);
    check<Refused>(t.dim() == 1, kTrainSteps, ": labels: expected shape [", image_count, "], got ", Shape(t));
    check<Refused>(t.size(0) == image_count, kTrainSteps, ": labels: expected shape [", image_count,
                   "], one for each of images ", Shape(images), ", got ", Shape(t));
    labels = made_contiguous(t);
  }

  void take_order(const Tensor& t, const Tensor& weight) {
    check_device<Refused>(kTrainSteps, "order", t, "weights[0]", weight);
    check<Refused>(t.dim() == 1 && t.scalar_type() == ScalarType::Long, kTrainSteps,
                   ": order: expected a tensor of int64 [examples], got ", Shape(t), " ", DtypeName(t));
    order = made_contiguous(t);
    count = t.size(0);
  }
};

// images are a copy where they are not read in place.
void check_apart(const Arguments& a, const Tensor& images) {
  constexpr int32_t kImages = -1, kClassWeight = -2;
  struct List {
    const char* name;
    const std::vector<std::optional<Tensor>>& tensors;
  };
  const List lists[] = {{a.weights.name, a.weights.tensors},
                        {a.weights.buffers_name, a.weights.momentum_buffers},
                        {a.biases.name, a.biases.tensors},
                        {a.biases.buffers_name, a.biases.momentum_buffers}};
  const auto count = static_cast<int32_t>(a.weights.tensors.size());
  std::vector<Extent> extents;
  extents.reserve(4 * count + 2);
  for (int32_t i = 0; i < 4 * count; ++i) {
    const std::optional<Tensor>& t = lists[i / count].tensors[i % count];
    if (t) extents.push_back(extent_of(*t, i, true));
  }
  extents.push_back(extent_of(images, kImages, false));
  if (a.class_weight) extents.push_back(extent_of(*a.class_weight, kClassWeight, false));
  const auto found = overlapping(extents);
  if (!found) return;
  const auto name = [&](const Extent& e) {
    if (e.number == kImages) return std::string("images");
    if (e.number == kClassWeight) return std::string("class_weight");
    return std::string(lists[e.number / count].name) + "[" + std::to_string(e.number % count) + "]";
  };
  fail<Refused>(kTrainSteps, ": ", name(found->second), " and ", name(found->first),
                " share memory: an update in place needs tensors of their own");
}

template <class T>
TrainedParameter<T> trained(const Arguments& a, const Parameters& params, std::size_t l) {
  if (!params.tensors[l]) return {nullptr, nullptr, kFrozen, false};
  const int64_t group = params.groups[l];
  return {data_of<T>(*params.tensors[l]), has_momentum(a, group) ? data_of<T>(*params.momentum_buffers[l]) : nullptr,
          static_cast<int>(group), params.first_step[l]};
}

template <class T>
std::vector<TrainedLayer<T>> trained_layers(const Arguments& a) {
  std::vector<TrainedLayer<T>> layers;
  layers.reserve(a.relu.size());
  for (std::size_t l = 0; l < a.relu.size(); ++l) {
    const Tensor& weight = *a.weights.tensors[l];
    layers.push_back({.in_features = weight.size(1),
                      .out_features = weight.size(0),
                      .weight = trained<T>(a, a.weights, l),
                      .bias = trained<T>(a, a.biases, l),
                      .relu = a.relu[l]});
  }
  return layers;
}

template <class T>
TrainSteps<T> steps_of(const Arguments& a, const Examples& examples) {
  return {.layers = trained_layers<T>(a),
          .source = examples.source<T>(a.scale, a.shift),
          .examples = examples.count,
          .batch_size = a.batch_size > 0 ? a.batch_size : std::max<int64_t>(examples.count, 1),
          .class_weight = a.class_weight ? static_cast<const T*>(a.class_weight->const_data_ptr()) : nullptr,
          .ignore_index = a.ignore_index,
          .label_smoothing = a.label_smoothing,
          .reduction = static_cast<Reduction>(a.reduction),
          .groups = a.groups,
          .lr = a.lr.data(),
          .losses = nullptr};
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
  const Arguments a = {.images = images,
                       .labels = labels,
                       .order = order,
                       .batch_size = batch_size,
                       .scale = scale,
                       .shift = shift,
                       .weights = {"weights",
                                   "weight_momentum_buffers",
                                   "weight_groups",
                                   "weight_first_step",
                                   {weights.begin(), weights.end()},
                                   weight_momentum_buffers,
                                   weight_groups,
                                   weight_first_step},
                       .biases = {"biases", "bias_momentum_buffers", "bias_groups", "bias_first_step", biases,
                                  bias_momentum_buffers, bias_groups, bias_first_step},
                       .relu = relu,
                       .groups = groups_of(momentum, dampening, weight_decay, nesterov, maximize),
                       .lr = lr,
                       .class_weight = class_weight,
                       .ignore_index = ignore_index,
                       .label_smoothing = label_smoothing,
                       .reduction = reduction};
  check_layers(a);
  check_settings(a);
  const Examples examples(a);
  check_apart(a, examples.images);
  const auto held = held_graph(graph);
  Tensor losses;
  dispatch_float_or_double(a.first_weight(), [&](auto zero) {
    using T = decltype(zero);
    TrainSteps<T> steps = steps_of<T>(a, examples);
    check<Refused>(lr.size() == steps.steps() * a.groups.size(), kTrainSteps, ": lr: expected ", steps.steps(),
                   " steps times ", a.groups.size(), " groups, got ", lr.size());
    const int64_t sizes[] = {steps.steps()};
    losses = empty(device_of(a.first_weight()), dtype_of(a.first_weight()), sizes, batch_size > 0 ? 1 : 0);
    steps.losses = data_of<T>(losses);
    check_example(steps, run(steps, held.get(), a.first_weight()));
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
