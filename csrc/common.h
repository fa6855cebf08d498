// Helpers of the torch-facing C++ files: stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/isa.h"

namespace pgn_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// contiguous() goes through the dispatcher by name, 2 us a call: skip it where nothing is to do
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline Number number_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Number::float32;
    case ScalarType::Half:
      return Number::float16;
    case ScalarType::BFloat16:
      return Number::bfloat16;
    default:
      STD_TORCH_CHECK(false, "pgn_fast: expected float32, float16 or bfloat16");
  }
}

}  // namespace pgn_fast
