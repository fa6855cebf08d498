// CPU kernel of pgn_fast.ops.prompted_patch_embed:
//   tokens[b] = [prefix, patches(images[b]) @ weight^T + bias + pos_embed, prompts[b]]
//
// A chunk of images at a time: its pixels are normalized on their way into rows of patches, a
// library's GEMM multiplies them, and one pass adds bias and position embedding while it writes
// the sequence. A chunk is small enough to stay in the cache and large enough for the GEMM.
#include <optional>
#include <string>
#include <vector>

#include "../common.h"
#include "kernels.h"
#include "onednn.h"

namespace pgn_fast {

Tensor mix_prompts_cpu(const Tensor& logits, const Tensor& token_library,
                       const std::string& activation);

namespace {

constexpr int64_t kChunkRows = 784;  // patches multiplied at once

const void* data_of(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

// a [R, K] @ weight [D, K]^T
Tensor multiply(const Tensor& a, const Tensor& weight) {
  if (a.scalar_type() == ScalarType::Float && a.size(0) > 0) {
    if (const auto product = onednn_linear(a, weight)) return *product;
  }
  return torch::stable::matmul(a, torch::stable::transpose(weight, 0, 1));
}

}  // namespace

Tensor prompted_patch_embed_cpu(const Tensor& images,                        // [B, C, H, W]
                                const Tensor& weight,                        // [D, C, p_h, p_w]
                                const std::optional<Tensor>& bias,           // [D]
                                const std::optional<Tensor>& pos_embed,      // [N, D]
                                const Tensor& prefix,                        // [S, D]
                                const std::optional<Tensor>& logits,         // [B, P, K]
                                const std::optional<Tensor>& token_library,  // [K, D]
                                const std::optional<Tensor>& ready_prompts,  // [P, D], [B, P, D]
                                const std::vector<double>& scale,            // [C] or empty
                                const std::vector<double>& shift,            // [C] or empty
                                const std::string& activation, const std::string& position) {
  const int64_t B = images.size(0), D = weight.size(0), p_h = weight.size(2), p_w = weight.size(3);
  const int64_t C = images.size(1), rows = images.size(2) / p_h, N = rows * (images.size(3) / p_w);
  const int64_t S = prefix.size(0), K = C * p_h * p_w;
  const std::optional<Tensor> prompts =
      logits ? mix_prompts_cpu(*logits, *token_library, activation) : ready_prompts;
  const int64_t P = prompts ? prompts->size(-2) : 0;
  const DType dtype = dtype_of(weight);
  const ScalarType type = weight.scalar_type();

  Tensor tokens = empty<3>(weight, type, {B, S + N + P, D});
  const std::vector<float> scales(scale.begin(), scale.end()), shifts(shift.begin(), shift.end());
  const Patches patches = {images.const_data_ptr(),
                           images.scalar_type() == ScalarType::Byte,
                           C,
                           images.size(2),
                           images.size(3),
                           p_h,
                           p_w,
                           images.stride(0),
                           images.stride(1),
                           images.stride(2),
                           images.stride(3),
                           scales.empty() ? nullptr : scales.data(),
                           shifts.empty() ? nullptr : shifts.data()};
  Sequence sequence = {nullptr,
                       data_of(bias),
                       data_of(pos_embed),
                       prefix.const_data_ptr(),
                       data_of(prompts),
                       tokens.mutable_data_ptr(),
                       0,
                       S,
                       N,
                       P,
                       D,
                       prompts && prompts->dim() == 3 ? P * D : 0,
                       position == "prepend"};
  const Tensor rows_of_weight = torch::stable::view(weight, {D, K});
  const int64_t chunk = N > 0 && N < kChunkRows ? kChunkRows / N : 1;
  // one buffer for all chunks: fresh memory would cost a page fault every 4 kB
  Tensor cuts = empty<2>(weight, type, {(B < chunk ? B : chunk) * N, K});
  char* out = static_cast<char*>(cuts.mutable_data_ptr());
  const int64_t row_bytes = N / (rows > 0 ? rows : 1) * K * size_of(dtype);
  for (int64_t first = 0; first < B; first += chunk) {
    const int64_t count = B - first < chunk ? B - first : chunk;
    torch::stable::parallel_for(0, count * rows, 1, [=, &patches](int64_t begin, int64_t end) {
      PGN_ISA_CALL(cut_patches)(patches, dtype, first * rows + begin, first * rows + end,
                                out + begin * row_bytes);
    });
    const Tensor embedded = multiply(torch::stable::narrow(cuts, 0, 0, count * N), rows_of_weight);
    sequence.embedded = embedded.const_data_ptr();
    sequence.first = first;
    torch::stable::parallel_for(first, first + count, 1,
                                [=, &sequence](int64_t begin, int64_t end) {
                                  PGN_ISA_CALL(finish_tokens)(sequence, dtype, begin, end);
                                });
  }
  return tokens;
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CPU, m) {
  m.impl("prompted_patch_embed", TORCH_BOX(&pgn_fast::prompted_patch_embed_cpu));
}
