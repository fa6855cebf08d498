// What the CUDA kernels share: element types, tiles in shared memory, and the product of two tiles.
//
// Everything that is not plain C++ stands behind a function of this file. tests/cuda_host offers
// the same functions for the host, where every thread of a block is a fiber: the kernels' own
// source runs on a machine without a GPU, and its indexing, masks and barriers are tested there.
#pragma once

#include <string.h>

#include <type_traits>

#include "launch.h"

#ifdef PGN_FAST_CUDA_HOST
#include "cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pgn_fast::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(float16 x) { return __half2float(x); }
__device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(uint8_t x) { return static_cast<float>(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline float16 from_float<float16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Calls `function` with a zero of the C++ type that `dtype` names.
template <typename Function>
cudaError_t with_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::float16:
      return function(float16{});
    case DType::bfloat16:
      return function(bfloat16{});
  }
  return cudaErrorInvalidValue;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifndef PGN_FAST_CUDA_HOST
// --- the device's own instructions ---------------------------------------------------------------
__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// 2^x on the special function unit alone: exp2f and __expf spend three more instructions on
// results below 2^-126, which weigh nothing beside a row's largest weight
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x in one instruction, wrong in the last bit at most; a division calls a function
__device__ inline float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory in the background; those past `bytes` become zero
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// until at most kPending groups of this thread's copies are under way
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c[16 x 8] += a[16 x 16] b[16 x 8] over a warp
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);
template <>
__device__ inline void multiply_add<bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(1024) char bytes[];
  return bytes;
}

// The runtime keeps a call's error until it is asked for: unasked, the next launch would report it.
inline cudaError_t without_trace(cudaError_t error) {
  cudaGetLastError();
  return error;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (error != cudaSuccess) return without_trace(error);
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}
#endif

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
__device__ inline float fast_exp(float x) { return fast_exp2(x * kLog2e); }

// Two numbers in one register, the first in the lower half.
template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_id() { return threadIdx.x / 32; }

// kLanes neighboring lanes, a power of two, all get the result
template <int kLanes>
__device__ inline float lanes_max(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
template <int kLanes>
__device__ inline float lanes_sum(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Elements between the rows of a tile in shared memory: 16 bytes more than the row, so that the
// eight rows that one load_matrices reads lie in different banks.
template <typename T>
__host__ __device__ constexpr int tile_stride(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}

// Fills a kRows x kColumns tile, zeros past `rows` and `columns`; row_pointer(r) is where the
// source row r starts. Copies run in the background (commit_copies, wait_copies, __syncthreads)
// where `aligned`: every source row starts at a multiple of 16 bytes.
template <typename T, int kRows, int kColumns, int kThreads, typename RowPointer>
__device__ inline void load_rows(T* tile, RowPointer row_pointer, int64_t rows, int64_t columns,
                                 bool aligned) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kPerRow = kColumns / kVector;
  static_assert(kColumns % kVector == 0, "a tile's row is a whole number of 16-byte vectors");
  for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * kVector;
    T* out = tile + row * tile_stride<T>(kColumns) + column;
    int64_t valid = row < rows ? columns - column : 0;
    valid = valid < 0 ? 0 : valid > kVector ? kVector : valid;
    const T* in = valid > 0 ? row_pointer(row) + column : row_pointer(0);
    if (aligned) {
      copy_async(out, in, static_cast<int>(valid * sizeof(T)));
    } else {
      for (int j = 0; j < kVector; ++j) out[j] = j < valid ? in[j] : from_float<T>(0.0f);
    }
  }
}

// The same from a row-major matrix.
template <typename T, int kRows, int kColumns, int kThreads>
__device__ inline void load_tile(T* tile, const T* matrix, int64_t stride, int64_t rows,
                                 int64_t columns, bool aligned) {
  load_rows<T, kRows, kColumns, kThreads>(
      tile, [=](int row) { return matrix + row * stride; }, rows, columns, aligned);
}

inline bool aligned16(const void* pointer, int64_t stride, size_t size) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size % 16 == 0;
}

// How the inner dimension k lies in an operand's tile: along the rows or down the columns.
enum class Inner { along, down };

// Accumulators of a warp: kM x kN blocks of 16 x 8. Lane l owns in each block row l / 4 (elements 0
// and 1) and row l / 4 + 8 (2 and 3), columns l % 4 * 2 and the next: the layout of mma.m16n8.
template <int kM, int kN>
struct Accumulators {
  float block[kM][kN][4];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) block[m][n][i] = 0.0f;
  }
  static __device__ int row(int m, int i) { return m * 16 + i / 2 * 8 + lane_id() / 4; }
  static __device__ int column(int n, int i) { return n * 8 + lane_id() % 4 * 2 + i % 2; }
};

