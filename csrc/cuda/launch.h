// Launchers of the CUDA kernels: plain data in, no torch header, so that nvcc compiles a kernel
// file in a second and a resource report needs nothing but the file.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace pgn_fast::cuda {

enum class DType : int { float32, float16, bfloat16 };  // element type behind a void pointer

struct MixPrompts {
  const void* logits;   // [R, K]
  const void* library;  // [K, D]
  void* prompts;        // row r is written at row (r / P) * tokens + r % P of width D
  int64_t R;            // B * P
  int K, D, P;
  int64_t tokens;  // rows of an image in the result: P where it holds the prompts alone
  bool softmax;
};
cudaError_t mix_prompts(const MixPrompts& args, DType dtype, cudaStream_t stream);

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
cudaError_t mix_prompts_backward(const MixPromptsBackward& args, DType dtype, cudaStream_t stream);

constexpr int kMaxChannels = 64;

struct PatchEmbed {
  const void* images;  // (B, C, H, W) by the strides below, uint8 or `dtype`
  const void* weight;  // [D, C * p_h * p_w]
  const void* bias;    // [D] or null
  const void* pos;     // [N, D] or null
  void* out;           // [B, tokens, D], patches from row `first` of each image
  int64_t stride_b, stride_c, stride_y, stride_x;
  int B, C, H, W, p_h, p_w, D, tokens, first;
  bool uint8, normalize;
  float scale[kMaxChannels], shift[kMaxChannels];  // of each channel
};
cudaError_t patch_embed(const PatchEmbed& args, DType dtype, cudaStream_t stream);

// The same on Hopper (sm_90a). Bytes of scratch that it needs, 256-byte aligned; 0: it does not
// take these arguments (float32, a patch width that is no multiple of 16, strided pixels).
int64_t patch_embed_sm90_scratch(const PatchEmbed& args, DType dtype);
cudaError_t patch_embed_sm90(const PatchEmbed& args, DType dtype, void* scratch,
                             cudaStream_t stream);

// Copies rows [count, D] (of each image where batch_stride is not 0) to rows `first` of each image.
struct PlaceRows {
  const void* rows;
  void* out;  // [B, tokens, D]
  int64_t batch_stride;
  int B, count, D, tokens, first;
};
cudaError_t place_rows(const PlaceRows& args, DType dtype, cudaStream_t stream);

// A (B, h, T, d) tensor by element strides; the last dimension is contiguous.
struct Heads {
  void* data;
  int64_t batch, head, token;
};

struct PromptAttention {
  Heads q, k, v;             // [B, h, T or Q, d]
  Heads prompt_k, prompt_v;  // [B, h, P, d]; batch stride 0 where the batch shares them
  Heads out;                 // [B, h, Q, d]
  float* lse;                // [B, h, Q]: log of the sum over keys of exp(scale * q k)
  int B, h, Q, T, P, d;      // Q query rows, T keys of an image's own
  float scale;
  // [B, 2]: first and last + 1 of the prompts' rows that an image sees; null: all. Forward only.
  const int64_t* ranges;
};
cudaError_t prompt_attention(const PromptAttention& args, DType dtype, cudaStream_t stream);

struct PromptAttentionBackward {
  PromptAttention forward;
  Heads grad_out;                      // [B, h, Q, d]
  Heads grad_q, grad_k, grad_v;        // null data where not wanted
  Heads grad_prompt_k, grad_prompt_v;  // contiguous; null data where not wanted
  float* delta;                        // scratch: [B, h, Q]
  float* partial;                      // scratch: [2, splits, h, P, d], where the batch shares P
  int splits;                          // of the B * Q rows that a shared prompt key sees
  bool shared;                         // the batch shares the prompts: their gradients are summed
};
// Its first part: delta, and grad_q where it is wanted.
cudaError_t prompt_attention_grad_query(const PromptAttentionBackward& args, DType dtype,
                                        cudaStream_t stream);
cudaError_t prompt_attention_backward(const PromptAttentionBackward& args, DType dtype,
                                      cudaStream_t stream);

}  // namespace pgn_fast::cuda
