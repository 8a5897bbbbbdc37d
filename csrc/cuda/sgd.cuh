// Stochastic gradient descent: many parameters in one launch, a chunk of one of them to each block.
#pragma once

#include "../api/sgd.h"
#include "device/elements.cuh"

namespace mnist_ext::cuda {

inline constexpr unsigned kSgdThreads = 256;
inline constexpr int64_t kSgdChunk = 16384;  // elements of a block
inline constexpr int kSgdTensors = 96;       // what the 4 KB of a kernel's arguments hold

template <class T>
struct SgdWork {
  SgdTensor<T> tensors[kSgdTensors];
  unsigned first_block[kSgdTensors];  // of each tensor
  int count;
  SgdOptions options;
  const double* lr;  // null, or in device memory: instead of that of options
};

// The operations of ../cpu/sgd.h, in its order. `fma` keeps them from being contracted otherwise.
template <class T, int N>
__device__ void sgd_elements(const SgdOptions& options, Pack<T, N>& p, Pack<T, N> g, Pack<T, N>* buffer) {
  using A = ComputeType<T>;
  // PyTorch's add rounds its alpha to T, its mul does not round its factor.
  const A minus_lr = rounded<T>(static_cast<A>(-options.lr));
  const A weight_decay = rounded<T>(static_cast<A>(options.weight_decay));
  const A of_gradient = rounded<T>(static_cast<A>(1 - options.dampening));
  const A nesterov = rounded<T>(static_cast<A>(options.momentum)), momentum = static_cast<A>(options.momentum);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    A x = options.maximize ? -g.at[k] : g.at[k];
    if (options.weight_decay != 0) x = rounded<T>(fma(p.at[k], weight_decay, x));
    if (buffer) {
      A b = x;
      // 0 is added so that the product is rounded by itself.
      if (!options.first_step) b = rounded<T>(fma(x, of_gradient, rounded<T>(fma(buffer->at[k], momentum, A(-0.0)))));
      buffer->at[k] = b;
      x = options.nesterov ? rounded<T>(fma(b, nesterov, x)) : b;
    }
    p.at[k] = fma(x, minus_lr, p.at[k]);
  }
}

template <class T, int N>
__device__ void sgd_at(const SgdTensor<T>& t, const SgdOptions& options, int64_t i) {
  Pack<T, N> p = load_pack<T, N>(t.param + i), buffer;
  const bool momentum = t.momentum_buffer != nullptr;
  if (momentum && !options.first_step) buffer = load_pack<T, N>(t.momentum_buffer + i);
  sgd_elements<T, N>(options, p, load_pack<T, N>(t.grad + i), momentum ? &buffer : nullptr);
  if (momentum) store_pack(t.momentum_buffer + i, buffer);
  store_pack(t.param + i, p);
}

template <class T>
__global__ void __launch_bounds__(kSgdThreads) sgd_kernel(const SgdWork<T> work) {
  int which = work.count - 1;
  while (blockIdx.x < work.first_block[which]) --which;
  SgdOptions options = work.options;
  if (work.lr) options.lr = *work.lr;
  const SgdTensor<T>& t = work.tensors[which];
  const int64_t begin = (blockIdx.x - work.first_block[which]) * kSgdChunk;
  const int64_t end = begin + kSgdChunk < t.size ? begin + kSgdChunk : t.size;
  const bool aligned = elements_past_alignment(t.param) == 0 && elements_past_alignment(t.grad) == 0 &&
                       (!t.momentum_buffer || elements_past_alignment(t.momentum_buffer) == 0);
  constexpr int kSize = kPack<T>;
  const int64_t packs = aligned ? (end - begin) / kSize : 0;
  for (int64_t i = threadIdx.x; i < packs; i += kSgdThreads) sgd_at<T, kSize>(t, options, begin + i * kSize);
  for (int64_t i = begin + packs * kSize + threadIdx.x; i < end; i += kSgdThreads) sgd_at<T, 1>(t, options, i);
}

template <class T>
void sgd_step(const SgdTensor<T>* tensors, int64_t count, const SgdOptions& options, const double* lr,
              cudaStream_t stream) {
  SgdWork<T> work{};
  work.options = options;
  work.lr = lr;
  int64_t blocks = 0;
  const auto start = [&] {
    if (blocks > 0) launch("sgd_step", sgd_kernel<T>, Shape{static_cast<unsigned>(blocks), kSgdThreads}, stream, work);
    work.count = 0;
    blocks = 0;
  };
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t more = (tensors[i].size + kSgdChunk - 1) / kSgdChunk;
    if (more == 0) continue;
    if (work.count == kSgdTensors || blocks + more > kMaxBlocks) start();
    work.tensors[work.count] = tensors[i];
    work.first_block[work.count++] = static_cast<unsigned>(blocks);
    blocks += more;
  }
  start();
}

}  // namespace mnist_ext::cuda
