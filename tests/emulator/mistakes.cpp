// Kernels with mistakes that the emulator has to notice; tests/test_cuda.py calls them.
#include "../../csrc/kernels/cuda/device.cuh"

namespace {

using namespace mnist_ext::cuda;

void sum_of_neighbours(bool with_barrier, int* sum) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (with_barrier) __syncthreads();
  const int neighbour = shared[(threadIdx.x + 1) % blockDim.x];
  __syncthreads();
  *sum += neighbour;
}

void deadlock() {
  if (threadIdx.x != 0) __syncthreads();
  __syncwarp();
}

void overflow() { shared_memory()[64 + threadIdx.x] = 0; }

}  // namespace

extern "C" {

int emulator_sum_of_neighbours(bool with_barrier) {
  int sum = 0;
  launch("sum_of_neighbours", sum_of_neighbours, {1, 64, 1, 64 * sizeof(int)}, nullptr, with_barrier, &sum);
  return sum;
}

// Both throw: tests/emulated.py reads what.
void emulator_deadlock() { launch("deadlock", deadlock, {1, 64}, nullptr); }
void emulator_overflow() { launch("overflow", overflow, {1, 8, 1, 64}, nullptr); }

const char* emulator_error_of(void (*function)()) {
  static std::string what;
  try {
    function();
  } catch (const std::exception& error) {
    return (what = error.what()).c_str();
  }
  return "";
}
}
