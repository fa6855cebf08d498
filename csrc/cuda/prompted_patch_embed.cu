// CUDA kernels of pgn_fast.ops.prompted_patch_embed: the patch rows and the ready rows of the
// result; the mixed prompts are written beside them by mix_prompts, each row of the one buffer
// once.
//
// The patch embedding is a product of B * N patches with the weight, without a matrix of patches in
// memory: a block makes 128 patches x 128 columns, its 8 warps 64 x 32 each. Pixels are fetched
// into registers one step ahead, normalized, rounded to the operand type and put into shared
// memory; the weight's tile comes by background copies. Bias and position are added to the float32
// sums.
#include "device.cuh"

namespace pgn_fast::cuda {
namespace {

constexpr int kThreads = 256, kRows = 128, kColumns = 128, kStep = 32;
constexpr int kVector = 4, kGroups = kStep / kVector, kRowsAtOnce = kThreads / kGroups;
constexpr int kPasses = kRows / kRowsAtOnce;

template <typename T, typename Pixel>
__global__ void __launch_bounds__(kThreads, 1)
    patch_embed_kernel(PatchEmbed a, bool vectors, bool aligned) {
  constexpr int kM = 4, kN = 4, kStride = tile_stride<T>(kStep);
  T* patch_tile = reinterpret_cast<T*>(dynamic_shared());  // [2, kRows, kStep]
  T* weight_tile = patch_tile + 2 * kRows * kStride;       // [2, kColumns, kStep]

  const int columns = a.W / a.p_w, N = a.H / a.p_h * columns;
  const int column_blocks = static_cast<int>(ceil_div(a.D, kColumns));
  // columns vary fastest: the blocks that share pixels run together and find them in the L2 cache
  const int64_t patches = int64_t{a.B} * N, first_row = int64_t{blockIdx.x / column_blocks} * kRows;
  const int first_column = blockIdx.x % column_blocks * kColumns;
  const int area = a.p_h * a.p_w, K = a.C * area, steps = static_cast<int>(ceil_div(K, kStep));

  // this thread fetches kVector pixels, from group * kVector on, of kPasses patches
  const int group = threadIdx.x % kGroups, row = threadIdx.x / kGroups;
  const Pixel* corner[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int64_t m = first_row + row + i * kRowsAtOnce, b = m / N;
    const int n = static_cast<int>(m % N);
    corner[i] = m < patches ? static_cast<const Pixel*>(a.images) + b * a.stride_b +
                                  int64_t{n / columns} * a.p_h * a.stride_y +
                                  int64_t{n % columns} * a.p_w * a.stride_x
                            : nullptr;
  }

  float pixels[kPasses][kVector];
  auto fetch = [&](int step) {
    const int k = step * kStep + group * kVector;
    if (vectors) {  // the kVector pixels are neighbors in memory
      const int c = k / area, y = k % area / a.p_w, x = k % a.p_w;
      const int64_t offset = c * a.stride_c + y * a.stride_y + x;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        struct alignas(kVector * sizeof(Pixel)) {
          Pixel values[kVector];
        } loaded;
        const bool inside = corner[i] != nullptr && k < K;
        if (inside)
          memcpy(&loaded, __builtin_assume_aligned(corner[i] + offset, sizeof(loaded)),
                 sizeof(loaded));
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const float value = inside ? to_float(loaded.values[j]) : 0.0f;
          pixels[i][j] = inside && a.normalize ? fmaf(value, a.scale[c], a.shift[c]) : value;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int c = (k + j) / area, y = (k + j) % area / a.p_w, x = (k + j) % a.p_w;
        const int64_t offset = c * a.stride_c + y * a.stride_y + x * a.stride_x;
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          const bool inside = corner[i] != nullptr && k + j < K;
          const float value = inside ? to_float(corner[i][offset]) : 0.0f;
          pixels[i][j] = inside && a.normalize ? fmaf(value, a.scale[c], a.shift[c]) : value;
        }
      }
    }
  };
  auto place = [&](int step) {
    T* to = patch_tile + step % 2 * kRows * kStride + row * kStride + group * kVector;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        to[i * kRowsAtOnce * kStride + j] = from_float<T>(pixels[i][j]);
      }
    }
  };
  auto fetch_weight = [&](int step) {
    const int64_t k = int64_t{step} * kStep;
    load_tile<T, kColumns, kStep, kThreads>(
        weight_tile + step % 2 * kColumns * kStride,
        static_cast<const T*>(a.weight) + int64_t{first_column} * K + k, K, a.D - first_column,
        K - k, aligned);
    commit_copies();
  };

  fetch_weight(0);
  fetch(0);
  Accumulators<kM, kN> sums;
  sums.clear();
  const int warp_m = warp_id() / 4 * kM * 16, warp_n = warp_id() % 4 * kN * 8;
  for (int step = 0; step < steps; ++step) {
    place(step);
    wait_copies<0>();
    __syncthreads();  // this step's tiles are whole, and those of the step before are read
    if (step + 1 < steps) {
      fetch_weight(step + 1);
      fetch(step + 1);
    }
    multiply_tiles<T, Inner::along, Inner::along, kStep>(
        sums, patch_tile + step % 2 * kRows * kStride + warp_m * kStride, kStride,
        weight_tile + step % 2 * kColumns * kStride + warp_n * kStride, kStride);
  }

  const T *bias = static_cast<const T*>(a.bias), *pos = static_cast<const T*>(a.pos);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t patch = first_row + warp_m + sums.row(m, i);
      if (patch >= patches) continue;
      const int64_t n = patch % N;
      T* to = static_cast<T*>(a.out) + (patch / N * a.tokens + a.first + n) * a.D;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int d = first_column + warp_n + sums.column(j, i);
        if (d >= a.D) continue;
        float sum = sums.block[m][j][i];
        if (bias) sum += to_float(bias[d]);
        if (pos) sum += to_float(pos[n * a.D + d]);
        to[d] = from_float<T>(sum);
      }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) place_rows_kernel(PlaceRows a) {
  const int64_t row = blockIdx.x, b = row / a.count, r = row % a.count;
  const T* from = static_cast<const T*>(a.rows) + b * a.batch_stride + r * a.D;
  T* to = static_cast<T*>(a.out) + (b * a.tokens + a.first + r) * a.D;
  for (int d = threadIdx.x; d < a.D; d += kThreads) to[d] = from[d];
}

