// CUDA kernel of pgn_fast.ops.mix_prompts:  prompts = mixture(logits) @ token_library
//
// A block makes kRows prompt tokens x kThreads columns. Warp w owns row w: it finds the row's
// maximum and sum of exponentials in one online pass over K. Then K is walked in steps of kStep:
// the warps put the step's coefficients into shared memory, and every thread adds its column of the
// library to kRows sums, so that each library element is read once for kRows rows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace pgn_fast::cuda {
namespace {

constexpr int kRows = 8, kThreads = 256, kStep = 64;

__device__ float load(const float* p) { return *p; }
__device__ float load(const __half* p) { return __half2float(*p); }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ void store(float x, float* p) { *p = x; }
__device__ void store(float x, __half* p) { *p = __float2half_rn(x); }
__device__ void store(float x, __nv_bfloat16* p) { *p = __float2bfloat16_rn(x); }

template <typename T, bool kSoftmax>
__global__ void __launch_bounds__(kThreads)
    mix_prompts_kernel(const T* __restrict__ logits,   // [R, K]
                       const T* __restrict__ library,  // [K, D]
                       T* __restrict__ prompts,        // [R, D]
                       int64_t R, int K, int D) {
  __shared__ float coefficients[kStep][kRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = int64_t{blockIdx.x} * kRows, row = first_row + warp;
  const int d = blockIdx.y * kThreads + threadIdx.x;
  const T* z = logits + row * K;

  float largest = -INFINITY, sum = 0.0f;
  if (kSoftmax && row < R) {
    for (int k = lane; k < K; k += 32) {
      const float x = load(z + k), bound = fmaxf(largest, x);
      // a lane without a finite value yet must not form inf - inf
      sum = (sum == 0.0f ? 0.0f : sum * __expf(largest - bound)) + __expf(x - bound);
      largest = bound;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(~0u, largest, offset);
      const float other_sum = __shfl_xor_sync(~0u, sum, offset);
      const float bound = fmaxf(largest, other);
      sum = (sum == 0.0f ? 0.0f : sum * __expf(largest - bound)) +
            (other_sum == 0.0f ? 0.0f : other_sum * __expf(other - bound));
      largest = bound;
    }
  }
  const float scale = kSoftmax ? 1.0f / sum : 1.0f;

  float sums[kRows] = {};
  for (int start = 0; start < K; start += kStep) {
    __syncthreads();  // the step before is read
    for (int i = lane; i < kStep; i += 32) {
      const int k = start + i;
      float weight = 0.0f;
      if (row < R && k < K) {
        const float x = load(z + k);
        weight = kSoftmax ? __expf(x - largest) * scale : 1.0f / (1.0f + __expf(-x));
      }
      coefficients[i][warp] = weight;
    }
    __syncthreads();
    if (d < D) {
      const int steps = min(kStep, K - start);
      for (int i = 0; i < steps; ++i) {
        const float token = load(library + int64_t{start + i} * D + d);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] = fmaf(coefficients[i][r], token, sums[r]);
      }
    }
  }
  if (d < D) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first_row + r < R) store(sums[r], prompts + (first_row + r) * D + d);
    }
  }
}

template <typename T>
cudaError_t launch(const MixPrompts& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((a.R + kRows - 1) / kRows),
                  (a.D + kThreads - 1) / kThreads);
  auto kernel = a.softmax ? mix_prompts_kernel<T, true> : mix_prompts_kernel<T, false>;
  kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(a.logits),
                                        static_cast<const T*>(a.library),
                                        static_cast<T*>(a.prompts), a.R, a.K, a.D);
  return cudaGetLastError();
}

}  // namespace

cudaError_t mix_prompts(const MixPrompts& args, Number number, cudaStream_t stream) {
  if (args.R == 0 || args.D == 0) return cudaSuccess;
  switch (number) {
    case Number::float32:
      return launch<float>(args, stream);
    case Number::float16:
      return launch<__half>(args, stream);
    case Number::bfloat16:
      return launch<__nv_bfloat16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pgn_fast::cuda
