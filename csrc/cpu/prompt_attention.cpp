// CPU kernels of pgn_fast.ops.prompt_attention:
//   out = softmax(scale * q @ [prompt_k; k]^T) @ [prompt_v; v]
// and of its ragged form, where an image sees a range of the prompts' rows.
//
// A task is one head and a range of images; the ranges depend on the sizes alone, so that gradients
// of shared prompts, summed range by range and then over the ranges, do not depend on the threads.
#include <algorithm>
#include <memory>
#include <tuple>

#include "../common.h"
#include "kernels.h"

namespace pgn_fast {
namespace {

constexpr int64_t kSplits = 16;  // ranges of images, at most

Rows rows_of(const Tensor& x) {  // [B, h, rows, d] or [h, rows, d]
  const bool shared = x.dim() == 3;
  return {x.const_data_ptr(), shared ? 0 : x.stride(0), x.stride(-3), x.stride(-2)};
}

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prompt_k,
                       const Tensor& prompt_v, double scale) {
  Attention a = {};
  a.q = rows_of(q), a.k = rows_of(k), a.v = rows_of(v);
  a.prompt_k = rows_of(prompt_k), a.prompt_v = rows_of(prompt_v);
  a.h = q.size(1), a.Q = q.size(2), a.T = k.size(2), a.P = prompt_k.size(-2), a.d = q.size(3);
  a.padded_d = ceil_div(a.d, 16) * 16;
  a.scale = static_cast<float>(scale);
  a.shared = prompt_k.dim() == 3;
  return a;
}

int64_t scratch_size(const Attention& a) {
  const int64_t keys = a.P + a.T, row = a.padded_d;
  const int64_t both = 2 * keys * row + kQueryBlock * (a.d + row + keys);
  return both + (a.backward ? 2 * keys * row + kQueryBlock * (2 * row + a.d + keys) : 0);
}

// [B, h, rows, d] in the memory of a contiguous [B, rows, h, d]
Tensor heads_last(const Tensor& like) {
  const int64_t h = like.size(1), rows = like.size(2), d = like.size(3);
  return empty<4>(like, like.scalar_type(), {like.size(0), h, rows, d},
                  {rows * h * d, d, h * d, 1});
}

// task(head, first image, last image, split, scratch)
template <typename F>
void for_tasks(int64_t B, const Attention& a, F task) {
  const int64_t splits = B < kSplits ? B : kSplits;
  torch::stable::parallel_for(0, a.h * splits, 1, [=, &a, &task](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[scratch_size(a)]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t split = i % splits;
      task(i / splits, split * B / splits, (split + 1) * B / splits, split, scratch.get());
    }
  });
}

}  // namespace

