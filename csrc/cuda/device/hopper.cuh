// What only compute capability 9.0 has (architecture sm_90a): copies of tiles by the Tensor Memory Accelerator,
// barriers in shared memory that count their bytes, and matrix products of four warps that run beside them. One
// instruction to a function; the names are the PTX ISA's.
#pragma once

#include "elements.cuh"
#include "../product/tiles.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#else
#include <hopper.h>
#endif

namespace mnist_ext::cuda {

// mbarrier

__device__ inline uint32_t shared_address(const void* place) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
#else
  return emulator::shared_address(place);
#endif
}

// A phase of the barrier ends when that many have arrived and all expected bytes have.
__device__ inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
  emulator::mbarrier_init(barrier, arrivals);
#endif
}

// Makes the barriers known to copies and to the cluster; a barrier of the cluster follows.
__device__ inline void mbarrier_init_fence() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
#endif
}

// Arrives, and adds to the bytes that this phase waits for.
__device__ inline void mbarrier_arrive_expect_tx(uint64_t* barrier, unsigned bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  emulator::mbarrier_arrive_expect_tx(barrier, bytes);
#endif
}

// Arrives at the barrier that lies here in the shared memory of block `rank` of the cluster.
__device__ inline void mbarrier_arrive(uint64_t* barrier, unsigned rank) {
#ifdef __CUDACC__
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}"
      :
      : "r"(shared_address(barrier)), "r"(rank)
      : "memory");
#else
  emulator::mbarrier_arrive(barrier, rank);
#endif
}

// Waits until the phase of this parity has ended; the one before the first, of parity 1, has.
__device__ inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}"
      :
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#else
  emulator::mbarrier_wait(barrier, parity);
#endif
}

// Copies of tiles

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

inline constexpr int kSwizzleBytes = 128;  // of a row of a box, whose 16-byte chunks are permuted within 8 rows

// Of a matrix: `rows` of `row_size` elements side by side, `stride` bytes apart, copied in boxes of box_rows by 128
// bytes; what lies beyond the matrix comes as 0. in_tf32: floats are converted to TF32 on their way.
template <class T>
TensorMap tensor_map(const T* data, int64_t row_size, int64_t rows, int64_t stride, int box_rows, bool in_tf32) {
  TensorMap map;
#ifdef __CUDACC__
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // of the driver, which the library is not linked to
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
          "cudaGetDriverEntryPoint");
#endif
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("mnist_ext: no cuTensorMapEncodeTiled in the CUDA driver");
    return reinterpret_cast<Encode>(function);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(row_size), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[] = {kSwizzleBytes / sizeof(T), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const auto dtype = std::is_same_v<T, BFloat16>  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                     : std::is_same_v<T, Float16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                     : in_tf32                    ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUresult result =
      encode(&map, dtype, 2, const_cast<T*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("mnist_ext: cuTensorMapEncodeTiled: CUDA error " + std::to_string(result));
  }
#else
  map = {data, row_size, rows, stride, box_rows, static_cast<int>(sizeof(T)), in_tf32 && sizeof(T) == 4};
#endif
  return map;
}

__device__ inline void prefetch_tensor_map(const TensorMap& map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
#endif
}

// Starts the copy of the box at (column, row) to here in the shared memory of each block of the cluster whose bit is
// set in `blocks`, or, where none is, of this block; its bytes count at the barrier that lies at `barrier` in the same
// block.
__device__ inline void copy_box(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier,
                                unsigned blocks) {
#ifdef __CUDACC__
  if (blocks == 0) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :
        : "r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;"
        :
        : "r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)),
          "h"(static_cast<uint16_t>(blocks))
        : "memory");
  }
#else
  emulator::start_box_copy(shared, map, column, row, barrier, blocks);
#endif
}

// Registers of a warpgroup, of the 168 that each of three starts with.

template <int kRegisters>
__device__ void setmaxnreg_dec() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ void setmaxnreg_inc() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}

// wgmma

// Of a matrix that copy_box has brought in, from `place` on (PTX ISA, "Matrix Descriptor Format"). Depth along the
// rows: groups of 8 rows follow each other every 1024 bytes. Depth across the rows: the same, and 64 outer further the
// next box begins.
template <Major kMajor>
__device__ uint64_t wgmma_descriptor(const void* place) {
  constexpr uint64_t kStride = 8 * kSwizzleBytes, kLeading = kMajor == Major::depth ? 16 : 64 * kSwizzleBytes;
  constexpr uint64_t kSwizzle128 = 1;
  return (shared_address(place) & 0x3ffff) >> 4 | kLeading >> 4 << 16 | kStride >> 4 << 32 | kSwizzle128 << 62;
}

// The registers that follow are written and ready.
__device__ inline void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#else
  emulator::wgmma_fence();
#endif
}

__device__ inline void wgmma_commit_group() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
#else
  emulator::wgmma_commit_group();
#endif
}

// For all but the last kGroups groups.
template <int kGroups>
__device__ void wgmma_wait_group() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kGroups) : "memory");
#else
  emulator::wgmma_wait_group(kGroups);
#endif
}

