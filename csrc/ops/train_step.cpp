// train_steps: checks, and the arguments in the kernels' terms. What needs the values of labels and order is left to
// the kernels; on CUDA nothing here waits for the device.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device.h"
#include "schemas.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kTrainSteps = "mnist_ext.train_steps";
constexpr int64_t kFrozen = -1;  // in place of a group

using Refused = std::invalid_argument;  // ValueError in Python, as TrainStep promises

// Beyond, a step takes so long that its launches do not count, and is no reason to hold so much memory.
constexpr int64_t kLargestHeld = int64_t{64} << 20;

void check_length(const char* name, std::size_t length, std::size_t expected, const char* of) {
  check<Refused>(length == expected, kTrainSteps, ": ", name, ": expected one for each of ", expected, " ", of,
                 ", got ", length);
}

// What stays the same between the calls of train_steps, described once.
struct TrainStepSettings {
  std::vector<bool> relu, bias;     // of each layer: whether it has one
  std::vector<int64_t> groups;      // of each parameter: the weights, then the biases that there are
  std::vector<SgdOptions> options;  // of each group; lr and first_step do not count
  double scale, shift;              // of uint8 images
  std::optional<Tensor> class_weight;
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;

  std::size_t layers() const { return relu.size(); }
  bool has_momentum(std::size_t param) const {
    return groups[param] != kFrozen && options[groups[param]].momentum != 0;
  }
};

// What a caller has a handle for.
struct TrainStepHandle {
  const TrainStepSettings settings;
  // CUDA: the graph of a step, and the memory it works in, which has to be the same from call to call.
  std::mutex mutex{};                  // of all below
  std::unique_ptr<StepGraph> graph{};  // null where the kernels have none
  std::optional<Tensor> workspace{};
  CUstream_st* stream = nullptr;  // where the workspace is used: elsewhere its allocator would hand it out too early

  // At least so many bytes on like's device, the same from call to call if the stream is.
  void* workspace_for(const Tensor& like, CUstream_st* on_stream, int64_t bytes) {
    const bool serves =
        workspace && on_same_device(*workspace, like) && stream == on_stream && workspace->numel() >= bytes;
    if (!serves) {
      workspace = empty(like, aoti_torch_dtype_uint8(), {bytes});
      stream = on_stream;
    }
    return workspace->mutable_data_ptr();
  }
};

struct Registry {
  std::mutex mutex;
  int64_t last = 0;
  std::map<int64_t, std::shared_ptr<TrainStepHandle>> steps;
};

// Never destroyed: when the process ends CUDA may end first.
Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

std::shared_ptr<TrainStepHandle> train_step_of(int64_t handle) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.steps.find(handle);
  check<Refused>(found != all.steps.end(), kTrainSteps,
                 ": step: expected a handle from new_train_step, not freed yet, got ", handle);
  return found->second;
}

int64_t new_train_step(const Tensor&, const std::vector<bool>& relu, const std::vector<bool>& bias,
                       const std::vector<int64_t>& groups, const std::vector<double>& momentum,
                       const std::vector<double>& dampening, const std::vector<double>& weight_decay,
                       const std::vector<bool>& nesterov, const std::vector<bool>& maximize, double scale, double shift,
                       const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                       int64_t reduction, bool graph) {
  check<Refused>(!relu.empty(), kTrainSteps, ": relu: expected at least one layer");
  check_length("bias", bias.size(), relu.size(), "layers");
  check_length("groups", groups.size(),
               relu.size() + static_cast<std::size_t>(std::count(bias.begin(), bias.end(), true)), "params");
  check_length("dampening", dampening.size(), momentum.size(), "groups");
  check_length("weight_decay", weight_decay.size(), momentum.size(), "groups");
  check_length("nesterov", nesterov.size(), momentum.size(), "groups");
  check_length("maximize", maximize.size(), momentum.size(), "groups");
  const int64_t last_group = static_cast<int64_t>(momentum.size()) - 1;
  for (const int64_t group : groups) {
    check<Refused>(kFrozen <= group && group <= last_group, kTrainSteps, ": groups: expected -1 to ", last_group,
                   ", got ", group);
  }
  check<Refused>(0 <= label_smoothing && label_smoothing <= 1, kTrainSteps,
                 ": label_smoothing: expected a number in [0, 1], got ", label_smoothing);
  check<Refused>(reduction == 1 || reduction == 2, kTrainSteps, ": reduction: expected 1 (mean) or 2 (sum), got ",
                 reduction);
  std::vector<SgdOptions> options;
  for (std::size_t g = 0; g < momentum.size(); ++g) {
    options.push_back({0, momentum[g], dampening[g], weight_decay[g], nesterov[g], maximize[g], false});
  }
  auto step = std::shared_ptr<TrainStepHandle>(
      new TrainStepHandle{{relu, bias, groups, std::move(options), scale, shift, class_weight, ignore_index,
                           label_smoothing, static_cast<Reduction>(reduction)}});
  const auto new_graph = kernel_table().new_step_graph;
  if (graph && new_graph) step->graph.reset(new_graph());
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.steps[++all.last] = std::move(step);
  return all.last;
}

