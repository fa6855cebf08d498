// Every schema of the compiled kernels. The public ops, their checks and gradients are Python's
// (pgn_fast/ops); the arguments that arrive here have been checked there.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pgn_fast_C, m) {
  m.def("mix_prompts(Tensor logits, Tensor token_library, str activation) -> Tensor");
  m.def(
      "mix_prompts_backward(Tensor grad_prompts, Tensor logits, Tensor token_library, "
      "str activation) -> (Tensor, Tensor)");
  // no backward: see pgn_fast/ops/prompted_patch_embed.py
  m.def(
      "prompted_patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, "
      "Tensor prefix, Tensor? logits, Tensor? token_library, Tensor? prompts, float[] scale, "
      "float[] shift, str activation, str position) -> Tensor");
  m.def(
      "prompt_attention(Tensor q, Tensor k, Tensor v, Tensor prompt_k, Tensor prompt_v, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "prompt_attention_ragged(Tensor q, Tensor k, Tensor v, Tensor prompt_k, Tensor prompt_v, "
      "Tensor ranges, float scale) -> (Tensor, Tensor)");
  m.def(
      "prompt_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor prompt_k, "
      "Tensor prompt_v, Tensor out, Tensor lse, float scale, bool grad_q, bool grad_kv, "
      "bool grad_prompts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("add_layer_norm(Tensor x, Tensor y, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_backward(Tensor grad_total, Tensor grad_normed, Tensor normed, Tensor rstd) "
      "-> Tensor");
  m.def("feedback_round(Tensor levels, Tensor feedback, Tensor order) -> Tensor");
  // no public op: pgn_fast/backbone/watch.py calls it
  m.def("weights_fingerprint(Tensor[] weights, int lines, int begin, int end) -> int");
}
