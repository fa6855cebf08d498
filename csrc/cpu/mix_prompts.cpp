// CPU kernels of pgn_fast.ops.mix_prompts:  prompts = mixture(logits) @ token_library
//
// Few rows (R = B * P): one parallel region, in which every task computes all coefficients again (a
// few microseconds) and then its own columns of the product. Many rows: the coefficients first,
// then torch's GEMM, which runs at the machine's peak. So does the backward.
#include <memory>
#include <string>

#include "../common.h"
#include "kernels.h"

namespace pgn_fast {
namespace {

constexpr int64_t kOwnProductRows = 256;  // up to here our product beats the library's GEMM
constexpr int64_t kColumns = 64;          // of a task
constexpr int64_t kGrain = 16384;         // coefficients of a task

}  // namespace

Tensor mix_prompts_cpu(const Tensor& logits,         // [B, P, K]
                       const Tensor& token_library,  // [K, D]
                       const std::string& activation) {
  const int64_t B = logits.size(0), P = logits.size(1), K = logits.size(2);
  const int64_t D = token_library.size(1), R = B * P;
  const bool softmax = activation == "softmax";
  const DType dtype = dtype_of(logits);
  const void* z = logits.const_data_ptr();
  if (R > kOwnProductRows) {
    const Tensor weights = empty<2>(logits, ScalarType::Float, {R, K});
    float* coefficients = weights.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, R, ceil_div(kGrain, K), [=](int64_t begin, int64_t end) {
      const char* rows = static_cast<const char*>(z) + begin * K * size_of(dtype);
      PGN_ISA_CALL(mixture_rows)(rows, dtype, softmax, K, end - begin, coefficients + begin * K);
    });
    const Tensor rounded =
        dtype == DType::float32 ? weights : torch::stable::to(weights, token_library.scalar_type());
    return torch::stable::view(torch::stable::matmul(rounded, token_library), {B, P, D});
  }
  Tensor prompts = empty<3>(token_library, token_library.scalar_type(), {B, P, D});
  const void* library = token_library.const_data_ptr();
  void* out = prompts.mutable_data_ptr();
  torch::stable::parallel_for(0, ceil_div(D, kColumns), 1, [=](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[R * (K + kColumns)]);
    PGN_ISA_CALL(mixture_rows)(z, dtype, softmax, K, R, scratch.get());
    for (int64_t column = begin * kColumns; column < end * kColumns && column < D;
         column += kColumns) {
      const int64_t width = D - column < kColumns ? D - column : kColumns;
      PGN_ISA_CALL(mix_columns)(scratch.get(), library, dtype, K, D, R, column, width,
                                scratch.get() + R * K, out);
    }
  });
  return prompts;
}

std::tuple<Tensor, Tensor> mix_prompts_backward_cpu(const Tensor& grad_prompts,   // [B, P, D]
                                                    const Tensor& logits,         // [B, P, K]
                                                    const Tensor& token_library,  // [K, D]
                                                    const std::string& activation) {
  using torch::stable::matmul, torch::stable::transpose, torch::stable::view;
  const int64_t B = logits.size(0), P = logits.size(1), K = logits.size(2);
  const int64_t D = token_library.size(1), R = B * P;
  const bool softmax = activation == "softmax";
  const DType dtype = dtype_of(logits);
  const Tensor grad_rows = view(grad_prompts, {R, D});
  // the gradient of the coefficients, which becomes that of the logits in place
  const Tensor grad_logits = matmul(grad_rows, transpose(token_library, 0, 1));  // [R, K]
  const Tensor weights = empty<2>(logits, logits.scalar_type(), {R, K});
  const char* z = static_cast<const char*>(logits.const_data_ptr());
  char *grads = static_cast<char*>(grad_logits.mutable_data_ptr()),
       *coefficients = static_cast<char*>(weights.mutable_data_ptr());
  torch::stable::parallel_for(0, R, ceil_div(kGrain, K), [=](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[K + 16]());
    const int64_t at = begin * K * size_of(dtype);
    PGN_ISA_CALL(mix_logit_rows)(z + at, grads + at, dtype, softmax, K, end - begin, scratch.get(),
                                 coefficients + at);
  });
  return {view(grad_logits, {B, P, K}), matmul(transpose(weights, 0, 1), grad_rows)};
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CPU, m) {
  m.impl("mix_prompts", TORCH_BOX(&pgn_fast::mix_prompts_cpu));
  m.impl("mix_prompts_backward", TORCH_BOX(&pgn_fast::mix_prompts_backward_cpu));
}
