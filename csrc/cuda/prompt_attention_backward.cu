// CUDA kernels of the backward of pgn_fast.ops.prompt_attention: the gradients of keys and values.
//
// A block owns 64 keys and loops over query rows, with keys along the rows of the scores so that
// the transposed probabilities are left operands straight from registers. A prompt key that the
// batch shares does not care whose row it meets: for it the whole batch is one sequence of B * Q
// rows, cut into `splits` ranges whose float32 sums are added in a fixed order.
#include "attention.cuh"

namespace pgn_fast::cuda {
namespace {

// d_k and d_v of 64 keys. blockIdx.x is (image, head), or the head alone where kShared: then
// blockIdx.z is the range of the batch's rows, and the sums go to `partial`.
template <typename T, int kD, bool kShared>
__global__ void __launch_bounds__(128, 2)
    grad_keys_kernel(PromptAttentionBackward g, Heads k, Heads v, Heads grad_k, Heads grad_v,
                     int keys_count, bool aligned) {
  constexpr int kWarps = 4, kThreads = kWarps * 32, kRows = kKeys, kStride = tile_stride<T>(kD);
  constexpr int kN = kD / 8, kRowBlocks = kRows / 8;
  const PromptAttention& a = g.forward;
  T* keys = reinterpret_cast<T*>(dynamic_shared());                    // [kKeys, kD]
  T* values = keys + kKeys * kStride;                                  // [kKeys, kD]
  T* queries = values + kKeys * kStride;                               // [kRows, kD]
  T* grads = queries + kRows * kStride;                                // [kRows, kD]
  float* row_lse = reinterpret_cast<float*>(grads + kRows * kStride);  // [kRows]
  float* row_delta = row_lse + kRows;                                  // [kRows]
  T* scratch =
      reinterpret_cast<T*>(row_delta + kRows) + warp_id() * kRowsPerWarp * tile_stride<T>(kRows);

  const int b = kShared ? 0 : blockIdx.x / a.h, h = blockIdx.x % a.h;
  const int first_key = blockIdx.y * kKeys, count = keys_count - first_key;
  // rows of the batch's B * Q, or of the image's Q; the launcher sees to it that 32 bits hold them
  const uint32_t Q = a.Q, all = kShared ? a.B * Q : Q;
  const uint32_t per_split = kShared ? (all + g.splits - 1) / g.splits : all;
  const uint32_t start = kShared ? blockIdx.z * per_split : 0, begin = start < all ? start : all;
  const uint32_t end = all - begin < per_split ? all : begin + per_split;
  auto image_of = [&](uint32_t row) { return kShared ? row / Q : static_cast<uint32_t>(b); };
  auto query_of = [&](uint32_t row, uint32_t image) { return kShared ? row - image * Q : row; };
  load_tile<T, kKeys, kD, kThreads>(keys, row_of<T>(k, b, h, first_key), k.token, count, a.d,
                                    aligned);
  load_tile<T, kKeys, kD, kThreads>(values, row_of<T>(v, b, h, first_key), v.token, count, a.d,
                                    aligned);
  commit_copies();

  const float scale = a.scale * kLog2e;
  const int offset = warp_id() * kRowsPerWarp * kStride;
  Accumulators<1, kN> sum_k, sum_v;
  sum_k.clear();
  sum_v.clear();
  for (uint32_t row = begin; row < end; row += kRows) {
    __syncthreads();  // the tiles before are read
    const uint32_t rows = end - row;
    auto row_in = [&](const Heads& x) {
      return [&, row](int r) {
        const uint32_t image = image_of(row + r);
        return row_of<T>(x, static_cast<int>(image), h, query_of(row + r, image));
      };
    };
    load_rows<T, kRows, kD, kThreads>(queries, row_in(a.q), rows, a.d, aligned);
    load_rows<T, kRows, kD, kThreads>(grads, row_in(g.grad_out), rows, a.d, aligned);
    commit_copies();
    if (threadIdx.x < kRows) {
      const uint32_t i = row + threadIdx.x, image = image_of(i);
      const int64_t at = (int64_t{image} * a.h + h) * Q + query_of(i, image);
      row_lse[threadIdx.x] = threadIdx.x < rows ? a.lse[at] * kLog2e : INFINITY;  // weighs nothing
      row_delta[threadIdx.x] = threadIdx.x < rows ? g.delta[at] : 0.0f;
    }
    wait_copies<0>();
    __syncthreads();
    Accumulators<1, kRowBlocks> weights, grad_weights;  // keys along the rows
    weights.clear();
    multiply_tiles<T, Inner::along, Inner::along, kD>(weights, keys + offset, kStride, queries,
                                                      kStride);
#pragma unroll
    for (int n = 0; n < kRowBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& w = weights.block[0][n][i];
        w = fast_exp2(w * scale - row_lse[weights.column(n, i)]);
      }
    multiply_accumulators<T>(sum_v, weights, grads, kStride, scratch);
    grad_weights.clear();
    multiply_tiles<T, Inner::along, Inner::along, kD>(grad_weights, values + offset, kStride, grads,
                                                      kStride);
#pragma unroll
    for (int n = 0; n < kRowBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights.block[0][n][i] *= grad_weights.block[0][n][i] - row_delta[weights.column(n, i)];
      }
    multiply_accumulators<T>(sum_k, weights, queries, kStride, scratch);
  }

  const int64_t size = int64_t{a.h} * a.P * a.d;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = warp_id() * kRowsPerWarp + sum_k.row(0, i);
    if (key >= count) continue;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int d = sum_k.column(n, i);
      if (d >= a.d) continue;
      const float to_k = sum_k.block[0][n][i] * a.scale, to_v = sum_v.block[0][n][i];
      if constexpr (kShared) {
        const int64_t at = blockIdx.z * size + (int64_t{h} * a.P + first_key + key) * a.d + d;
        g.partial[at] = to_k;
        g.partial[g.splits * size + at] = to_v;
      } else {
        if (grad_k.data) row_of<T>(grad_k, b, h, first_key + key)[d] = from_float<T>(to_k);
        if (grad_v.data) row_of<T>(grad_v, b, h, first_key + key)[d] = from_float<T>(to_v);
      }
    }
  }
}

