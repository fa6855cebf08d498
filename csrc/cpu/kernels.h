// What each csrc/cpu/isa/<op>.inc provides, once per instruction set. Plain data only (see isa.h).
#pragma once

#include "isa.h"

namespace pgn_fast {

// coefficients[r, k] = softmax or sigmoid over k of logits[r, k], in float32, for rows [begin, end)
PGN_DECLARE_ISA(void mixture_rows(const void* logits, Number number, bool softmax, int64_t K,
                                  int64_t begin, int64_t end, float* coefficients))

// prompts[r, d] = sum_k coefficients[r, k] * library[k, d] for rows [row, row_end) and columns
// [column, column_end)
PGN_DECLARE_ISA(void mix_tile(const float* coefficients, const void* library, Number number,
                              int64_t K, int64_t D, int64_t row, int64_t row_end, int64_t column,
                              int64_t column_end, void* prompts))

// rounds `rows` <= 32 prompts of n pixels with error feedback; `errors` is scratch for n * 32 floats
PGN_DECLARE_ISA(void feedback_round_rows(const float* levels, const float* feedback,
                                         const int64_t* order, int64_t n, int64_t rows,
                                         float* errors, uint8_t* rounded))

}  // namespace pgn_fast
