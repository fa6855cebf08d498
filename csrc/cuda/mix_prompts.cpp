// The torch-facing side of the CUDA kernels of pgn_fast.ops.mix_prompts.
#include <algorithm>
#include <tuple>

#include "host.h"

namespace pgn_fast {

void cuda::mix_prompts_into(const Tensor& logits, const Tensor& token_library,
                            const std::string& activation, Tensor& out, int64_t first) {
  const int64_t B = logits.size(0), P = logits.size(1), K = logits.size(2), D = out.size(2);
  char* rows = static_cast<char*>(out.mutable_data_ptr()) + first * D * out.element_size();
  const cudaError_t error = cuda::mix_prompts(
      {logits.const_data_ptr(), token_library.const_data_ptr(), rows, B * P, static_cast<int>(K),
       static_cast<int>(D), static_cast<int>(P), out.size(1), activation == "softmax"},
      cuda::dtype_of(logits), cuda::current_stream(logits));
  cuda::check_launch(error, "mix_prompts", logits);
}

Tensor mix_prompts_cuda(const Tensor& logits_,         // [B, P, K]
                        const Tensor& token_library_,  // [K, D]
                        const std::string& activation) {
  const torch::stable::accelerator::DeviceGuard guard(logits_.get_device_index());
  const Tensor logits = as_contiguous(logits_), token_library = as_contiguous(token_library_);
  const int64_t B = logits.size(0), P = logits.size(1), D = token_library.size(1);
  Tensor prompts = torch::stable::new_empty(token_library, {B, P, D});
  cuda::mix_prompts_into(logits, token_library, activation, prompts, 0);
  return prompts;
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
  const cudaError_t error = cuda::mix_prompts_backward(
      {grad_prompts.const_data_ptr(), logits.const_data_ptr(), token_library.const_data_ptr(),
       grad_logits.mutable_data_ptr(), grad_library.mutable_data_ptr(),
       statistics.mutable_data_ptr(), partial.mutable_data_ptr(), R, ceil_div(R, splits),
       static_cast<int>(K), static_cast<int>(D), static_cast<int>(splits), activation == "softmax"},
      cuda::dtype_of(logits), cuda::current_stream(logits));
  cuda::check_launch(error, "mix_prompts_backward", logits);
  return {grad_logits, grad_library};
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CUDA, m) {
  m.impl("mix_prompts", TORCH_BOX(&pgn_fast::mix_prompts_cuda));
  m.impl("mix_prompts_backward", TORCH_BOX(&pgn_fast::mix_prompts_backward_cuda));
}
