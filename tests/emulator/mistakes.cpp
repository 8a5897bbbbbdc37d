// Kernels with mistakes that the emulator has to notice; tests/cuda/test_cuda_emulator.py calls them.
#include "../../csrc/cuda/device/device.cuh"
#include "library.h"

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

void misaligned() { store_vector(shared_memory() + 8, uint4{}); }

// Each thread copies one number and adds up its own, or its neighbour's.
void copied(bool wait, bool of_neighbour, const int* numbers, int* sum) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  cp_async<4>(shared + threadIdx.x, numbers + threadIdx.x);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  const int number = shared[(threadIdx.x + (of_neighbour ? 1 : 0)) % blockDim.x];
  __syncthreads();
  *sum += number;
}

void misaligned_copy(const int* numbers) { cp_async<16>(shared_memory(), numbers + 1); }

void copy_beyond() { cp_async<16>(shared_memory() + 64, nullptr, 0); }

}  // namespace

extern "C" {

EXPORTED int emulator_sum_of_copies(bool wait, bool of_neighbour) {
  alignas(16) int numbers[64];
  for (int i = 0; i < 64; ++i) numbers[i] = i;
  int sum = 0;
  launch("copied", copied, {1, 64, sizeof numbers}, nullptr, wait, of_neighbour, static_cast<const int*>(numbers),
         &sum);
  return sum;
}

EXPORTED int emulator_sum_of_neighbours(bool with_barrier) {
  int sum = 0;
  launch("sum_of_neighbours", sum_of_neighbours, {1, 64, 64 * sizeof(int)}, nullptr, with_barrier, &sum);
  return sum;
}

// These throw: tests/emulated.py reads what.
EXPORTED void emulator_deadlock() { launch("deadlock", deadlock, {1, 64}, nullptr); }
EXPORTED void emulator_overflow() { launch("overflow", overflow, {1, 8, 64}, nullptr); }
EXPORTED void emulator_misaligned() { launch("misaligned", misaligned, {1, 1, 64}, nullptr); }
EXPORTED void emulator_misaligned_copy() {
  alignas(16) const int numbers[8] = {};
  launch("misaligned_copy", misaligned_copy, {1, 1, 64}, nullptr, static_cast<const int*>(numbers));
}
EXPORTED void emulator_copy_beyond() { launch("copy_beyond", copy_beyond, {1, 1, 64}, nullptr); }

EXPORTED const char* emulator_error_of(void (*mistake)()) { return emulated::error_of(mistake); }
}
