// Kernels with mistakes that the emulator has to notice; tests/cuda/test_cuda_emulator.py calls them.
#pragma once

#include "../../csrc/cuda/device/device.cuh"

namespace mistakes {

using namespace mnist_ext::cuda;

inline int sum_of_neighbours(bool with_barrier) {
  const auto kernel = [](bool with_barrier, int* sum) {
    int* shared = reinterpret_cast<int*>(shared_memory());
    shared[threadIdx.x] = static_cast<int>(threadIdx.x);
    if (with_barrier) __syncthreads();
    const int neighbour = shared[(threadIdx.x + 1) % blockDim.x];
    __syncthreads();
    *sum += neighbour;
  };
  int sum = 0;
  launch("sum_of_neighbours", +kernel, {1, 64, 64 * sizeof(int)}, nullptr, with_barrier, &sum);
  return sum;
}

// Each thread copies one number and adds up its own, or its neighbour's.
inline int sum_of_copies(bool wait, bool of_neighbour) {
  const auto kernel = [](bool wait, bool of_neighbour, const int* numbers, int* sum) {
    int* shared = reinterpret_cast<int*>(shared_memory());
    cp_async<4>(shared + threadIdx.x, numbers + threadIdx.x);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    const int number = shared[(threadIdx.x + (of_neighbour ? 1 : 0)) % blockDim.x];
    __syncthreads();
    *sum += number;
  };
  alignas(16) int numbers[64];
  for (int i = 0; i < 64; ++i) numbers[i] = i;
  int sum = 0;
  launch("sum_of_copies", +kernel, {1, 64, sizeof numbers}, nullptr, wait, of_neighbour,
         static_cast<const int*>(numbers), &sum);
  return sum;
}

// These throw.

inline void deadlock() {
  const auto kernel = [] {
    if (threadIdx.x != 0) __syncthreads();
    __syncwarp();
  };
  launch("deadlock", +kernel, {1, 64}, nullptr);
}

inline void overflow() {
  launch("overflow", +[] { shared_memory()[64 + threadIdx.x] = 0; }, {1, 8, 64}, nullptr);
}

inline void misaligned() {
  launch("misaligned", +[] { store_vector(shared_memory() + 8, uint4{}); }, {1, 1, 64}, nullptr);
}

inline void misaligned_copy() {
  alignas(16) static const int numbers[8] = {};
  launch("misaligned_copy", +[] { cp_async<16>(shared_memory(), numbers + 1); }, {1, 1, 64}, nullptr);
}

inline void copy_beyond() {
  launch("copy_beyond", +[] { cp_async<16>(shared_memory() + 64, nullptr, 0); }, {1, 1, 64}, nullptr);
}

}  // namespace mistakes
