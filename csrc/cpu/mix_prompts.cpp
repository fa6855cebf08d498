// CPU kernels of pgn_fast.ops.mix_prompts:  prompts = mixture(logits) @ token_library
//
// The coefficients of all R = B * P rows go into one float32 buffer; tiles of rows x columns of the
// product are then shared among the threads. Where rows are many, the product is left to torch's
// GEMM, which wins there (see bench/results).
#include <string>

#include "../common.h"
#include "kernels.h"

namespace pgn_fast {
namespace {

constexpr int64_t kTileColumns = 64;
constexpr int64_t kOwnProductRows = 64;  // up to here our tiles beat the library's GEMM

Tensor coefficients_of(const Tensor& logits, bool softmax) {
  const int64_t R = logits.size(0) * logits.size(1), K = logits.size(2);
  Tensor coefficients = torch::stable::new_empty(logits, {R, K}, ScalarType::Float);
  float* out = coefficients.mutable_data_ptr<float>();
  const void* z = logits.const_data_ptr();
  const Number number = number_of(logits);
  torch::stable::parallel_for(0, R, ceil_div(16384, K), [=](int64_t begin, int64_t end) {
    PGN_ISA_CALL(mixture_rows)(z, number, softmax, K, begin, end, out);
  });
  return coefficients;
}

}  // namespace

Tensor mix_prompts_cpu(const Tensor& logits_,         // [B, P, K]
                       const Tensor& token_library_,  // [K, D]
                       const std::string& activation) {
  const Tensor logits = as_contiguous(logits_), token_library = as_contiguous(token_library_);
  const int64_t B = logits.size(0), P = logits.size(1), K = logits.size(2);
  const int64_t D = token_library.size(1), R = B * P;
  const Tensor coefficients = coefficients_of(logits, activation == "softmax");
  if (R > kOwnProductRows) {
    const Tensor weights = torch::stable::to(coefficients, token_library.scalar_type());
    return torch::stable::view(torch::stable::matmul(weights, token_library), {B, P, D});
  }
  Tensor prompts = torch::stable::new_empty(token_library, {B, P, D});
  const float* weights = coefficients.const_data_ptr<float>();
  const void* library = token_library.const_data_ptr();
  void* out = prompts.mutable_data_ptr();
  const Number number = number_of(token_library);
  torch::stable::parallel_for(0, ceil_div(D, kTileColumns), 1, [=](int64_t begin, int64_t end) {
    const int64_t column_end = end * kTileColumns < D ? end * kTileColumns : D;
    PGN_ISA_CALL(mix_tile)(weights, library, number, K, D, 0, R, begin * kTileColumns, column_end,
                           out);
  });
  return prompts;
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CPU, m) {
  m.impl("mix_prompts", TORCH_BOX(&pgn_fast::mix_prompts_cpu));
}
