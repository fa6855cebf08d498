// What each csrc/cpu/isa/<op>.inc provides, once per instruction set. Plain data only (see isa.h).
#pragma once

#include "isa.h"

namespace pgn_fast {

// coefficients[r, k] = softmax or sigmoid over k of logits[r, k], in float32
PGN_DECLARE_ISA(void mixture_rows(const void* logits, DType dtype, bool softmax, int64_t K,
                                  int64_t rows, float* coefficients))

// prompts[r, d] = sum_k coefficients[r, k] * library[k, d] for columns [column, column + width);
// `sums` is scratch for rows * width floats
PGN_DECLARE_ISA(void mix_columns(const float* coefficients, const void* library, DType dtype,
                                 int64_t K, int64_t D, int64_t rows, int64_t column, int64_t width,
                                 float* sums, void* prompts))

// From logits and the gradient `grads` of their coefficients: the gradient of the logits, in place,
// and the coefficients themselves in `weights`; all [rows, K] of one element type. `scratch` is for
// K + 16 floats, zero after the first K.
PGN_DECLARE_ISA(void mix_logit_rows(const void* logits, void* grads, DType dtype, bool softmax,
                                    int64_t K, int64_t rows, float* scratch, void* weights))

struct Patches {
  const void* images;  // [B, C, H, W] by the four strides, in elements
  bool bytes;          // uint8, else the element type of the patches
  int64_t C, H, W, p_h, p_w;
  int64_t stride_b, stride_c, stride_y, stride_x;
  const float *scale, *shift;  // [C], or null: pixels as they are
};
// patches[n, (c, dy, dx)] for rows of patches [begin, end), counted over all images
PGN_DECLARE_ISA(void cut_patches(const Patches& patches, DType dtype, int64_t begin, int64_t end,
                                 void* out))

struct Sequence {
  const void* embedded;   // [images from `first` on, N, D]: patches x weight
  const void* bias;       // [D] or null
  const void* pos_embed;  // [N, D] or null
  const void* prefix;     // [S, D]
  const void* prompts;    // [P, D] every prompts_stride elements an image
  void* tokens;           // [B, S + N + P, D]
  int64_t first, S, N, P, D, prompts_stride;
  bool prompts_first;
};
// writes the whole sequences of images [begin, end)
PGN_DECLARE_ISA(void finish_tokens(const Sequence& sequence, DType dtype, int64_t begin,
                                   int64_t end))

constexpr int64_t kQueryBlock = 64;  // queries that see all keys at once

struct Rows {  // [B, h, rows, d] with a unit last stride
  const void* data;
  int64_t stride_b, stride_h, stride_row;
};
struct Attention {
  Rows q, k, v, prompt_k, prompt_v;  // prompts shared by the batch: stride_b is not used
  const int64_t* ranges;             // [B, 2]: rows of shared prompts that an image sees; null: all
  int64_t h, Q, T, P, d;             // P: of the longest range
  int64_t padded_d;                  // d, rounded up to 16
  float scale;
  bool shared, backward;
  void* out;   // forward: [B, Q, h, d]
  float* lse;  // [B, h, Q]
  // backward alone
  Rows grad_out, attended;
  bool want_q, want_kv, want_prompts;
  void *grad_q, *grad_k, *grad_v;  // [B, rows, h, d]
  int64_t partial_stride;          // from image to image, where prompts are not shared
};
// one head of images [begin, end)
PGN_DECLARE_ISA(void attention_forward(const Attention& attention, DType dtype, int64_t h,
                                       int64_t begin, int64_t end, float* scratch))
// `partial` gets the gradients of prompt_k and prompt_v, [2, P, d], summed over the images where
// prompts are shared
PGN_DECLARE_ISA(void attention_backward(const Attention& attention, DType dtype, int64_t h,
                                        int64_t begin, int64_t end, float* scratch, float* partial))
// out[i] = sum over splits, in their order, of partial[split * stride + i]
PGN_DECLARE_ISA(void sum_splits(const float* partial, int64_t splits, int64_t stride, int64_t count,
                                DType dtype, void* out))

struct AddLayerNorm {
  const void *x, *y;     // [R, D]
  void *total, *normed;  // [R, D]
  float* rstd;           // [R]
  int64_t D;
  float eps;
};
// rows [begin, end) of total = x + y and of its normalization
PGN_DECLARE_ISA(void add_layer_norm_rows(const AddLayerNorm& task, DType dtype, int64_t begin,
                                         int64_t end))

struct AddLayerNormBackward {
  const void *grad_total, *grad_normed, *normed;  // [R, D]
  const float* rstd;                              // [R]
  void* grad;                                     // [R, D]
  int64_t D;
};
PGN_DECLARE_ISA(void add_layer_norm_backward_rows(const AddLayerNormBackward& task, DType dtype,
                                                  int64_t begin, int64_t end))

// rounds `rows` <= 32 prompts of n pixels with error feedback; `errors` is scratch for n * 32
// floats
PGN_DECLARE_ISA(void feedback_round_rows(const float* levels, const float* feedback,
                                         const int64_t* order, int64_t n, int64_t rows,
                                         float* errors, uint8_t* rounded))

// the sum of 64-bit words of `bytes` bytes, the first of them word `first` of all
PGN_DECLARE_ISA(uint64_t fingerprint_words(const uint8_t* data, int64_t bytes, uint64_t first))

}  // namespace pgn_fast
