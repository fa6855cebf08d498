// Every schema of the compiled kernels. The public ops, their checks and gradients are Python's
// (pgn_fast/ops); the arguments that arrive here have been checked there.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pgn_fast_C, m) {
  m.def("mix_prompts(Tensor logits, Tensor token_library, str activation) -> Tensor");
  m.def(
      "mix_prompts_backward(Tensor grad_prompts, Tensor logits, Tensor token_library, "
      "str activation) -> (Tensor, Tensor)");
  m.def("feedback_round(Tensor levels, Tensor feedback, Tensor order) -> Tensor");
}
