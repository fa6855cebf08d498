// The torch-facing side of the CUDA kernels of pgn_fast.ops.prompt_attention.
#include <algorithm>
#include <tuple>

#include "host.h"

namespace pgn_fast {
namespace {

// (B, h, T, d), or (h, P, d) that the batch shares
cuda::Heads heads(const Tensor& x) {
  const int64_t n = x.dim();
  return {const_cast<void*>(x.const_data_ptr()), n == 4 ? x.stride(0) : 0, x.stride(n - 3),
          x.stride(n - 2)};
}

// (B, h, T, d) laid out as (B, T, h, d), so that joining the heads costs nothing
Tensor empty_heads_last(const Tensor& x) {
  return torch::stable::transpose(
      torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)}), 1, 2);
}

cuda::PromptAttention attention_of(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& prompt_k, const Tensor& prompt_v,
                                   const Tensor& out, const Tensor& lse, double scale) {
  STD_TORCH_CHECK(q.size(3) <= 128,
                  "prompt_attention: the CUDA kernels take head widths up to 128");
  return {heads(q),
          heads(k),
          heads(v),
          heads(prompt_k),
          heads(prompt_v),
          heads(out),
          static_cast<float*>(const_cast<void*>(lse.const_data_ptr())),
          static_cast<int>(q.size(0)),
          static_cast<int>(q.size(1)),
          static_cast<int>(q.size(2)),
          static_cast<int>(k.size(2)),
          static_cast<int>(prompt_k.size(prompt_k.dim() - 2)),
          static_cast<int>(q.size(3)),
          static_cast<float>(scale),
          nullptr};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& prompt_k, const Tensor& prompt_v,
                                   const int64_t* ranges, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = empty_heads_last(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  cuda::PromptAttention args = attention_of(q, k, v, prompt_k, prompt_v, out, lse, scale);
  args.ranges = ranges;
  cuda::check_launch(cuda::prompt_attention(args, cuda::dtype_of(q), cuda::current_stream(q)),
                     "prompt_attention", q);
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> prompt_attention_cuda(
    const Tensor& q,         // [B, h, Q, d]
    const Tensor& k,         // [B, h, T, d]
    const Tensor& v,         // [B, h, T, d]
    const Tensor& prompt_k,  // [h, P, d] or [B, h, P, d]
    const Tensor& prompt_v,  // the same
    double scale) {
  return forward(q, k, v, prompt_k, prompt_v, nullptr, scale);
}

std::tuple<Tensor, Tensor> prompt_attention_ragged_cuda(const Tensor& q,         // [B, h, Q, d]
                                                        const Tensor& k,         // [B, h, T, d]
                                                        const Tensor& v,         // [B, h, T, d]
                                                        const Tensor& prompt_k,  // [h, P, d]
                                                        const Tensor& prompt_v,  // [h, P, d]
                                                        const Tensor& ranges,    // [B, 2]
                                                        double scale) {
  return forward(q, k, v, prompt_k, prompt_v, ranges.const_data_ptr<int64_t>(), scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_attention_backward_cuda(
    const Tensor& grad_out,  // [B, h, Q, d]
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prompt_k,
    const Tensor& prompt_v, const Tensor& out, const Tensor& lse, double scale, bool want_q,
    bool want_kv, bool want_prompts) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  cuda::PromptAttentionBackward g{};
  g.forward = attention_of(q, k, v, prompt_k, prompt_v, out, lse, scale);
  g.grad_out = heads(grad_out);
  const auto& a = g.forward;
  const bool empty = a.B == 0 || a.Q == 0;  // then no kernel runs
  auto result = [&](bool wanted, const Tensor& like, bool heads_last, cuda::Heads* to) {
    if (!wanted) return torch::stable::new_empty(like, {0});
    Tensor grad =
        heads_last ? empty_heads_last(like) : torch::stable::new_empty(like, like.sizes());
    if (empty) torch::stable::zero_(grad);
    *to = heads(grad);
    return grad;
  };
  Tensor grad_q = result(want_q, q, true, &g.grad_q);
  Tensor grad_k = result(want_kv, k, true, &g.grad_k);
  Tensor grad_v = result(want_kv, v, true, &g.grad_v);
  Tensor grad_prompt_k = result(want_prompts, prompt_k, false, &g.grad_prompt_k);
  Tensor grad_prompt_v = result(want_prompts, prompt_v, false, &g.grad_prompt_v);
  // about two waves of blocks on a large GPU, from the sizes alone: the same bits on every device
  const int64_t rows = int64_t{a.B} * a.Q, blocks = ceil_div(a.P, 64) * a.h;
  g.splits = static_cast<int>(
      blocks == 0 || rows == 0 ? 1 : std::min(ceil_div(264, blocks), ceil_div(rows, 64)));
  g.shared = prompt_k.dim() == 3;
  Tensor delta = torch::stable::new_empty(q, {a.B, a.h, a.Q}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(
      q, {2, g.shared && want_prompts ? g.splits : 0, a.h, a.P, a.d}, ScalarType::Float);
  g.delta = static_cast<float*>(delta.mutable_data_ptr());
  g.partial = static_cast<float*>(partial.mutable_data_ptr());
  cuda::check_launch(cuda::prompt_attention_backward(g, cuda::dtype_of(q), cuda::current_stream(q)),
                     "prompt_attention_backward", q);
  return {grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v};
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CUDA, m) {
  m.impl("prompt_attention", TORCH_BOX(&pgn_fast::prompt_attention_cuda));
  m.impl("prompt_attention_ragged", TORCH_BOX(&pgn_fast::prompt_attention_ragged_cuda));
  m.impl("prompt_attention_backward", TORCH_BOX(&pgn_fast::prompt_attention_backward_cuda));
}
