// CUDA kernel of pgn_fast.ops.prompt_attention: softmax attention of an image's queries over its
// own keys and the prompts' keys together, without a matrix of scores in memory and without a copy
// of the prompts for each image.
//
// A block owns 16 query rows a warp and loops over the keys in tiles of 64, the image's own first,
// then the prompts'. K and V have one buffer each: while a tile of V is used the next K arrives,
// and the other way round.
#include "attention.cuh"

namespace pgn_fast::cuda {
namespace {

template <typename T, int kD, int kWarps, bool kRagged>
__global__ void __launch_bounds__(kWarps * 32, 2)
    attention_kernel(PromptAttention a, bool aligned) {
  using Block = QueryBlock<T, kD, kWarps>;
  constexpr int kStride = Block::kStride, kN = kD / 8, kKeyBlocks = kKeys / 8;
  T* queries = reinterpret_cast<T*>(dynamic_shared());  // [kRows, kD]
  T* keys = queries + Block::kRows * kStride;           // [kKeys, kD]
  T* values = keys + kKeys * kStride;                   // [kKeys, kD]
  T* scratch = values + kKeys * kStride;

  const int b = blockIdx.x / a.h, h = blockIdx.x % a.h;
  const int first = blockIdx.y * Block::kRows, rows = a.Q - first;
  const KeyTiles<kRagged> tiles(a, b);
  load_tile<T, Block::kRows, kD, Block::kThreads>(queries, row_of<T>(a.q, b, h, first), a.q.token,
                                                  rows, a.d, aligned);
  auto load_k = [&](int tile) {
    Block::load_keys(keys, tiles.keys(a, tile), b, h, tiles.first(tile), tiles.count(a, tile), a.d,
                     aligned);
  };
  auto load_v = [&](int tile) {
    Block::load_keys(values, tiles.values(a, tile), b, h, tiles.first(tile), tiles.count(a, tile),
                     a.d, aligned);
  };
  load_k(0);
  load_v(0);

  Accumulators<1, kN> out;
  out.clear();
  // of the thread's two rows, lane / 4 and lane / 4 + 8, in units of log2
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  const float scale = a.scale * kLog2e;
  for (int tile = 0; tile < tiles.total; ++tile) {
    wait_copies<1>();
    __syncthreads();  // K has landed
    Accumulators<1, kKeyBlocks> scores;
    scores.clear();
    multiply_tiles<T, Inner::along, Inner::along, kD>(
        scores, queries + warp_id() * kRowsPerWarp * kStride, kStride, keys, kStride);
    __syncthreads();  // K is read
    if (tile + 1 < tiles.total) load_k(tile + 1);

    const int count = tiles.count(a, tile);
    float bound[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < kKeyBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = scores.block[0][n][i];
        s = scores.column(n, i) < count ? s * scale : -INFINITY;
        bound[i / 2] = fmaxf(bound[i / 2], s);
      }
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bound[i] = lanes_max<4>(bound[i]);
      rescale[i] =
          fast_exp2(largest[i] - bound[i]);  // the first tile has a finite score: never inf - inf
      largest[i] = bound[i];
      sum[i] *= rescale[i];
    }
#pragma unroll
    for (int n = 0; n < kKeyBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = scores.block[0][n][i];
        s = fast_exp2(s - bound[i / 2]);
        sum[i / 2] += s;
      }
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out.block[0][n][i] *= rescale[i / 2];

    if (tile + 1 < tiles.total) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();  // V has landed
    multiply_accumulators<T>(out, scores, values, kStride, Block::warp_scratch(scratch));
    __syncthreads();  // V is read
    if (tile + 1 < tiles.total) load_v(tile + 1);
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) sum[i] = lanes_sum<4>(sum[i]);
  const float inverse[2] = {1.0f / sum[0], 1.0f / sum[1]};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = warp_id() * kRowsPerWarp + out.row(0, i);
    if (row >= rows) continue;
    T* to = row_of<T>(a.out, b, h, first + row);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int d = out.column(n, i);
      if (d < a.d) to[d] = from_float<T>(out.block[0][n][i] * inverse[i / 2]);
    }
    if (i % 2 == 0 && lane_id() % 4 == 0) {
      a.lse[int64_t{blockIdx.x} * a.Q + first + row] = (largest[i / 2] + log2f(sum[i / 2])) * kLn2;
    }
  }
}

template <typename T, int kD, int kWarps>
cudaError_t launch_forward(const PromptAttention& a, cudaStream_t stream) {
  using Block = QueryBlock<T, kD, kWarps>;
  const dim3 grid(a.B * a.h, ceil_div(a.Q, Block::kRows));
  const size_t bytes = ((Block::kRows + 2 * kKeys) * Block::kStride + Block::kScratch) * sizeof(T);
  const bool aligned = all_aligned<T>(a);
  auto run = [&](auto kernel) {
    return launch(kernel, grid, Block::kThreads, bytes, stream, a, aligned);
  };
  return a.ranges ? run(attention_kernel<T, kD, kWarps, true>)
                  : run(attention_kernel<T, kD, kWarps, false>);
}

}  // namespace

cudaError_t prompt_attention(const PromptAttention& a, DType dtype, cudaStream_t stream) {
  if (a.B == 0 || a.Q == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto zero) {
    return with_width(a.d, [&](auto width) {
      using T = decltype(zero);
      return a.Q <= kRowsPerWarp ? launch_forward<T, width(), 1>(a, stream)
                                 : launch_forward<T, width(), 4>(a, stream);
    });
  });
}

}  // namespace pgn_fast::cuda
