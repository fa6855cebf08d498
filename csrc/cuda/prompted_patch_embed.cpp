// The torch-facing side of the CUDA kernels of pgn_fast.ops.prompted_patch_embed.
#include <algorithm>
#include <optional>
#include <vector>

#include "host.h"

namespace pgn_fast {
namespace {

// Bytes of scratch for Hopper's own kernel; 0 where its code is not in this library, the device is
// no Hopper, or it does not take the arguments.
int64_t hopper_scratch(const Tensor& images, const cuda::PatchEmbed& embed, cuda::DType dtype) {
#ifdef PGN_FAST_HOPPER
  int major = 0, minor = 0;
  const int device = images.get_device_index();
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cuda::check_launch(error, "prompted_patch_embed", images);
  error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cuda::check_launch(error, "prompted_patch_embed", images);
  // sm_90a code runs on compute capability 9.0 and on no later one
  if (major == 9 && minor == 0) return cuda::patch_embed_sm90_scratch(embed, dtype);
#endif
  return 0;
}

cudaError_t launch_hopper(const cuda::PatchEmbed& embed, cuda::DType dtype, void* scratch,
                          cudaStream_t stream) {
#ifdef PGN_FAST_HOPPER
  return cuda::patch_embed_sm90(embed, dtype, scratch, stream);
#else
  return cudaErrorNotSupported;
#endif
}

}  // namespace

Tensor prompted_patch_embed_cuda(const Tensor& images,                        // [B, C, H, W]
                                 const Tensor& weight,                        // [D, C, p_h, p_w]
                                 const std::optional<Tensor>& bias,           // [D]
                                 const std::optional<Tensor>& pos_embed,      // [N, D]
                                 const Tensor& prefix,                        // [S, D]
                                 const std::optional<Tensor>& logits,         // [B, P, K]
                                 const std::optional<Tensor>& token_library,  // [K, D]
                                 const std::optional<Tensor>& prompts,        // [P, D] or [B, P, D]
                                 const std::vector<double>& scale, const std::vector<double>& shift,
                                 const std::string& activation, const std::string& position) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const cudaStream_t stream = cuda::current_stream(images);
  const cuda::DType dtype = cuda::dtype_of(weight);
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
                         pos_embed ? pos_embed->const_data_ptr() : nullptr,
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
  const int64_t scratch_bytes = hopper_scratch(images, embed, dtype);
  cudaError_t error = cudaSuccess;
  if (scratch_bytes > 0) {
    Tensor scratch = torch::stable::new_empty(weight, {scratch_bytes}, ScalarType::Byte);
    error = launch_hopper(embed, dtype, scratch.mutable_data_ptr(), stream);
  } else {
    error = cuda::patch_embed(embed, dtype, stream);
  }
  cuda::check_launch(error, "prompted_patch_embed", images);
  auto place = [&](const Tensor& rows, int count, int first) {
    const cudaError_t error =
        cuda::place_rows({rows.const_data_ptr(), out.mutable_data_ptr(),
                          rows.dim() == 3 ? rows.stride(0) : 0, B, count, D, tokens, first},
                         dtype, stream);
    cuda::check_launch(error, "prompted_patch_embed", rows);
  };
  place(prefix, S, 0);
  if (prompts) place(*prompts, P, first_prompt);
  if (logits) cuda::mix_prompts_into(*logits, *token_library, activation, out, first_prompt);
  return out;
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CUDA, m) {
  m.impl("prompted_patch_embed", TORCH_BOX(&pgn_fast::prompted_patch_embed_cuda));
}
