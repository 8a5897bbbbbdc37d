// What only compute capability 9.0 has (architecture sm_90a): copies of tiles by the Tensor Memory Accelerator,
// barriers in shared memory that count their bytes, and matrix products of four warps that run beside them. One
// instruction to a function; the names are the PTX ISA's.
#pragma once

#include "tensor_cores.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#else
#include <hopper.h>
#endif

namespace mnist_ext::cuda {

__device__ inline uint32_t shared_address(const void* place) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
#else
  return emulator::shared_address(place);
#endif
}

// An mbarrier in shared memory. A phase ends when that many have arrived and all expected bytes have.
struct Barrier {
  uint64_t word;

  __device__ void init(unsigned arrivals) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(&word)), "r"(arrivals) : "memory");
#else
    emulator::mbarrier_init(&word, arrivals);
#endif
  }

  // Arrives, and adds to the bytes that this phase waits for.
  __device__ void arrive_expecting(unsigned bytes) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(shared_address(&word)), "r"(bytes)
                 : "memory");
#else
    emulator::mbarrier_arrive_expect_tx(&word, bytes);
#endif
  }

  __device__ void arrive() {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(&word)) : "memory");
#else
    emulator::mbarrier_arrive(&word);
#endif
  }

  // Waits until the phase of this parity has ended; the one before the first, of parity 1, has.
  __device__ void wait(unsigned parity) {
#ifdef __CUDACC__
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}"
        :
        : "r"(shared_address(&word)), "r"(parity)
        : "memory");
#else
    emulator::mbarrier_wait(&word, parity);
#endif
  }
};

// Makes initialised barriers known to copies; a barrier of the block follows.
__device__ inline void fence_barrier_init() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
#endif
}

// Copies of tiles

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

inline constexpr int kSwizzleBytes = 128;  // of a row of a box, whose 16-byte chunks are permuted within 8 rows

// Of a matrix: `rows` of `row_size` contiguous elements, `stride` bytes apart, copied in boxes of box_rows by 128
// bytes; what lies beyond the matrix comes as 0. Floats are converted to TF32 on their way.
template <class T>
TensorMap tensor_map(const T* data, int64_t row_size, int64_t rows, int64_t stride, int box_rows) {
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
                                                  : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  const CUresult result =
      encode(&map, dtype, 2, const_cast<T*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("mnist_ext: cuTensorMapEncodeTiled: CUDA error " + std::to_string(result));
  }
#else
  map = {data, row_size, rows, stride, box_rows, static_cast<int>(sizeof(T))};
#endif
  return map;
}

// Starts the copy of the box at (column, row) to shared memory; its bytes count at the barrier.
__device__ inline void copy_box(void* shared, const TensorMap& map, int column, int row, Barrier& barrier) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               :
               : "r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier.word))
               : "memory");
#else
  emulator::start_box_copy(shared, map, column, row, &barrier.word);
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

