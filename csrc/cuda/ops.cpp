// The torch-facing side of the CUDA kernels: outputs, current device and stream, registration.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common.h"
#include "launch.h"

namespace pgn_fast {
namespace {

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

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
          static_cast<float>(scale)};
}

// sm_90a code runs on compute capability 9.0 and on no later one
bool on_hopper(const Tensor& x) {
  int major = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
  return major == 9;
}

cuda::Number cuda_number(const Tensor& x) { return static_cast<cuda::Number>(number_of(x)); }

// mixes the prompts into rows `first` on of every image of out [B, tokens, D]
void mix_into(const Tensor& logits, const Tensor& token_library, const std::string& activation,
              Tensor& out, int64_t first) {
  const int64_t B = logits.size(0), P = logits.size(1), K = logits.size(2), D = out.size(2);
  char* rows = static_cast<char*>(out.mutable_data_ptr()) + first * D * out.element_size();
  STD_CUDA_CHECK(cuda::mix_prompts(
      {logits.const_data_ptr(), token_library.const_data_ptr(), rows, B * P, static_cast<int>(K),
       static_cast<int>(D), static_cast<int>(P), out.size(1), activation == "softmax"},
      cuda_number(logits), current_stream(logits)));
}

}  // namespace

Tensor mix_prompts_cuda(const Tensor& logits_,         // [B, P, K]
                        const Tensor& token_library_,  // [K, D]
                        const std::string& activation) {
  const torch::stable::accelerator::DeviceGuard guard(logits_.get_device_index());
  const Tensor logits = as_contiguous(logits_), token_library = as_contiguous(token_library_);
  const int64_t B = logits.size(0), P = logits.size(1), D = token_library.size(1);
  Tensor prompts = torch::stable::new_empty(token_library, {B, P, D});
  mix_into(logits, token_library, activation, prompts, 0);
  return prompts;
}

Tensor prompted_patch_embed_cuda(const Tensor& images,                  // [B, C, H, W]
                                 const Tensor& weight,                  // [D, C, p_h, p_w]
                                 const std::optional<Tensor>& bias,     // [D]
                                 const std::optional<Tensor>& pos,      // [N, D]
                                 const Tensor& prefix,                  // [S, D]
                                 const std::optional<Tensor>& logits,   // [B, P, K]
                                 const std::optional<Tensor>& library,  // [K, D]
                                 const std::optional<Tensor>& prompts,  // [P, D] or [B, P, D]
                                 const std::vector<double>& scale, const std::vector<double>& shift,
                                 const std::string& activation, const std::string& position) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const cudaStream_t stream = current_stream(images);
  const cuda::Number number = cuda_number(weight);
  const int B = images.size(0), C = images.size(1), H = images.size(2), W = images.size(3);
  const int D = weight.size(0), p_h = weight.size(2), p_w = weight.size(3);
  const int N = H / p_h * (W / p_w), S = prefix.size(0);
  const int P = logits ? logits->size(1) : prompts ? prompts->size(prompts->dim() - 2) : 0;
  const int tokens = S + N + P;
  STD_TORCH_CHECK(C <= cuda::kMaxChannels, "prompted_patch_embed: the CUDA kernel takes up to ",
                  cuda::kMaxChannels, " channels");
  Tensor out = torch::stable::new_empty(weight, {B, tokens, D});
  const bool append = position == "append";
  const int first_patch = append ? S : S + P, first_prompt = append ? S + N : S;

  cuda::PatchEmbed embed{images.const_data_ptr(),
                         weight.const_data_ptr(),
                         bias ? bias->const_data_ptr() : nullptr,
                         pos ? pos->const_data_ptr() : nullptr,
                         out.mutable_data_ptr(),
                         images.stride(0),
                         images.stride(1),
                         images.stride(2),
                         images.stride(3),
                         B,
                         C,
                         H,
                         W,
                         p_h,
                         p_w,
                         D,
                         tokens,
                         first_patch,
                         images.scalar_type() == ScalarType::Byte,
                         !scale.empty(),
                         {},
                         {}};
  std::copy(scale.begin(), scale.end(), embed.scale);
  std::copy(shift.begin(), shift.end(), embed.shift);
  const int64_t scratch_bytes =
      on_hopper(images) ? cuda::patch_embed_sm90_scratch(embed, number) : 0;
  if (scratch_bytes > 0) {
    Tensor scratch = torch::stable::new_empty(weight, {scratch_bytes}, ScalarType::Byte);
    STD_CUDA_CHECK(cuda::patch_embed_sm90(embed, number, scratch.mutable_data_ptr(), stream));
  } else {
    STD_CUDA_CHECK(cuda::patch_embed(embed, number, stream));
  }
  auto place = [&](const Tensor& rows, int count, int first) {
    STD_CUDA_CHECK(
        cuda::place_rows({rows.const_data_ptr(), out.mutable_data_ptr(),
                          rows.dim() == 3 ? rows.stride(0) : 0, B, count, D, tokens, first},
                         number, stream));
  };
  place(prefix, S, 0);
  if (prompts) place(*prompts, P, first_prompt);
  if (logits) mix_into(*logits, *library, activation, out, first_prompt);
  return out;
}