void free_train_step(const Tensor&, int64_t handle) {
  const auto step = train_step_of(handle);  // destroyed behind the lock
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.steps.erase(handle);
}

// The parameters of a step: the weights, then the biases that there are; and their momentum buffers.
struct Model {
  const TrainStepSettings& settings;
  const std::vector<Tensor>& params;
  const std::vector<Tensor>& momentum_buffers;  // of each parameter that has momentum
  const std::vector<bool>& first_step;          // of each of those: it holds nothing yet

  const Tensor& weight(std::size_t layer) const { return params[layer]; }
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

void check_param(const Model& model, std::size_t i, ExpectedShape shape) {
  const Tensor &p = model.params[i], &first = model.params[0];
  check<Refused>(on_same_device(p, first) && dtype_of(p) == dtype_of(first) && p.is_contiguous() && shape.fits(p),
                 kTrainSteps, ": params[", i, "]: expected ", shape, " ", DtypeName(first), " on ", DeviceName(first),
                 ", contiguous, got ", Shape(p), " ", DtypeName(p), " on ", DeviceName(p),
                 p.is_contiguous() ? "" : ", not contiguous");
}

void check_model(const Model& model) {
  const TrainStepSettings& settings = model.settings;
  check_length("params", model.params.size(), settings.groups.size(), "weights and biases");
  const ScalarType dtype = model.weight(0).scalar_type();
  check<Refused>(dtype == ScalarType::Float || dtype == ScalarType::Double, kTrainSteps,
                 ": params: expected float32 or float64, got ", DtypeName(model.weight(0)));
  std::size_t bias = settings.layers();
  for (std::size_t l = 0; l < settings.layers(); ++l) {
    check_param(model, l, {true, 0, l == 0 ? 0 : model.weight(l - 1).size(0)});
    if (settings.bias[l]) check_param(model, bias++, {false, model.weight(l).size(0), 0});
  }
  std::size_t moved = 0;
  for (std::size_t i = 0; i < model.params.size(); ++i) {
    if (!settings.has_momentum(i)) continue;
    const Tensor& p = model.params[i];
    check<Refused>(moved < model.momentum_buffers.size(), kTrainSteps, ": momentum_buffers: expected one like params[",
                   i, "], as its group has momentum, got none");
    const Tensor& buffer = model.momentum_buffers[moved];
    check<Refused>(have_same_layout(buffer, p), kTrainSteps, ": momentum_buffers[", moved,
                   "]: expected a contiguous tensor like params[", i, "], ", Shape(p), " ", DtypeName(p), " on ",
                   DeviceName(p), ", got ", Shape(buffer), " ", DtypeName(buffer), " on ", DeviceName(buffer));
    ++moved;
  }
  check_length("momentum_buffers", model.momentum_buffers.size(), moved, "params with momentum");
  check_length("first_step", model.first_step.size(), moved, "momentum_buffers");
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
    check_device<Refused>(kTrainSteps, "labels", y, "params[0]", weight);
    check<Refused>(has_class_indices(y), kTrainSteps,
                   ": labels: expected class indices of dtype int64, int32 or uint8, got ", DtypeName(y));
    check<Refused>(y.dim() == 1 && y.size(0) == image_count, kTrainSteps, ": labels: expected shape [", image_count,
                   "], one for each of images ", Shape(x), ", got ", Shape(y));
    labels = made_contiguous(y);
    if (!permutation) return;
    check_device<Refused>(kTrainSteps, "order", *permutation, "params[0]", weight);
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
    check_device<Refused>(kTrainSteps, "images", t, "params[0]", weight);
    check<Refused>(t.dim() >= 1 && t.dim() <= kMaxDims && (pixels || t.scalar_type() == weight.scalar_type()),
                   kTrainSteps, ": images: expected a tensor of uint8 or of the dtype of params[0], ",
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
void check_apart(const Model& model, const Tensor& images) {
  const auto params = static_cast<int32_t>(model.params.size());
  const auto buffers = static_cast<int32_t>(model.momentum_buffers.size());
  std::vector<Extent> extents;
  extents.reserve(params + buffers + 2);
  for (int32_t i = 0; i < params; ++i) extents.push_back(extent_of(model.params[i], i, true));
  for (int32_t i = 0; i < buffers; ++i) extents.push_back(extent_of(model.momentum_buffers[i], params + i, true));
  const int32_t of_images = params + buffers, of_class_weight = of_images + 1;
  extents.push_back(extent_of(images, of_images, false));
  if (const auto& weight = model.settings.class_weight) extents.push_back(extent_of(*weight, of_class_weight, false));
  const auto found = overlapping(extents);
  if (!found) return;
  const auto name = [&](const Extent& e) -> std::string {
    if (e.number == of_images) return "images";
    if (e.number == of_class_weight) return "class_weight";
    if (e.number >= params) return "momentum_buffers[" + std::to_string(e.number - params) + "]";
    return "params[" + std::to_string(e.number) + "]";
  };
  fail<Refused>(kTrainSteps, ": ", name(found->second), " and ", name(found->first),
                " share memory: an update in place needs tensors of their own");
}

template <class T>
std::vector<TrainedLayer<T>> trained_layers(const Model& model) {
  const TrainStepSettings& settings = model.settings;
  std::vector<TrainedParameter<T>> params;
  params.reserve(model.params.size());
  std::size_t moved = 0;
  for (std::size_t i = 0; i < model.params.size(); ++i) {
    TrainedParameter<T> param = {data_of<T>(model.params[i]), nullptr, static_cast<int>(settings.groups[i]), false};
    if (settings.has_momentum(i)) {
      param.momentum_buffer = data_of<T>(model.momentum_buffers[moved]);
      param.first_step = model.first_step[moved++];
    }
    params.push_back(param);
  }
  std::vector<TrainedLayer<T>> layers;
  layers.reserve(settings.layers());
  std::size_t bias = settings.layers();
  for (std::size_t l = 0; l < settings.layers(); ++l) {
    layers.push_back({.in_features = model.weight(l).size(1),
                      .out_features = model.weight(l).size(0),
                      .weight = params[l],
                      .bias = settings.bias[l] ? params[bias++] : TrainedParameter<T>{nullptr, nullptr, kFrozen, false},
                      .relu = settings.relu[l]});
  }
  return layers;
}

template <class T>
BadExample run(const TrainSteps<T>& steps, TrainStepHandle& held, const Tensor& like) {
  OnDevice device(like);
  const Launch launch = device.launch();
  const int64_t bytes = kernels<T>().train_steps_workspace_bytes(steps);
  const auto is_capturing = kernel_table().is_capturing;
  // What the caller captures uses memory of the capture, and may run when ours is gone.
  if (!held.graph || bytes > kLargestHeld || (is_capturing && is_capturing(launch))) {
    return kernels<T>().train_steps(steps, device.workspace(bytes), nullptr, launch);
  }
  const std::lock_guard lock(held.mutex);
  return kernels<T>().train_steps(steps, held.workspace_for(like, launch.stream, bytes), held.graph.get(), launch);
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

Tensor train_steps(int64_t handle, const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order,
                   int64_t batch_size, const std::vector<double>& lr, const std::vector<Tensor>& params,
                   const std::vector<Tensor>& momentum_buffers, const std::vector<bool>& first_step) {
  const auto step = train_step_of(handle);
  const TrainStepSettings& settings = step->settings;
  const Model model = {settings, params, momentum_buffers, first_step};
  check_model(model);
  check<Refused>(batch_size >= 0, kTrainSteps, ": batch_size: expected at least 0, got ", batch_size);
  const Tensor& first = params[0];
  const Examples examples(images, labels, order, first);
  const std::optional<Tensor>& class_weight = settings.class_weight;
  if (class_weight) {
    const int64_t classes = model.weight(settings.layers() - 1).size(0);
    check_operand<Refused>(
        kTrainSteps, "class_weight", *class_weight, "params[0]", first,
        class_weight->dim() == 1 && class_weight->size(0) == classes && class_weight->is_contiguous(), "shape [",
        classes, "], contiguous");
  }
  check_apart(model, examples.images);
  Tensor losses;
  dispatch_float_or_double(first, [&](auto zero) {
    using T = decltype(zero);
    TrainSteps<T> steps = {
        .layers = trained_layers<T>(model),
        .source = examples.source<T>(settings.scale, settings.shift),
        .examples = examples.count(),
        .batch_size = batch_size > 0 ? batch_size : std::max<int64_t>(examples.count(), 1),
        .class_weight = class_weight ? static_cast<const T*>(class_weight->const_data_ptr()) : nullptr,
        .ignore_index = settings.ignore_index,
        .label_smoothing = settings.label_smoothing,
        .reduction = settings.reduction,
        .groups = settings.options,
        .lr = lr.data(),
        .losses = nullptr};
    check<Refused>(lr.size() == steps.steps() * steps.groups.size(), kTrainSteps, ": lr: expected ", steps.steps(),
                   " steps times ", steps.groups.size(), " groups, got ", lr.size());
    const int64_t sizes[] = {steps.steps()};
    losses = empty(first, dtype_of(first), sizes, batch_size > 0 ? 1 : 0);
    steps.losses = data_of<T>(losses);
    check_example(steps, run(steps, *step, first));
  });
  return losses;
}

}  // namespace

void implement_train_steps(Library& m) {
  m.impl("train_steps", TORCH_BOX(&train_steps));
  m.impl("new_train_step", TORCH_BOX(&new_train_step));
  m.impl("free_train_step", TORCH_BOX(&free_train_step));
}

}  // namespace mnist_ext::ops
