// Helpers of the torch-facing C++ files: stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>

#include "cpu/isa.h"

namespace pgn_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// contiguous() goes through the dispatcher by name, 2 us a call: skip it where nothing is to do
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// An uninitialized tensor on the device of `like`, contiguous unless `strides` are given; a
// fraction of the cost of torch::stable::new_empty, which looks its op up by name.
template <size_t N>
Tensor empty(const Tensor& like, ScalarType dtype, const std::array<int64_t, N>& sizes,
             const std::array<int64_t, N>& strides) {
  AtenTensorHandle handle = nullptr;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      N, sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

template <size_t N>
Tensor empty(const Tensor& like, ScalarType dtype, const std::array<int64_t, N>& sizes) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t i = N; i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
  return empty(like, dtype, sizes, strides);
}

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(false, "pgn_fast: expected float32, float16 or bfloat16");
  }
}

}  // namespace pgn_fast
