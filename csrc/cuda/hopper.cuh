// Hopper's own instructions behind plain functions: barriers that count bytes, tensor copies (TMA)
// and warpgroup products (wgmma). tests/cuda_host has the same functions for the host.
#pragma once

#include "device.cuh"

#ifndef PGN_FAST_CUDA_HOST
#include <cuda.h>
#endif

namespace pgn_fast::cuda {

constexpr int kPanel = 64;  // 16-bit numbers in a row of 128 bytes, the widest swizzle

#ifndef PGN_FAST_CUDA_HOST
using TensorMap = CUtensorMap;

// A row-major [rows, columns] matrix of 16-bit numbers, copied in boxes of box_rows x kPanel with
// 16-byte chunks swizzled by the row: chunk c of row r lands at chunk c ^ (r % 8).
template <typename T>
cudaError_t make_tensor_map(TensorMap* map, const T* matrix, uint64_t rows, uint64_t columns,
                            uint32_t box_rows) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return without_trace(error);
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {columns, rows}, strides[1] = {columns * sizeof(T)};
  const cuuint32_t box[2] = {kPanel, box_rows}, steps[2] = {1, 1};
  const CUtensorMapDataType type = std::is_same_v<T, bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      map, type, 2, const_cast<T*>(matrix), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

using Barrier = uint64_t;

__device__ inline void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}
__device__ inline void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE_%=;\n"
      "bra WAIT_%=;\n"
      "DONE_%=:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The box whose first element is (row, column); completes `barrier` by its bytes. One thread calls.
__device__ inline void copy_box(void* shared, const TensorMap* map, Barrier* barrier, int row,
                                int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// Keeps the compiler from computing an operand later than here, between products under way.
__device__ inline void settle(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
__device__ inline void settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// sums[64 x 128] += left[64 x 16] right[16 x 128] over a warpgroup. Each warp's left operand is its
// 16 rows as for multiply_add; the right operand is a swizzled box of 128 rows n, from number k on.
#define PGN_SUM4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define PGN_SUM16(i) PGN_SUM4(i), PGN_SUM4(i + 4), PGN_SUM4(i + 8), PGN_SUM4(i + 12)
#define PGN_WGMMA(TYPE)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                   \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20," \
               "%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39," \
               "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
               "%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"                    \
               : PGN_SUM16(0), PGN_SUM16(16), PGN_SUM16(32), PGN_SUM16(48)                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right))
template <typename T>
__device__ inline void multiply_warpgroup(float (&c)[64], const uint32_t (&a)[4], const T* box,
                                          int k) {
  // start address, 1024 bytes from 8 rows to the next 8, swizzle of 128 bytes
  const uint64_t right = (static_cast<uint64_t>(shared_address(box + k) & 0x3ffff) >> 4) |
                         uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  if constexpr (std::is_same_v<T, bfloat16>) {
    PGN_WGMMA("bf16");
  } else {
    PGN_WGMMA("f16");
  }
}
#undef PGN_WGMMA
#undef PGN_SUM16
#undef PGN_SUM4

// All threads of warpgroup 0 or 1.
__device__ inline void warpgroup_barrier(int group) {
  if (group == 0) {
    asm volatile("bar.sync 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 128;" ::: "memory");
  }
}
#endif

}  // namespace pgn_fast::cuda
