// Launchers of the CUDA kernels: plain data in, no torch header, so that nvcc compiles a kernel
// file in a second and a resource report needs nothing but the file.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace pgn_fast::cuda {

enum class Number : int { float32, float16, bfloat16 };  // element type behind a void pointer

struct MixPrompts {
  const void* logits;   // [R, K]
  const void* library;  // [K, D]
  void* prompts;        // [R, D]
  int64_t R;            // B * P
  int K, D;
  bool softmax;
};
cudaError_t mix_prompts(const MixPrompts& args, Number number, cudaStream_t stream);

struct MixPromptsBackward {
  const void* grad_prompts;  // [R, D]
  const void* logits;        // [R, K]
  const void* library;       // [K, D]
  void* grad_logits;         // [R, K]
  void* grad_library;        // [K, D]
  void* statistics;          // scratch: [R] pairs of float32, row maximum and 1 / sum
  void* partial;             // scratch: [splits, K, D] float32, unused where splits is 1
  int64_t R, rows_per_split;
  int K, D, splits;
  bool softmax;
};
cudaError_t mix_prompts_backward(const MixPromptsBackward& args, Number number,
                                 cudaStream_t stream);

}  // namespace pgn_fast::cuda
