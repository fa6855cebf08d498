// CPU kernel of pgn_fast.ops.feedback_round:
//   w[r, j] = levels[r, order[j]] - sum_{i<j} feedback[j, i] * (w[r, i] - q[r, i]),  q = round(w)
//
// The pixels of a prompt depend on each other one by one; prompts do not. So prompts are the SIMD
// lanes, and one pass over the lower triangle of `feedback` (19 MB at n = 3072) serves all of a
// register or two. The errors of 32 prompts (393 kB) still fit the L2 cache.
#include <vector>

#include "../common.h"
#include "kernels.h"

namespace pgn_fast {
namespace {

constexpr int64_t kRows = 32;  // prompts a task

}  // namespace

Tensor feedback_round_cpu(const Tensor& levels_,    // [R, n]
                          const Tensor& feedback_,  // [n, n]
                          const Tensor& order_) {   // [n]
  const Tensor levels = as_contiguous(levels_), feedback = as_contiguous(feedback_);
  const Tensor order = as_contiguous(order_);
  const int64_t R = levels.size(0), n = levels.size(1);
  const float* in = levels.const_data_ptr<float>();
  const float* shares = feedback.const_data_ptr<float>();
  const int64_t* pixels = order.const_data_ptr<int64_t>();

  // a wrong index would write outside the output, a repeated one would leave pixels unset
  std::vector<bool> seen(n);
  for (int64_t j = 0; j < n; ++j) {
    const int64_t pixel = pixels[j];
    STD_TORCH_CHECK(pixel >= 0 && pixel < n && !seen[pixel],
                    "feedback_round: order is not a permutation of the ", n, " pixels: entry ", j,
                    " is ", pixel, ".");
    seen[pixel] = true;
  }

  Tensor rounded = torch::stable::new_empty(levels, {R, n}, ScalarType::Byte);
  uint8_t* out = rounded.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, ceil_div(R, kRows), 1, [=](int64_t begin, int64_t end) {
    std::vector<float> errors(n * kRows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * kRows, rows = R - row < kRows ? R - row : kRows;
      PGN_ISA_CALL(feedback_round_rows)(in + row * n, shares, pixels, n, rows, errors.data(),
                                        out + row * n);
    }
  });
  return rounded;
}

}  // namespace pgn_fast

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CPU, m) {
  m.impl("feedback_round", TORCH_BOX(&pgn_fast::feedback_round_cpu));
}