// Of a matrix that copy_box has brought in, from `place` on (PTX ISA, "Matrix Descriptor Format"). K along the rows:
// groups of 8 rows follow each other every 1024 bytes. K across the rows: the same, and 64 outer further the next box
// begins.
template <Major kMajor>
__device__ uint64_t wgmma_descriptor(const void* place) {
  constexpr uint64_t kStride = 8 * kSwizzleBytes, kLeading = kMajor == Major::k ? 16 : 64 * kSwizzleBytes;
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
// The registers of d, 4 to each tile of 8 columns, and their places among the operands of the asm statement.
#define MNIST_EXT_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MNIST_EXT_D16(i) MNIST_EXT_D4(i), MNIST_EXT_D4(i + 1), MNIST_EXT_D4(i + 2), MNIST_EXT_D4(i + 3)
#define MNIST_EXT_D64(i) MNIST_EXT_D16(i), MNIST_EXT_D16(i + 4), MNIST_EXT_D16(i + 8), MNIST_EXT_D16(i + 12)
#define MNIST_EXT_D128 MNIST_EXT_D64(0), MNIST_EXT_D64(16)
#define MNIST_EXT_0_TO_63                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MNIST_EXT_0_TO_127                                                                       \
  MNIST_EXT_0_TO_63                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// One instruction each: d = a * b^T, or added to it. PTX ISA, "wgmma.mma_async": after a and b come scale-d, which says
// whether d is added to; imm-scale-a and -b, 1; and for half dtypes imm-trans-a (of an a in shared memory, 0: its major
// index is K) and imm-trans-b (1: b's major index is the outer one).
template <class T, Major kMajorB>
__device__ void wgmma_n128(float (&d)[16][4], uint64_t a, uint64_t b, int add) {
#define MNIST_EXT_WGMMA(types, transposed)                                                                         \
  asm volatile(                                                                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned.m64n128" types " {" MNIST_EXT_0_TO_63 "}, %64, %65, p, 1, 1" transposed ";\n}" \
      : MNIST_EXT_D64(0)                                                                                           \
      : "l"(a), "l"(b), "r"(add), "n"(kMajorB == Major::outer))
  if constexpr (std::is_same_v<T, BFloat16>) MNIST_EXT_WGMMA("k16.f32.bf16.bf16", ", 0, %67");
  if constexpr (std::is_same_v<T, Float16>) MNIST_EXT_WGMMA("k16.f32.f16.f16", ", 0, %67");
  if constexpr (std::is_same_v<T, float>) MNIST_EXT_WGMMA("k8.f32.tf32.tf32", "");
#undef MNIST_EXT_WGMMA
}
template <class T, Major kMajorB>
__device__ void wgmma_n256(float (&d)[32][4], uint64_t a, uint64_t b, int add) {
#define MNIST_EXT_WGMMA(types, transposed)                                                                            \
  asm volatile(                                                                                                       \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                                   \
      "wgmma.mma_async.sync.aligned.m64n256" types " {" MNIST_EXT_0_TO_127 "}, %128, %129, p, 1, 1" transposed ";\n}" \
      : MNIST_EXT_D128                                                                                                \
      : "l"(a), "l"(b), "r"(add), "n"(kMajorB == Major::outer))
  if constexpr (std::is_same_v<T, BFloat16>) MNIST_EXT_WGMMA("k16.f32.bf16.bf16", ", 0, %131");
  if constexpr (std::is_same_v<T, Float16>) MNIST_EXT_WGMMA("k16.f32.f16.f16", ", 0, %131");
  if constexpr (std::is_same_v<T, float>) MNIST_EXT_WGMMA("k8.f32.tf32.tf32", "");
#undef MNIST_EXT_WGMMA
}
template <class T, Major kMajorB>
__device__ void wgmma_n128(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, int add) {
#define MNIST_EXT_WGMMA(types)                                            \
  asm volatile(                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                        \
      "wgmma.mma_async.sync.aligned.m64n128" types " {" MNIST_EXT_0_TO_63 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"                    \
      : MNIST_EXT_D64(0)                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kMajorB == Major::outer))
  if constexpr (std::is_same_v<T, BFloat16>) MNIST_EXT_WGMMA("k16.f32.bf16.bf16");
  if constexpr (std::is_same_v<T, Float16>) MNIST_EXT_WGMMA("k16.f32.f16.f16");
#undef MNIST_EXT_WGMMA
}
template <class T, Major kMajorB>
__device__ void wgmma_n256(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b, int add) {
#define MNIST_EXT_WGMMA(types)                                             \
  asm volatile(                                                            \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"                        \
      "wgmma.mma_async.sync.aligned.m64n256" types " {" MNIST_EXT_0_TO_127 \
      "}, {%128, %129, %130, %131}, %132, p, 1, 1, %134;\n}"               \
      : MNIST_EXT_D128                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kMajorB == Major::outer))
  if constexpr (std::is_same_v<T, BFloat16>) MNIST_EXT_WGMMA("k16.f32.bf16.bf16");
  if constexpr (std::is_same_v<T, Float16>) MNIST_EXT_WGMMA("k16.f32.f16.f16");
#undef MNIST_EXT_WGMMA
}
#undef MNIST_EXT_D4
#undef MNIST_EXT_D16
#undef MNIST_EXT_D64
#undef MNIST_EXT_D128
#undef MNIST_EXT_0_TO_63
#undef MNIST_EXT_0_TO_127
#endif

// d = a * b^T, or added to it, for a of 64 rows and b of 8 * kTiles, both 32 bytes of K: 16 elements of a half dtype,
// or 8 floats, of which the instruction drops what TF32 has no bits for, and which must lie along K. Four warps
// together. a: a descriptor, with K as its major index; or, of a half dtype, fragments, of which each warp holds 16
// rows as for mma. Lane 4 r + c of warp w holds columns 8 j + 2 c and 8 j + 2 c + 1 of rows 16 w + r (d[j][0], d[j][1])
// and r + 8 (d[j][2], d[j][3]). Nothing of d, a and b may be touched until wgmma_wait_group.
template <class T, Major kMajorB, int kTiles, class A>
__device__ void wgmma(float (&d)[kTiles][4], const A& a, uint64_t b, bool add) {
  static_assert(kTiles == 16 || kTiles == 32);
  static_assert(sizeof(T) == 2 || (kMajorB == Major::k && std::is_same_v<A, uint64_t>));
#ifdef __CUDACC__
  if constexpr (kTiles == 16) wgmma_n128<T, kMajorB>(d, a, b, add);
  if constexpr (kTiles == 32) wgmma_n256<T, kMajorB>(d, a, b, add);
#else
  emulator::wgmma<T>(&d[0][0], kTiles, a, b, add, kMajorB == Major::outer);
#endif
}

}  // namespace mnist_ext::cuda