template <typename T, typename Pixel>
cudaError_t launch_embed(const PatchEmbed& a, cudaStream_t stream) {
  const int64_t patches = int64_t{a.B} * (a.H / a.p_h) * (a.W / a.p_w);
  const int K = a.C * a.p_h * a.p_w;
  const bool vectors = a.stride_x == 1 && a.p_w % kVector == 0 && a.stride_y % kVector == 0 &&
                       a.stride_c % kVector == 0 && a.stride_b % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(a.images) % (kVector * sizeof(Pixel)) == 0;
  const size_t bytes = 2 * (kRows + kColumns) * tile_stride<T>(kStep) * sizeof(T);
  return launch(patch_embed_kernel<T, Pixel>,
                dim3(ceil_div(patches, kRows) * ceil_div(a.D, kColumns)), kThreads, bytes, stream,
                a, vectors, aligned16(a.weight, K, sizeof(T)));
}

}  // namespace

cudaError_t patch_embed(const PatchEmbed& a, DType dtype, cudaStream_t stream) {
  if (int64_t{a.B} * a.H * a.W == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return a.uint8 ? launch_embed<T, uint8_t>(a, stream) : launch_embed<T, T>(a, stream);
  });
}

cudaError_t place_rows(const PlaceRows& a, DType dtype, cudaStream_t stream) {
  if (int64_t{a.B} * a.count == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto zero) {
    return launch(place_rows_kernel<decltype(zero)>, dim3(a.B * a.count), kThreads, 0, stream, a);
  });
}

}  // namespace pgn_fast::cuda
