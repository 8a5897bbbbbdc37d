// Training steps in one cluster: what a block keeps where, and the launches, some hundred steps in each.
#include <map>
#include <mutex>

#include "train_step.cuh"

namespace mnist_ext::cuda {
namespace {

// Hands out places in shared memory, aligned to 16 bytes.
class SharedPlaces {
 public:
  int take(int64_t floats) {
    const int64_t place = floats_;
    floats_ += (floats + kQuad - 1) / kQuad * kQuad;
    return static_cast<int>(place);
  }
  int64_t floats() const { return floats_; }

 private:
  int64_t floats_ = 0;
};

int64_t whole_quads(int64_t numbers) { return (numbers + kQuad - 1) / kQuad * kQuad; }

// A pitch of whole quads at which quads of the neurons 0, 2, 4 and 6 lie in different banks of shared memory: lanes
// that have them together read and write them without waiting for each other.
int64_t apart(int64_t pitch) { return pitch + (4 * kQuad + kQuad - pitch % (4 * kQuad)) % (4 * kQuad); }

// Fills in what the launches have in common. Returns the floats of each block, or -1 where `work` has no room.
int64_t plan_cluster(const TrainSteps<float>& x, unsigned cluster, ClusterWork& work) {
  constexpr int64_t kLargest = 1 << 20;  // no row of as many numbers fits, and the sums below do not overflow
  if (x.depth > kClusterLayers || x.group_count > kClusterGroups) return -1;
  const int64_t rows = x.batch_size < x.examples ? x.batch_size : x.examples;
  if (rows > kLargest) return -1;
  work = {};
  SharedPlaces places;
  work.depth = static_cast<int>(x.depth);
  work.rows = static_cast<int>(rows);
  while (work.lowest < work.depth && x.layers[work.lowest].weight.group < 0 && x.layers[work.lowest].bias.group < 0) {
    ++work.lowest;
  }
  for (int l = 0; l < work.depth; ++l) {
    const TrainedLayer<float>& from = x.layers[l];
    ClusterLayer& layer = work.layers[l];
    if (from.in_features > kLargest || from.out_features > kLargest) return -1;
    layer.weight = from.weight;
    layer.bias = from.bias;
    layer.features = static_cast<int>(from.in_features);
    layer.neurons = static_cast<int>(from.out_features);
    layer.relu = from.activation == Activation::relu;
    const int64_t slice = whole_quads((from.out_features + cluster - 1) / cluster);
    const int64_t input_pitch = whole_quads(from.in_features), output_pitch = whole_quads(from.out_features);
    layer.slice = static_cast<int>(slice);
    layer.input_pitch = static_cast<int>(input_pitch);
    layer.output_pitch = static_cast<int>(output_pitch);
    const int64_t weight_pitch = l == 0 && x.images.pixels ? apart(input_pitch) : input_pitch;
    layer.weight_pitch = static_cast<int>(weight_pitch);
    layer.weights = places.take(slice * weight_pitch);
    layer.weights_buffer = places.take(from.weight.momentum_buffer ? slice * weight_pitch : 0);
    layer.biases = places.take(slice);
    layer.biases_buffer = places.take(from.bias.momentum_buffer ? slice : 0);
    layer.columns = l > work.lowest ? places.take(work.layers[l - 1].slice * output_pitch) : -1;
    layer.outputs = places.take(rows * output_pitch);
    if (l == work.depth - 1) {  // in place of the logits
      layer.grads_of_all = true;
      layer.grads = layer.outputs;
      layer.grads_pitch = layer.output_pitch;
    } else if (l >= work.lowest) {
      layer.grads_of_all = l > work.lowest;
      layer.grads_pitch = layer.grads_of_all ? layer.output_pitch : layer.slice;
      layer.grads = places.take(rows * layer.grads_pitch);
    }
    if (places.floats() > kLargest) return -1;
  }
  if (x.images.pixels) {
    work.pixels = pixel_numbers(x.images.scale, x.images.shift);
    work.sum_rows = static_cast<int>(rows < kSumRows ? (rows + 7) / 8 * 8 : kSumRows);
    const int64_t floats = static_cast<int64_t>(kStepWarps) * work.sum_rows * kImageNeurons;
    // The second layer's outputs come only after the first layer has no more need of these sums.
    const bool beside = work.depth == 1 || rows * work.layers[1].output_pitch < floats;
    work.sums = beside ? places.take(floats) : work.layers[1].outputs;
  }
  work.row_losses = places.take(rows);
  for (int& targets : work.targets) targets = places.take(rows);
  work.barriers = places.take(2 * sizeof(CopyBarrier) / sizeof(float));

  const int64_t number_bytes = x.images.pixels ? 1 : sizeof(float);
  const int64_t bytes = x.layers[0].in_features * number_bytes, stride_bytes = x.images.row_stride * number_bytes;
  const void* images = x.images.pixels ? static_cast<const void*>(x.images.pixels) : x.images.values;
  work.bulk = bytes % 16 == 0 && stride_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(images) % 16 == 0;
  work.image_bytes = static_cast<int>((bytes + 15) / 16 * 16);
  for (int& place : work.images_at) place = places.take(rows * work.image_bytes / static_cast<int64_t>(sizeof(float)));
  work.floats = static_cast<int>(places.floats());
  return places.floats();
}

// The most blocks of a cluster, each with all of a multiprocessor's shared memory, that the current device can run: 16
// or 8, or 0 before compute capability 9.0. Asking takes longer than a step, so it is asked once for each device.
unsigned largest_cluster() {
  static std::mutex mutex;
  static std::map<int, unsigned> of_devices;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto known = of_devices.find(device);
  if (known != of_devices.end()) return known->second;
  unsigned largest = 0;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
    largest = kPortableCluster;
    const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const Shape shape = {2 * kPortableCluster, kStepThreads, 2 * kPortableCluster, room};
    if (max_active_clusters("train_steps", train_steps_kernel<uint8_t>, shape) > 0) largest = 2 * kPortableCluster;
  }
  of_devices[device] = largest;
  return largest;
}

}  // namespace

