// Helpers of the CUDA kernels' torch-facing files: the current stream, errors of a launch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../common.h"
#include "launch.h"

namespace pgn_fast::cuda {

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline DType dtype_of(const Tensor& x) { return static_cast<DType>(pgn_fast::dtype_of(x)); }

// Raises where a launch failed, naming the op, the tensor that sizes it and its device, and leaves
// no error in the runtime for the next launch to find.
void check_launch(cudaError_t error, const char* op, const Tensor& x);

// Mixes the prompts into rows `first` on of every image of out [B, tokens, D].
void mix_prompts_into(const Tensor& logits, const Tensor& token_library,
                      const std::string& activation, Tensor& out, int64_t first);

}  // namespace pgn_fast::cuda