#ifdef __CUDACC__
// The instruction names all its registers: d's come first, 64 or 128, then b, add, b's major index, and a.
#define MNIST_EXT_D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MNIST_EXT_D4(i) MNIST_EXT_D(i), MNIST_EXT_D(i + 1), MNIST_EXT_D(i + 2), MNIST_EXT_D(i + 3)
#define MNIST_EXT_D128 MNIST_EXT_D4(0), MNIST_EXT_D4(4), MNIST_EXT_D4(8), MNIST_EXT_D4(12)
#define MNIST_EXT_D256 MNIST_EXT_D128, MNIST_EXT_D4(16), MNIST_EXT_D4(20), MNIST_EXT_D4(24), MNIST_EXT_D4(28)
#define MNIST_EXT_D_NAMES128                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MNIST_EXT_D_NAMES256                                                                     \
  MNIST_EXT_D_NAMES128                                                                           \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MNIST_EXT_B128 "%64"
#define MNIST_EXT_B256 "%128"
#define MNIST_EXT_ADD128 "%65"
#define MNIST_EXT_ADD256 "%129"
#define MNIST_EXT_DESCRIPTOR128 "%67"
#define MNIST_EXT_DESCRIPTOR256 "%131"
#define MNIST_EXT_DESCRIPTOR_MAJORS128 "0, %66"
#define MNIST_EXT_DESCRIPTOR_MAJORS256 "0, %130"
#define MNIST_EXT_FRAGMENT128 "{%67, %68, %69, %70}"
#define MNIST_EXT_FRAGMENT256 "{%131, %132, %133, %134}"
#define MNIST_EXT_FRAGMENT_MAJORS128 "%66"
#define MNIST_EXT_FRAGMENT_MAJORS256 "%130"
#define MNIST_EXT_WGMMA(n, depth_and_types, a, majors, ...)                                           \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " MNIST_EXT_ADD##n                               \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n depth_and_types " {" MNIST_EXT_D_NAMES##n \
               "}, " a ", " MNIST_EXT_B##n ", add, 1, 1" majors ";\n}"                                \
               : MNIST_EXT_D##n                                                                       \
               : "l"(b), "r"(static_cast<int>(add)), "n"(kMajorB == Major::outer), __VA_ARGS__)
#define MNIST_EXT_WGMMA_OF_COLUMNS(n, a_kind, ...)                                            \
  if constexpr (std::is_same_v<T, BFloat16>) {                                                \
    MNIST_EXT_WGMMA(n, "k16.f32.bf16.bf16", a_kind##n, ", " a_kind##_MAJORS##n, __VA_ARGS__); \
  } else if constexpr (std::is_same_v<T, Float16>) {                                          \
    MNIST_EXT_WGMMA(n, "k16.f32.f16.f16", a_kind##n, ", " a_kind##_MAJORS##n, __VA_ARGS__);   \
  } else {                                                                                    \
    MNIST_EXT_WGMMA(n, "k8.f32.tf32.tf32", a_kind##n, "", __VA_ARGS__);                       \
  }
#define MNIST_EXT_WGMMA_OF_ANY(a_kind, ...)               \
  if constexpr (kTiles == 16) {                           \
    MNIST_EXT_WGMMA_OF_COLUMNS(128, a_kind, __VA_ARGS__); \
  } else {                                                \
    MNIST_EXT_WGMMA_OF_COLUMNS(256, a_kind, __VA_ARGS__); \
  }
#endif

// d = a * b^T, or added to it, for a of 64 rows and b of 8 * kTiles, both 32 bytes deep: 16 elements of a half dtype,
// or 8 floats, of which the instruction drops what TF32 has no bits for, and which must lie along the depth. Four warps
// together. Lane 4 r + c of warp w holds columns 8 j + 2 c and 8 j + 2 c + 1 of rows 16 w + r (d[j][0], d[j][1]) and
// r + 8 (d[j][2], d[j][3]). Nothing of d, a and b may be touched until wgmma_wait_group. a's major index is the depth.
template <class T, Major kMajorB, int kTiles>
__device__ void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add) {
  static_assert(kTiles == 16 || kTiles == 32);
  static_assert(sizeof(T) == 2 || kMajorB == Major::depth);
#ifdef __CUDACC__
  MNIST_EXT_WGMMA_OF_ANY(MNIST_EXT_DESCRIPTOR, "l"(a))
#else
  emulator::wgmma<T>(&d[0][0], kTiles, nullptr, a, b, add, kMajorB == Major::outer);
#endif
}

// With a as fragments, of which each warp holds 16 rows as for mma.
template <class T, Major kMajorB, int kTiles>
__device__ void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kTiles == 16 || kTiles == 32);
  static_assert(sizeof(T) == 2 || kMajorB == Major::depth);
#ifdef __CUDACC__
  MNIST_EXT_WGMMA_OF_ANY(MNIST_EXT_FRAGMENT, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))
#else
  emulator::wgmma<T>(&d[0][0], kTiles, a, 0, b, add, kMajorB == Major::outer);
#endif
}

}  // namespace mnist_ext::cuda
