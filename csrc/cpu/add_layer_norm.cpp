// CPU kernels of pgn_fast.ops.add_layer_norm:
//   total = x + y;   normed = (total - mean(total)) / sqrt(var(total) + eps)
// A task is a few rows; a row stays in the first-level cache while its statistics are taken.
#include "../common.h"
#include "kernels.h"

namespace pgn_fast {
namespace {

constexpr int64_t kGrain = 16384;  // numbers of a task

}  // namespace

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_cpu(const Tensor& x,  // [R, D]
                                                      const Tensor& y,  // [R, D]
                                                      double eps) {
  const int64_t R = x.size(0), D = x.size(1);
  const ScalarType type = x.scalar_type();
  Tensor total = empty<2>(x, type, {R, D}), normed = empty<2>(x, type, {R, D});
  Tensor rstd = empty<1>(x, ScalarType::Float, {R});
  const AddLayerNorm task = {x.const_data_ptr(),
                             y.const_data_ptr(),
                             total.mutable_data_ptr(),
                             normed.mutable_data_ptr(),
                             rstd.mutable_data_ptr<float>(),
                             D,
                             static_cast<float>(eps)};
  const DType dtype = dtype_of(x);
  torch::stable::parallel_for(0, R, ceil_div(kGrain, D), [=](int64_t begin, int64_t end) {
    PGN_ISA_CALL(add_layer_norm_rows)(task, dtype, begin, end);
  });
  return {total, normed, rstd};
}

Tensor add_layer_norm_backward_cpu(const Tensor& grad_total,   // [R, D]
                                   const Tensor& grad_normed,  // [R, D]
                                   const Tensor& normed,       // [R, D]
                                   const Tensor& rstd) {       // [R]
  const int64_t R = normed.size(0), D = normed.size(1);
  Tensor grad = empty<2>(normed, normed.scalar_type(), {R, D});
  const AddLayerNormBackward task = {grad_total.const_data_ptr(), grad_normed.const_data_ptr(),
                                     normed.const_data_ptr(),     rstd.const_data_ptr<float>(),
                                     grad.mutable_data_ptr(),     D};
  const DType dtype = dtype_of(normed);
  torch::stable::parallel_for(0, R, ceil_div(kGrain, D), [=](int64_t begin, int64_t end) {
    PGN_ISA_CALL(add_layer_norm_backward_rows)(task, dtype, begin, end);
  });
  return grad;
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&pgn_fast::add_layer_norm_cpu));
  m.impl("add_layer_norm_backward", TORCH_BOX(&pgn_fast::add_layer_norm_backward_cpu));
}