bool train_steps_in_cluster(const TrainSteps<float>& x, int64_t images, cudaStream_t stream) {
  const unsigned cluster = largest_cluster();
  if (cluster == 0) return false;
  ClusterWork work;
  const int64_t bytes = plan_cluster(x, cluster, work) * static_cast<int64_t>(sizeof(float));
  if (bytes < 0 || bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) return false;
  const double classes = static_cast<double>(x.layers[x.depth - 1].out_features);
  work.batch_size = static_cast<int>(x.batch_size < work.rows ? x.batch_size : work.rows);
  work.images = x.images;
  work.image_count = images;
  work.target = x.target;
  work.order = x.order;
  work.class_weight = x.class_weight;
  work.ignore_index = x.ignore_index;
  work.every = static_cast<float>(x.label_smoothing / classes);
  work.of_target = static_cast<float>(1 - x.label_smoothing);
  work.mean = x.reduction == Reduction::mean;
  work.group_count = static_cast<int>(x.group_count);
  for (int g = 0; g < work.group_count; ++g) work.groups[g] = x.groups[g];
  const int64_t steps = x.steps(), steps_of_launch = kClusterRates / (x.group_count < 1 ? 1 : x.group_count);
  for (int64_t step = 0; step < steps; step += steps_of_launch) {
    const int64_t count = steps - step < steps_of_launch ? steps - step : steps_of_launch;
    work.first_launch = step == 0;
    work.steps = static_cast<int>(count);
    work.first = step * x.batch_size;
    work.examples = x.examples - work.first;
    if (work.examples > count * x.batch_size) work.examples = count * x.batch_size;
    work.losses = x.losses + step;
    for (int64_t i = 0; i < count * x.group_count; ++i) {
      work.lr[i] = static_cast<float>(x.lr[step * x.group_count + i]);
    }
    const auto kernel = x.images.pixels ? train_steps_kernel<uint8_t> : train_steps_kernel<float>;
    launch("train_steps", kernel, Shape{cluster, kStepThreads, cluster, bytes}, stream, work);
  }
  return true;
}

}  // namespace mnist_ext::cuda
