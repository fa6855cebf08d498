// float32 GEMMs by the oneDNN that is bundled with torch.
//
// torch's own go to MKL, whose AVX-512 kernels run on Intel's processors alone;
// pgn_fast/ops/onednn.py does the same from Python.
#pragma once

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "../common.h"

namespace pgn_fast {

// x [R, K] @ weight [D, K]^T, float32; none where this torch has no oneDNN.
inline std::optional<Tensor> onednn_linear(const Tensor& x, const Tensor& weight) {
#ifdef PGN_FAST_X86
  static std::atomic<bool> missing{false};
  if (missing) return std::nullopt;
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(weight),
                                    from(std::optional<Tensor>()),
                                    from(std::string("none")),
                                    from(std::vector<double>()),
                                    from(std::optional<std::string>(""))};
  if (torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION) ==
      TORCH_SUCCESS) {
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  missing = true;
#endif
  return std::nullopt;
}

}  // namespace pgn_fast