std::tuple<Tensor, Tensor> mix_prompts_backward_cuda(const Tensor& grad_prompts_,   // [B, P, D]
                                                     const Tensor& logits_,         // [B, P, K]
                                                     const Tensor& token_library_,  // [K, D]
                                                     const std::string& activation) {
  const torch::stable::accelerator::DeviceGuard guard(logits_.get_device_index());
  const Tensor grad_prompts = as_contiguous(grad_prompts_), logits = as_contiguous(logits_);
  const Tensor token_library = as_contiguous(token_library_);
  const int64_t R = logits.size(0) * logits.size(1), K = logits.size(2), D = token_library.size(1);
  // Two waves of blocks on a large GPU, from the shapes alone: the split, and with it the rounding,
  // is the same on every device.
  const int64_t blocks = ceil_div(K, 64) * ceil_div(D, 128);
  const int64_t splits = std::max<int64_t>(1, std::min(ceil_div(264, blocks), ceil_div(R, 128)));
  Tensor grad_logits = torch::stable::empty_like(logits);
  Tensor grad_library = R > 0 ? torch::stable::empty_like(token_library)
                              : torch::stable::new_zeros(token_library, {K, D});
  Tensor statistics = torch::stable::new_empty(logits, {R, 2}, ScalarType::Float);
  Tensor partial =
      torch::stable::new_empty(logits, {splits > 1 ? splits : 0, K, D}, ScalarType::Float);
  STD_CUDA_CHECK(cuda::mix_prompts_backward(
      {grad_prompts.const_data_ptr(), logits.const_data_ptr(), token_library.const_data_ptr(),
       grad_logits.mutable_data_ptr(), grad_library.mutable_data_ptr(),
       statistics.mutable_data_ptr(), partial.mutable_data_ptr(), R, ceil_div(R, splits),
       static_cast<int>(K), static_cast<int>(D), static_cast<int>(splits), activation == "softmax"},
      cuda_number(logits), current_stream(logits)));
  return {grad_logits, grad_library};
}

std::tuple<Tensor, Tensor> prompt_attention_cuda(
    const Tensor& q,         // [B, h, Q, d]
    const Tensor& k,         // [B, h, T, d]
    const Tensor& v,         // [B, h, T, d]
    const Tensor& prompt_k,  // [h, P, d] or [B, h, P, d]
    const Tensor& prompt_v,  // the same
    double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = empty_heads_last(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  STD_CUDA_CHECK(cuda::prompt_attention(attention_of(q, k, v, prompt_k, prompt_v, out, lse, scale),
                                        cuda_number(q), current_stream(q)));
  return {out, lse};
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
  STD_CUDA_CHECK(cuda::prompt_attention_backward(g, cuda_number(q), current_stream(q)));
  return {grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v};
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CUDA, m) {
  m.impl("mix_prompts", TORCH_BOX(&pgn_fast::mix_prompts_cuda));
  m.impl("mix_prompts_backward", TORCH_BOX(&pgn_fast::mix_prompts_backward_cuda));
  m.impl("prompted_patch_embed", TORCH_BOX(&pgn_fast::prompted_patch_embed_cuda));
  m.impl("prompt_attention", TORCH_BOX(&pgn_fast::prompt_attention_cuda));
  m.impl("prompt_attention_backward", TORCH_BOX(&pgn_fast::prompt_attention_backward_cuda));
}