namespace {

std::tuple<Tensor, Tensor> forward(Attention a, const Tensor& q) {
  const int64_t B = q.size(0);
  Tensor out = heads_last(q), lse = empty<3>(q, ScalarType::Float, {B, a.h, a.Q});
  a.out = out.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr<float>();
  const DType dtype = dtype_of(q);
  for_tasks(B, a, [&](int64_t h, int64_t begin, int64_t end, int64_t, float* scratch) {
    PGN_ISA_CALL(attention_forward)(a, dtype, h, begin, end, scratch);
  });
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> prompt_attention_cpu(const Tensor& q,         // [B, h, Q, d]
                                                const Tensor& k,         // [B, h, T, d]
                                                const Tensor& v,         // [B, h, T, d]
                                                const Tensor& prompt_k,  // [h, P, d], [B, h, P, d]
                                                const Tensor& prompt_v,  // [h, P, d], [B, h, P, d]
                                                double scale) {
  return forward(attention_of(q, k, v, prompt_k, prompt_v, scale), q);
}

std::tuple<Tensor, Tensor> prompt_attention_ragged_cpu(const Tensor& q,         // [B, h, Q, d]
                                                       const Tensor& k,         // [B, h, T, d]
                                                       const Tensor& v,         // [B, h, T, d]
                                                       const Tensor& prompt_k,  // [h, P, d]
                                                       const Tensor& prompt_v,  // [h, P, d]
                                                       const Tensor& ranges,    // [B, 2]
                                                       double scale) {
  Attention a = attention_of(q, k, v, prompt_k, prompt_v, scale);
  a.ranges = ranges.const_data_ptr<int64_t>();
  a.P = 0;
  for (int64_t b = 0; b < q.size(0); ++b) {
    a.P = std::max(a.P, a.ranges[2 * b + 1] - a.ranges[2 * b]);
  }
  return forward(a, q);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_attention_backward_cpu(
    const Tensor& grad_out,  // [B, h, Q, d]
    const Tensor& q,         // [B, h, Q, d]
    const Tensor& k,         // [B, h, T, d]
    const Tensor& v,         // [B, h, T, d]
    const Tensor& prompt_k,  // [h, P, d], [B, h, P, d]
    const Tensor& prompt_v,  // [h, P, d], [B, h, P, d]
    const Tensor& out,       // [B, h, Q, d]
    const Tensor& lse,       // [B, h, Q]
    double scale, bool want_q, bool want_kv, bool want_prompts) {
  Attention a = attention_of(q, k, v, prompt_k, prompt_v, scale);
  const int64_t B = q.size(0);
  const DType dtype = dtype_of(q);
  const auto none = [&] { return empty<1>(q, q.scalar_type(), {0}); };
  Tensor grad_q = want_q ? heads_last(q) : none();
  Tensor grad_k = want_kv ? heads_last(k) : none(), grad_v = want_kv ? heads_last(v) : none();
  a.backward = true;
  a.grad_out = rows_of(grad_out), a.attended = rows_of(out);
  a.lse = const_cast<float*>(lse.const_data_ptr<float>());
  a.want_q = want_q, a.want_kv = want_kv, a.want_prompts = want_prompts;
  a.grad_q = grad_q.mutable_data_ptr(), a.grad_k = grad_k.mutable_data_ptr();
  a.grad_v = grad_v.mutable_data_ptr();

  // gradients of the prompts, [splits or B, h, 2, P, d]
  const int64_t size = a.P * a.d, splits = a.shared ? (B < kSplits ? B : kSplits) : B;
  const std::unique_ptr<float[]> partial(new float[want_prompts ? splits * a.h * 2 * size : 0]);
  a.partial_stride = a.h * 2 * size;
  for_tasks(B, a, [&](int64_t h, int64_t begin, int64_t end, int64_t split, float* scratch) {
    const int64_t at = ((a.shared ? split : begin) * a.h + h) * 2 * size;
    PGN_ISA_CALL(attention_backward)(a, dtype, h, begin, end, scratch,
                                     want_prompts ? partial.get() + at : nullptr);
  });
  if (!want_prompts) return {grad_q, grad_k, grad_v, none(), none()};

  const auto like_prompts = [&] {
    return a.shared ? empty<3>(q, q.scalar_type(), {a.h, a.P, a.d})
                    : empty<4>(q, q.scalar_type(), {B, a.h, a.P, a.d});
  };
  Tensor grad_prompt_k = like_prompts(), grad_prompt_v = like_prompts();
  char *to_k = static_cast<char*>(grad_prompt_k.mutable_data_ptr()),
       *to_v = static_cast<char*>(grad_prompt_v.mutable_data_ptr());
  const int64_t heads = a.shared ? a.h : B * a.h, summands = a.shared ? splits : 1;
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = partial.get() + i * 2 * size;
      const int64_t at = i * size * size_of(dtype);
      PGN_ISA_CALL(sum_splits)(from, summands, a.partial_stride, size, dtype, to_k + at);
      PGN_ISA_CALL(sum_splits)(from + size, summands, a.partial_stride, size, dtype, to_v + at);
    }
  });
  return {grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v};
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CPU, m) {
  m.impl("prompt_attention", TORCH_BOX(&pgn_fast::prompt_attention_cpu));
  m.impl("prompt_attention_ragged", TORCH_BOX(&pgn_fast::prompt_attention_ragged_cpu));
  m.impl("prompt_attention_backward", TORCH_BOX(&pgn_fast::prompt_attention_backward_cpu));
}