// A 16 x 16 block of the left operand, for a warp.
template <typename T, Inner kInner>
__device__ inline void load_left(uint32_t (&a)[4], const T* tile, int stride, int m, int k) {
  const int lane = lane_id();
  if constexpr (kInner == Inner::along) {
    load_matrices(a, tile + (m + lane % 16) * stride + k + lane / 16 * 8);
  } else {
    load_matrices_transposed(a,
                             tile + (k + lane % 8 + lane / 16 * 8) * stride + m + lane / 8 % 2 * 8);
  }
}

// Two neighboring 16 x 8 blocks of the right operand: b[0], b[1] the first, b[2], b[3] the second.
template <typename T, Inner kInner>
__device__ inline void load_right(uint32_t (&b)[4], const T* tile, int stride, int n, int k) {
  const int lane = lane_id();
  if constexpr (kInner == Inner::along) {
    load_matrices(b, tile + (n + lane % 8 + lane / 16 * 8) * stride + k + lane / 8 % 2 * 8);
  } else {
    load_matrices_transposed(b, tile + (k + lane % 16) * stride + n + lane / 16 * 8);
  }
}

// sums += left[16 kM x kInnerSize] right[kInnerSize x 8 kN] of one warp, from shared memory. 16-bit
// numbers use the tensor cores; float32 multiplies in float32, never in TF32.
template <typename T, Inner kLeft, Inner kRight, int kInnerSize, int kM, int kN>
__device__ inline void multiply_tiles(Accumulators<kM, kN>& sums, const T* left, int left_stride,
                                      const T* right, int right_stride) {
  if constexpr (sizeof(T) == 2) {
    static_assert(kN % 2 == 0 && kInnerSize % 16 == 0, "blocks of 16 x 16");
#pragma unroll
    for (int k = 0; k < kInnerSize; k += 16) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) load_left<T, kLeft>(a[m], left, left_stride, m * 16, k);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        load_right<T, kRight>(b, right, right_stride, n * 8, k);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply_add<T>(sums.block[m][n], a[m], b[0], b[1]);
          multiply_add<T>(sums.block[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  } else {
    const int row = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll 4
    for (int k = 0; k < kInnerSize; ++k) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        float a[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int r = m * 16 + i * 8 + row;
          a[i] = left[kLeft == Inner::along ? r * left_stride + k : k * left_stride + r];
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int c = n * 8 + column + j;
            const float b =
                right[kRight == Inner::along ? c * right_stride + k : k * right_stride + c];
            sums.block[m][n][j] = fmaf(a[0], b, sums.block[m][n][j]);
            sums.block[m][n][2 + j] = fmaf(a[1], b, sums.block[m][n][2 + j]);
          }
        }
      }
    }
  }
}

// sums += left right, where the left operand is a warp's own 16 x 8 kInner accumulators. 16-bit
// numbers go from register to register (an accumulator's layout is a left operand's); float32 takes
// the way through `scratch`, 16 rows of shared memory that belong to this warp.
template <typename T, int kInnerBlocks, int kN>
__device__ inline void multiply_accumulators(Accumulators<1, kN>& sums,
                                             const Accumulators<1, kInnerBlocks>& left,
                                             const T* right, int right_stride, T* scratch) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kInnerBlocks; k += 2) {
      const float (&x)[4] = left.block[0][k], (&y)[4] = left.block[0][k + 1];
      const uint32_t a[4] = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(y[0], y[1]),
                             pack<T>(y[2], y[3])};
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        load_right<T, Inner::down>(b, right, right_stride, n * 8, k * 8);
        multiply_add<T>(sums.block[0][n], a, b[0], b[1]);
        multiply_add<T>(sums.block[0][n + 1], a, b[2], b[3]);
      }
    }
  } else {
    constexpr int kStride = tile_stride<T>(kInnerBlocks * 8);
    __syncwarp();  // the product before is read
#pragma unroll
    for (int n = 0; n < kInnerBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scratch[left.row(0, i) * kStride + left.column(n, i)] = left.block[0][n][i];
      }
    __syncwarp();
    multiply_tiles<T, Inner::along, Inner::down, kInnerBlocks * 8>(sums, scratch, kStride, right,
                                                                   right_stride);
  }
}

// out[i] = sum of partial[s, i] over the splits, in their order: the same bits in every run.
template <typename T>
__global__ void __launch_bounds__(256)
    add_splits_kernel(const float* partial, T* out, int splits, int64_t size) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) sum += partial[s * size + i];
  out[i] = from_float<T>(sum);
}
template <typename T>
cudaError_t add_splits(const void* partial, void* out, int splits, int64_t size,
                       cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  return launch(add_splits_kernel<T>, dim3(ceil_div(size, 256)), 256, 0, stream,
                static_cast<const float*>(partial), static_cast<T*>(out), splits, size);
}

}  // namespace pgn_fast::cuda
