// The torch-facing side of the CUDA kernels: outputs, current device and stream, registration.
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../common.h"
#include "launch.h"

namespace pgn_fast {
namespace {

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

cuda::Number cuda_number(const Tensor& x) { return static_cast<cuda::Number>(number_of(x)); }

}  // namespace

Tensor mix_prompts_cuda(const Tensor& logits_,         // [B, P, K]
                        const Tensor& token_library_,  // [K, D]
                        const std::string& activation) {
  const torch::stable::accelerator::DeviceGuard guard(logits_.get_device_index());
  const Tensor logits = as_contiguous(logits_), token_library = as_contiguous(token_library_);
  const int64_t B = logits.size(0), P = logits.size(1), D = token_library.size(1);
  Tensor prompts = torch::stable::new_empty(token_library, {B, P, D});
  STD_CUDA_CHECK(cuda::mix_prompts(
      {logits.const_data_ptr(), token_library.const_data_ptr(), prompts.mutable_data_ptr(), B * P,
       static_cast<int>(token_library.size(0)), static_cast<int>(D), activation == "softmax"},
      cuda_number(logits), current_stream(logits)));
  return prompts;
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CUDA, m) {
  m.impl("mix_prompts", TORCH_BOX(&pgn_fast::mix_prompts_cuda));
}