template <typename T, int kD>
cudaError_t launch_grad_keys(const PromptAttentionBackward& g, cudaStream_t stream) {
  const PromptAttention& a = g.forward;
  const bool aligned = all_aligned<T>(g);
  cudaError_t error = cudaSuccess;
  const size_t scratch = sizeof(T) == 4 ? kKeys * tile_stride<T>(kKeys) * sizeof(T) : 0;
  const size_t bytes =
      4 * kKeys * tile_stride<T>(kD) * sizeof(T) + 2 * kKeys * sizeof(float) + scratch;
  auto keys = [&](auto kernel, const Heads& k, const Heads& v, const Heads& grad_k,
                  const Heads& grad_v, int count, dim3 grid) {
    if (error != cudaSuccess || count == 0 || !(grad_k.data || grad_v.data)) return;
    grid.y = static_cast<unsigned>(ceil_div(count, kKeys));
    error = launch(kernel, grid, 128, bytes, stream, g, k, v, grad_k, grad_v, count, aligned);
  };
  const dim3 each_image(a.B * a.h);
  keys(grad_keys_kernel<T, kD, false>, a.k, a.v, g.grad_k, g.grad_v, a.T, each_image);
  if (!g.shared) {
    keys(grad_keys_kernel<T, kD, false>, a.prompt_k, a.prompt_v, g.grad_prompt_k, g.grad_prompt_v,
         a.P, each_image);
    return error;
  }
  keys(grad_keys_kernel<T, kD, true>, a.prompt_k, a.prompt_v, g.grad_prompt_k, g.grad_prompt_v, a.P,
       dim3(a.h, 1, g.splits));
  const int64_t size = int64_t{a.h} * a.P * a.d;
  if (error == cudaSuccess && g.grad_prompt_k.data) {
    error = add_splits<T>(g.partial, g.grad_prompt_k.data, g.splits, size, stream);
  }
  if (error == cudaSuccess && g.grad_prompt_v.data) {
    error =
        add_splits<T>(g.partial + g.splits * size, g.grad_prompt_v.data, g.splits, size, stream);
  }
  return error;
}

}  // namespace

cudaError_t prompt_attention_backward(const PromptAttentionBackward& g, DType dtype,
                                      cudaStream_t stream) {
  if (g.forward.B == 0 || g.forward.Q == 0) return cudaSuccess;
  if (int64_t{g.forward.B} * g.forward.Q > INT32_MAX) return cudaErrorInvalidValue;
  // first: it writes the delta that the keys' gradients read
  const cudaError_t error = prompt_attention_grad_query(g, dtype, stream);
  if (error != cudaSuccess) return error;
  return with_dtype(dtype, [&](auto zero) {
    return with_width(g.forward.d, [&](auto width) {
      return launch_grad_keys<decltype(zero), width()>(g, stream);
    });
  });
}

}  // namespace pgn_fast::cuda
