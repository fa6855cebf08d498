// A sum over the bytes of frozen weights, by which pgn_fast/backbone/watch.py sees that they were
// written:  sum over 64-bit words of (low half + key_i) (high half + key'_i)  modulo 2^64, i the
// word's place in all weights one after the other.
//
// A word that changes changes the sum but for a chance of about 2^-32, and so do many of them
// (NH of UMAC, Black et al., CRYPTO 1999). The sum of a range is the difference of two prefixes.
#include <vector>

#include "../common.h"
#include "kernels.h"

namespace pgn_fast {
namespace {

constexpr int64_t kLine = 64;                // bytes that memory is read by
constexpr int64_t kTask = int64_t{1} << 17;  // bytes a thread sums before it asks for more

struct Span {
  const uint8_t* data;
  int64_t bytes;
  uint64_t first;  // word
};

uint64_t sum_of(const std::vector<Span>& spans) {
  std::vector<uint64_t> sums(spans.size());
  torch::stable::parallel_for(
      0, static_cast<int64_t>(spans.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          sums[i] = PGN_ISA_CALL(fingerprint_words)(spans[i].data, spans[i].bytes, spans[i].first);
        }
      });
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

// `lines` > 1: as many lines of each tensor, spread evenly from its first to its last, or all of a
// smaller one. 0: the words [begin, end) of all tensors one after the other, each of them begun at
// a whole word.
int64_t weights_fingerprint_cpu(std::vector<Tensor> weights,  // bytes: contiguous uint8
                                int64_t lines, int64_t begin, int64_t end) {
  uint64_t total = 0;
  int64_t base = 0;  // word
  std::vector<Span> spans;
  for (const Tensor& weight : weights) {
    const auto* data = static_cast<const uint8_t*>(weight.const_data_ptr());
    const int64_t bytes = weight.numel(), words = ceil_div(bytes, 8);
    if (lines > 1) {
      const int64_t whole = bytes / kLine;
      if (whole <= lines) {
        total += PGN_ISA_CALL(fingerprint_words)(data, bytes, static_cast<uint64_t>(base));
      } else {
        for (int64_t i = 0; i < lines; ++i) {
          const int64_t line = i * (whole - 1) / (lines - 1);
          total += PGN_ISA_CALL(fingerprint_words)(data + kLine * line, kLine,
                                                   static_cast<uint64_t>(base + 8 * line));
        }
      }
    } else {
      int64_t from = begin > base ? begin - base : 0;
      const int64_t to = end - base < words ? end - base : words;
      for (; from < to; from += kTask / 8) {
        const int64_t stop = from + kTask / 8 < to ? from + kTask / 8 : to;
        const int64_t last = 8 * stop < bytes ? 8 * stop : bytes;
        spans.push_back({data + 8 * from, last - 8 * from, static_cast<uint64_t>(base + from)});
      }
    }
    base += words;
  }
  return static_cast<int64_t>(lines > 1 ? total : sum_of(spans));
}

}  // namespace pgn_fast

// no public op, whose schema would stand in pgn_fast/ops: pgn_fast/backbone/watch.py calls it
STABLE_TORCH_LIBRARY_FRAGMENT(pgn_fast_C, m) {
  m.def("weights_fingerprint(Tensor[] weights, int lines, int begin, int end) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(pgn_fast_C, CPU, m) {
  m.impl("weights_fingerprint", TORCH_BOX(&pgn_fast::weights_fingerprint_cpu));
}
