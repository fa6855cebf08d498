// The kernels of csrc/cuda compiled for the host, behind plain C functions for ctypes.
#include "device.cuh"

extern "C" {
void set_seed(unsigned seed) { pgn_fast::cuda::host::seed = seed; }
void set_shared_limit(int64_t bytes) {
  pgn_fast::cuda::host::shared_limit = bytes;
  pgn_fast::cuda::host::largest_request = 0;
}
int64_t largest_request() { return pgn_fast::cuda::host::largest_request; }

int mix_prompts(const pgn_fast::cuda::MixPrompts* args, int number) {
  return pgn_fast::cuda::mix_prompts(*args, static_cast<pgn_fast::cuda::Number>(number), nullptr);
}
int mix_prompts_backward(const pgn_fast::cuda::MixPromptsBackward* args, int number) {
  return pgn_fast::cuda::mix_prompts_backward(*args, static_cast<pgn_fast::cuda::Number>(number),
                                              nullptr);
}
#ifndef PGN_FAST_MIX_PROMPTS_ONLY
int prompt_attention(const pgn_fast::cuda::PromptAttention* args, int number) {
  return pgn_fast::cuda::prompt_attention(*args, static_cast<pgn_fast::cuda::Number>(number),
                                          nullptr);
}
int prompt_attention_backward(const pgn_fast::cuda::PromptAttentionBackward* args, int number) {
  return pgn_fast::cuda::prompt_attention_backward(
      *args, static_cast<pgn_fast::cuda::Number>(number), nullptr);
}
int patch_embed(const pgn_fast::cuda::PatchEmbed* args, int number) {
  return pgn_fast::cuda::patch_embed(*args, static_cast<pgn_fast::cuda::Number>(number), nullptr);
}
int64_t patch_embed_sm90_scratch(const pgn_fast::cuda::PatchEmbed* args, int number) {
  return pgn_fast::cuda::patch_embed_sm90_scratch(*args,
                                                  static_cast<pgn_fast::cuda::Number>(number));
}
int patch_embed_sm90(const pgn_fast::cuda::PatchEmbed* args, int number, void* scratch) {
  return pgn_fast::cuda::patch_embed_sm90(*args, static_cast<pgn_fast::cuda::Number>(number),
                                          scratch, nullptr);
}
int place_rows(const pgn_fast::cuda::PlaceRows* args, int number) {
  return pgn_fast::cuda::place_rows(*args, static_cast<pgn_fast::cuda::Number>(number), nullptr);
}
#endif
}
