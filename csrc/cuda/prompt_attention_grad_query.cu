// CUDA kernel of the backward of pgn_fast.ops.prompt_attention: the gradient of the queries.
//
// As in the forward, a block owns 16 query rows a warp and loops over all keys in tiles of 64. The
// gradients of the keys stand in prompt_attention_backward.cu: the two files compile at once.
#include "attention.cuh"

namespace pgn_fast::cuda {
namespace {

// delta = <out, grad_out> of every query row, and d_q where it is wanted.
template <typename T, int kD, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 2)
    grad_query_kernel(PromptAttentionBackward g, bool aligned) {
  using Block = QueryBlock<T, kD, kWarps>;
  constexpr int kStride = Block::kStride, kN = kD / 8, kKeyBlocks = kKeys / 8, kLanes = 2;
  const PromptAttention& a = g.forward;
  T* queries = reinterpret_cast<T*>(dynamic_shared());                    // [kRows, kD]
  T* grads = queries + Block::kRows * kStride;                            // [kRows, kD]
  T* keys = grads + Block::kRows * kStride;                               // [kKeys, kD]
  T* values = keys + kKeys * kStride;                                     // [kKeys, kD]
  float* row_delta = reinterpret_cast<float*>(values + kKeys * kStride);  // [kRows]
  T* scratch = reinterpret_cast<T*>(row_delta + Block::kRows);

  const int b = blockIdx.x / a.h, h = blockIdx.x % a.h;
  const int first = blockIdx.y * Block::kRows, rows = a.Q - first;
  const int64_t statistics = int64_t{blockIdx.x} * a.Q + first;
  const int r = threadIdx.x / kLanes;
  float delta = 0.0f;
  if (r < rows) {
    const T* out = row_of<T>(a.out, b, h, first + r);
    const T* grad = row_of<T>(g.grad_out, b, h, first + r);
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    if (aligned && a.d % kVector == 0) {  // 16 bytes a load
      for (int d = threadIdx.x % kLanes * kVector; d < a.d; d += kLanes * kVector) {
        T x[kVector], y[kVector];
        memcpy(x, __builtin_assume_aligned(out + d, 16), 16);
        memcpy(y, __builtin_assume_aligned(grad + d, 16), 16);
#pragma unroll
        for (int i = 0; i < kVector; ++i) delta += to_float(x[i]) * to_float(y[i]);
      }
    } else {
      for (int d = threadIdx.x % kLanes; d < a.d; d += kLanes) {
        delta += to_float(out[d]) * to_float(grad[d]);
      }
    }
  }
  delta = lanes_sum<kLanes>(delta);
  if (threadIdx.x % kLanes == 0) {
    row_delta[r] = delta;
    if (r < rows) g.delta[statistics + r] = delta;
  }
  if (g.grad_q.data == nullptr) return;

  const KeyTiles<false> tiles(a, b);
  load_tile<T, Block::kRows, kD, Block::kThreads>(queries, row_of<T>(a.q, b, h, first), a.q.token,
                                                  rows, a.d, aligned);
  load_tile<T, Block::kRows, kD, Block::kThreads>(grads, row_of<T>(g.grad_out, b, h, first),
                                                  g.grad_out.token, rows, a.d, aligned);
  commit_copies();
  const float scale = a.scale * kLog2e;
  float lse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_id() * kRowsPerWarp + lane_id() / 4 + 8 * i;
    lse[i] = row < rows ? a.lse[statistics + row] * kLog2e
                        : INFINITY;  // rows past the end weigh nothing
  }
  Accumulators<1, kN> grad_q;
  grad_q.clear();
  for (int tile = 0; tile < tiles.total; ++tile) {
    __syncthreads();  // the tiles before are read
    const int count = tiles.count(a, tile);
    Block::load_keys(keys, tiles.keys(a, tile), b, h, tiles.first(tile), count, a.d, aligned);
    Block::load_keys(values, tiles.values(a, tile), b, h, tiles.first(tile), count, a.d, aligned);
    wait_copies<0>();
    __syncthreads();
    const int offset = warp_id() * kRowsPerWarp * kStride;
    Accumulators<1, kKeyBlocks> weights, grad_weights;
    weights.clear();
    grad_weights.clear();
    multiply_tiles<T, Inner::along, Inner::along, kD>(weights, queries + offset, kStride, keys,
                                                      kStride);
    multiply_tiles<T, Inner::along, Inner::along, kD>(grad_weights, grads + offset, kStride, values,
                                                      kStride);
#pragma unroll
    for (int n = 0; n < kKeyBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_id() * kRowsPerWarp + weights.row(0, i);
        const float p = weights.column(n, i) < count
                            ? fast_exp2(weights.block[0][n][i] * scale - lse[i / 2])
                            : 0.0f;
        weights.block[0][n][i] = p * (grad_weights.block[0][n][i] - row_delta[row]);
      }
    multiply_accumulators<T>(grad_q, weights, keys, kStride, Block::warp_scratch(scratch));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = warp_id() * kRowsPerWarp + grad_q.row(0, i);
    if (row >= rows) continue;
    T* to = row_of<T>(g.grad_q, b, h, first + row);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int d = grad_q.column(n, i);
      if (d < a.d) to[d] = from_float<T>(grad_q.block[0][n][i] * a.scale);
    }
  }
}

template <typename T, int kD, int kWarps>
cudaError_t launch_grad_query(const PromptAttentionBackward& g, cudaStream_t stream) {
  using Block = QueryBlock<T, kD, kWarps>;
  const PromptAttention& a = g.forward;
  const dim3 grid(a.B * a.h, ceil_div(a.Q, Block::kRows));
  const size_t bytes = (2 * (Block::kRows + kKeys) * Block::kStride + Block::kScratch) * sizeof(T) +
                       Block::kRows * sizeof(float);
  return launch(grad_query_kernel<T, kD, kWarps>, grid, Block::kThreads, bytes, stream, g,
                all_aligned<T>(g));
}

}  // namespace

cudaError_t prompt_attention_grad_query(const PromptAttentionBackward& g, DType dtype,
                                        cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    return with_width(g.forward.d, [&](auto width) {
      using T = decltype(zero);
      return g.forward.Q <= kRowsPerWarp ? launch_grad_query<T, width(), 1>(g, stream)
                                         : launch_grad_query<T, width(), 4>(g, stream);
    });
  });
}

}  // namespace pgn_fast::cuda
