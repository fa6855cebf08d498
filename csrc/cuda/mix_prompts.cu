// CUDA kernels of pgn_fast.ops.mix_prompts:  prompts = mixture(logits) @ token_library
//
// Forward: a block of 4 warps makes kRows prompt tokens x 128 columns. It first reads its rows of
// logits for their maximum and sum of exponentials, then walks the library in steps of 32 tokens:
// the step's coefficients go to shared memory, the product to the tensor cores, and the next step's
// library rows arrive in the background. Each block of columns recomputes the coefficients, so
// nothing of size K is ever stored.
//
// Backward, logits: a block owns 16 rows. d_c[k] = <grad_prompts, library[k]> comes tile by tile;
// softmax needs sum_k c[k] d_c[k] first, so the tiles are kept in shared memory where K is at most
// kKeptTokens and made twice where it is not. The row's maximum and 1 / sum are stored for the
// library's gradient.
//
// Backward, library: grad[k, d] = sum_r c[r, k] g[r, d], a block for 64 tokens x 128 columns and a
// fixed range of rows; the ranges' float32 sums are added in a fixed order by a third kernel.
#include "device.cuh"

namespace pgn_fast::cuda {
namespace {

constexpr int kThreads = 128, kStep = 32, kColumns = 128, kTokens = 64, kKeptTokens = 512;

// Maximum and 1 / sum of exponentials of kRows rows, eight lanes a row; (0, 1) for sigmoid.
template <typename T, int kRows, bool kSoftmax>
__device__ void row_statistics(const T* logits, int64_t rows, int K, float2* statistics) {
  constexpr int kLanes = 8;
  for (int r = threadIdx.x / kLanes; r < kRows; r += kThreads / kLanes) {
    float largest = -INFINITY, sum = 0.0f;
    if (kSoftmax && r < rows) {
      for (int k = threadIdx.x % kLanes; k < K; k += kLanes) {
        const float x = to_float(logits[int64_t{r} * K + k]), bound = fmaxf(largest, x);
        // before its first finite value a lane must not form inf - inf
        sum = (sum > 0.0f ? sum * fast_exp(largest - bound) : 0.0f) +
              (x > -INFINITY ? fast_exp(x - bound) : 0.0f);
        largest = bound;
      }
    }
    const float bound = lanes_max<kLanes>(largest);
    sum = lanes_sum<kLanes>(sum > 0.0f ? sum * fast_exp(largest - bound) : 0.0f);
    if (threadIdx.x % kLanes == 0) {
      statistics[r] = kSoftmax ? make_float2(bound, 1.0f / sum) : make_float2(0.0f, 1.0f);
    }
  }
}

template <bool kSoftmax>
__device__ inline float coefficient(float logit, float2 statistics) {
  return kSoftmax ? fast_exp(logit - statistics.x) * statistics.y
                  : fast_reciprocal(1.0f + fast_exp(-logit));
}

template <typename T, bool kSoftmax, int kRows>
__global__ void __launch_bounds__(kThreads) mix_prompts_kernel(MixPrompts a, bool aligned) {
  constexpr int kM = kRows / 16, kN = kColumns / 4 / 8;
  constexpr int kLibraryStride = tile_stride<T>(kColumns), kWeightStride = tile_stride<T>(kStep);
  T* library_tile = reinterpret_cast<T*>(dynamic_shared());  // [2, kStep, kColumns]
  T* weights = library_tile + 2 * kStep * kLibraryStride;    // [kRows, kStep]
  float2* statistics = reinterpret_cast<float2*>(weights + kRows * kWeightStride);  // [kRows]

  const int64_t first_row = int64_t{blockIdx.x} * kRows, rows = a.R - first_row;
  const int64_t first_column = int64_t{blockIdx.y} * kColumns;
  const T* logits = static_cast<const T*>(a.logits) + first_row * a.K;
  const T* library = static_cast<const T*>(a.library) + first_column;

  auto fetch = [&](int step) {
    const int64_t k = int64_t{step} * kStep;
    load_tile<T, kStep, kColumns, kThreads>(library_tile + step % 2 * kStep * kLibraryStride,
                                            library + k * a.D, a.D, a.K - k, a.D - first_column,
                                            aligned);
    commit_copies();
  };
  const int steps = static_cast<int>(ceil_div(a.K, kStep));
  fetch(0);
  row_statistics<T, kRows, kSoftmax>(logits, rows, a.K, statistics);

  Accumulators<kM, kN> sums;
  sums.clear();
  for (int step = 0; step < steps; ++step) {
    __syncthreads();  // the tiles of the step before are read, and the statistics are written
    if (step + 1 < steps) fetch(step + 1);
    for (int i = threadIdx.x; i < kRows * kStep; i += kThreads) {
      const int r = i / kStep, k = step * kStep + i % kStep;
      const bool inside = r < rows && k < a.K;
      weights[r * kWeightStride + i % kStep] = from_float<T>(
          inside ? coefficient<kSoftmax>(to_float(logits[int64_t{r} * a.K + k]), statistics[r])
                 : 0.0f);
    }
    if (step + 1 < steps) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    multiply_tiles<T, Inner::along, Inner::down, kStep>(
        sums, weights, kWeightStride,
        library_tile + step % 2 * kStep * kLibraryStride + warp_id() * kN * 8, kLibraryStride);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = sums.row(m, i);
        const int64_t d = first_column + warp_id() * kN * 8 + sums.column(n, i);
        if (r < rows && d < a.D) {
          // in 32 bits, which the launcher sees to: a division of 64 calls a function
          const int row = static_cast<int>(first_row) + r, b = row / a.P;
          const int64_t to = b * a.tokens + (row - b * a.P);
          static_cast<T*>(a.prompts)[to * a.D + d] = from_float<T>(sums.block[m][n][i]);
        }
      }
}

template <typename T, bool kSoftmax>
__global__ void __launch_bounds__(kThreads, 4)
    grad_logits_kernel(MixPromptsBackward a, bool aligned) {
  constexpr int kRows = 16, kN = kTokens / 4 / 8, kDepth = 64, kLanes = kThreads / kRows;
  constexpr int kStride = tile_stride<T>(kDepth);
  T* grad_tile = reinterpret_cast<T*>(dynamic_shared());  // [kRows, kDepth]
  T* library_tile = grad_tile + kRows * kStride;          // [kTokens, kDepth]
  float2* statistics = reinterpret_cast<float2*>(library_tile + kTokens * kStride);  // [kRows]
  float* products = reinterpret_cast<float*>(statistics + kRows);  // [kRows, kTokens or kept]
  const bool keep = a.K <= kKeptTokens;
  const int kept = keep ? static_cast<int>(ceil_div(a.K, kTokens)) * kTokens : kTokens;

  const int64_t first_row = int64_t{blockIdx.x} * kRows, rows = a.R - first_row;
  const T* logits = static_cast<const T*>(a.logits) + first_row * a.K;
  const T* grads = static_cast<const T*>(a.grad_prompts) + first_row * a.D;
  T* out = static_cast<T*>(a.grad_logits) + first_row * a.K;
  row_statistics<T, kRows, kSoftmax>(logits, rows, a.K, statistics);
  __syncthreads();
  if (threadIdx.x < kRows && threadIdx.x < rows) {
    static_cast<float2*>(a.statistics)[first_row + threadIdx.x] = statistics[threadIdx.x];
  }

  // grad_coefficients of 16 rows x 64 tokens, into shared memory
  auto make_products = [&](int first_token, float* to) {
    Accumulators<1, kN> sums;
    sums.clear();
    for (int64_t d = 0; d < a.D; d += kDepth) {
      __syncthreads();  // the tiles before are read
      load_tile<T, kRows, kDepth, kThreads>(grad_tile, grads + d, a.D, rows, a.D - d, aligned);
      load_tile<T, kTokens, kDepth, kThreads>(
          library_tile, static_cast<const T*>(a.library) + int64_t{first_token} * a.D + d, a.D,
          a.K - first_token, a.D - d, aligned);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      multiply_tiles<T, Inner::along, Inner::along, kDepth>(
          sums, grad_tile, kStride, library_tile + warp_id() * kN * 8 * kStride, kStride);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[sums.row(0, i) * kept + warp_id() * kN * 8 + sums.column(n, i)] = sums.block[0][n][i];
      }
    __syncthreads();
  };

  const int r = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  auto logit = [&](int k) { return to_float(logits[int64_t{r} * a.K + k]); };
  float mean = 0.0f;  // sum_k c[k] d_c[k]
  if (kSoftmax) {
    for (int first = 0; first < a.K; first += kTokens) {
      float* tile = keep ? products + first : products;
      make_products(first, tile);
      if (r < rows) {
        for (int i = lane; i < kTokens && first + i < a.K; i += kLanes) {
          mean += coefficient<true>(logit(first + i), statistics[r]) * tile[r * kept + i];
        }
      }
    }
    mean = lanes_sum<kLanes>(mean);
  }
  for (int first = 0; first < a.K; first += kTokens) {
    float* tile = keep ? products + first : products;
    if (!(kSoftmax && keep)) make_products(first, tile);
    if (r < rows) {
      for (int i = lane; i < kTokens && first + i < a.K; i += kLanes) {
        const float c = coefficient<kSoftmax>(logit(first + i), statistics[r]);
        const float grad = tile[r * kept + i];
        out[int64_t{r} * a.K + first + i] =
            from_float<T>(kSoftmax ? c * (grad - mean) : c * (1.0f - c) * grad);
      }
    }
  }
}

template <typename T, bool kSoftmax>
__global__ void __launch_bounds__(kThreads)
    grad_library_kernel(MixPromptsBackward a, bool aligned) {
  constexpr int kM = kTokens / 2 / 16, kN = kColumns / 2 / 8;  // warps: 2 x 2
  constexpr int kGradStride = tile_stride<T>(kColumns), kWeightStride = tile_stride<T>(kTokens);
  T* grad_tile = reinterpret_cast<T*>(dynamic_shared());  // [kStep, kColumns]
  T* weights = grad_tile + kStep * kGradStride;           // [kStep, kTokens]

  const int first_token = blockIdx.x * kTokens;
  const int64_t first_column = int64_t{blockIdx.y} * kColumns;
  const int64_t begin = blockIdx.z * a.rows_per_split;
  const int64_t end = begin + a.rows_per_split < a.R ? begin + a.rows_per_split : a.R;
  const T* logits = static_cast<const T*>(a.logits);
  const float2* statistics = static_cast<const float2*>(a.statistics);
  const int warp_m = warp_id() / 2 * kM * 16, warp_n = warp_id() % 2 * kN * 8;

  Accumulators<kM, kN> sums;
  sums.clear();
  for (int64_t row = begin; row < end; row += kStep) {
    __syncthreads();  // the tiles before are read
    load_tile<T, kStep, kColumns, kThreads>(
        grad_tile, static_cast<const T*>(a.grad_prompts) + row * a.D + first_column, a.D, end - row,
        a.D - first_column, aligned);
    commit_copies();
    for (int i = threadIdx.x; i < kStep * kTokens; i += kThreads) {
      const int r = i / kTokens, k = first_token + i % kTokens;
      const bool inside = row + r < end && k < a.K;
      weights[r * kWeightStride + i % kTokens] = from_float<T>(
          inside ? coefficient<kSoftmax>(to_float(logits[(row + r) * a.K + k]), statistics[row + r])
                 : 0.0f);
    }
    wait_copies<0>();
    __syncthreads();
    multiply_tiles<T, Inner::down, Inner::down, kStep>(sums, weights + warp_m, kWeightStride,
                                                       grad_tile + warp_n, kGradStride);
  }
  float* partial = static_cast<float*>(a.partial) + int64_t{blockIdx.z} * a.K * a.D;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t k = first_token + warp_m + sums.row(m, i);
        const int64_t d = first_column + warp_n + sums.column(n, i);
        if (k < a.K && d < a.D) {
          if (a.splits == 1) {
            static_cast<T*>(a.grad_library)[k * a.D + d] = from_float<T>(sums.block[m][n][i]);
          } else {
            partial[k * a.D + d] = sums.block[m][n][i];
          }
        }
      }
}

template <typename T, bool kSoftmax, int kRows>
cudaError_t launch_forward(const MixPrompts& a, cudaStream_t stream) {
  const dim3 grid(ceil_div(a.R, kRows), ceil_div(a.D, kColumns));
  const size_t bytes =
      (2 * kStep * tile_stride<T>(kColumns) + kRows * tile_stride<T>(kStep)) * sizeof(T) +
      kRows * sizeof(float2);
  return launch(mix_prompts_kernel<T, kSoftmax, kRows>, grid, kThreads, bytes, stream, a,
                aligned16(a.library, a.D, sizeof(T)));
}

template <typename T, bool kSoftmax>
cudaError_t launch_backward(const MixPromptsBackward& a, cudaStream_t stream) {
  const bool aligned =
      aligned16(a.library, a.D, sizeof(T)) && aligned16(a.grad_prompts, a.D, sizeof(T));
  const int64_t kept = a.K <= kKeptTokens ? ceil_div(a.K, kTokens) * kTokens : kTokens;
  const size_t logits_bytes = (16 + kTokens) * tile_stride<T>(64) * sizeof(T) +
                              16 * sizeof(float2) + 16 * kept * sizeof(float);
  cudaError_t error = launch(grad_logits_kernel<T, kSoftmax>, dim3(ceil_div(a.R, 16)), kThreads,
                             logits_bytes, stream, a, aligned);
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(a.K, kTokens), ceil_div(a.D, kColumns), a.splits);
  const size_t library_bytes =
      kStep * (tile_stride<T>(kColumns) + tile_stride<T>(kTokens)) * sizeof(T);
  error =
      launch(grad_library_kernel<T, kSoftmax>, grid, kThreads, library_bytes, stream, a, aligned);
  if (error != cudaSuccess || a.splits == 1) return error;
  return add_splits<T>(a.partial, a.grad_library, a.splits, int64_t{a.K} * a.D, stream);
}

}  // namespace

cudaError_t mix_prompts(const MixPrompts& a, DType dtype, cudaStream_t stream) {
  if (a.R == 0 || a.D == 0) return cudaSuccess;
  if (a.R > INT32_MAX) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    // more rows a block read the library less often, where there are rows enough to fill the GPU
    if (a.R >= 4096) {
      return a.softmax ? launch_forward<T, true, 64>(a, stream)
                       : launch_forward<T, false, 64>(a, stream);
    }
    return a.softmax ? launch_forward<T, true, 16>(a, stream)
                     : launch_forward<T, false, 16>(a, stream);
  });
}

cudaError_t mix_prompts_backward(const MixPromptsBackward& a, DType dtype, cudaStream_t stream) {
  if (a.R == 0 || a.D == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return a.softmax ? launch_backward<T, true>(a, stream) : launch_backward<T, false>(a, stream);
  });
}

}  // namespace pgn_fast::cuda
