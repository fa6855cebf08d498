// What the kernels of prompt_attention share: the tiles of an image's keys, blocks of query rows,
// and the choice of a kernel by alignment and head width.
#pragma once

#include "device.cuh"

namespace pgn_fast::cuda {
namespace {

constexpr int kKeys = 64, kRowsPerWarp = 16;

template <typename T>
__device__ inline T* row_of(const Heads& x, int b, int h, int64_t token) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + token * x.token;
}

// The tiles of keys of one (image, head): its own tokens, then the prompts, where kRagged those of
// the image's range.
template <bool kRagged>
struct KeyTiles {
  int own, total, begin = 0, end;
  __device__ KeyTiles(const PromptAttention& a, int b)
      : own(static_cast<int>(ceil_div(a.T, kKeys))), end(a.P) {
    if constexpr (kRagged) {
      begin = static_cast<int>(a.ranges[2 * b]);
      end = static_cast<int>(a.ranges[2 * b + 1]);
    }
    total = own + static_cast<int>(ceil_div(end - begin, kKeys));
  }
  __device__ int first(int tile) const {
    return tile < own ? tile * kKeys : begin + (tile - own) * kKeys;
  }
  __device__ int count(const PromptAttention& a, int tile) const {
    const int left = (tile < own ? a.T : end) - first(tile);
    return left < kKeys ? left : kKeys;
  }
  __device__ const Heads& keys(const PromptAttention& a, int tile) const {
    return tile < own ? a.k : a.prompt_k;
  }
  __device__ const Heads& values(const PromptAttention& a, int tile) const {
    return tile < own ? a.v : a.prompt_v;
  }
};

template <typename T, int kD, int kWarps>
struct QueryBlock {
  static constexpr int kThreads = kWarps * 32, kRows = kWarps * kRowsPerWarp;
  static constexpr int kStride = tile_stride<T>(kD);
  static constexpr int kScratch = sizeof(T) == 4 ? kRows * tile_stride<T>(kKeys) : 0;

  __device__ static void load_keys(T* tile, const Heads& x, int b, int h, int first, int count,
                                   int d, bool aligned) {
    load_tile<T, kKeys, kD, kThreads>(tile, row_of<T>(x, b, h, first), x.token, count, d, aligned);
    commit_copies();
  }
  __device__ static T* warp_scratch(T* scratch) {
    return scratch + warp_id() * kRowsPerWarp * tile_stride<T>(kKeys);
  }
};

template <typename T>
bool aligned_heads(const Heads& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch * sizeof(T) % 16 == 0 &&
         x.head * sizeof(T) % 16 == 0 && x.token * sizeof(T) % 16 == 0;
}

template <typename T>
bool all_aligned(const PromptAttention& a) {
  return aligned_heads<T>(a.q) && aligned_heads<T>(a.k) && aligned_heads<T>(a.v) &&
         (a.P == 0 || (aligned_heads<T>(a.prompt_k) && aligned_heads<T>(a.prompt_v)));
}

template <typename T>
bool all_aligned(const PromptAttentionBackward& g) {
  return all_aligned<T>(g.forward) && aligned_heads<T>(g.forward.out) &&
         aligned_heads<T>(g.grad_out);
}

// Calls function(integral constant) with the padded head width.
template <typename Function>
cudaError_t with_width(int d, Function function) {
  if (d <= 32) return function(std::integral_constant<int, 32>());
  if (d <= 64) return function(std::integral_constant<int, 64>());
  if (d <= 96) return function(std::integral_constant<int, 96>());
  if (d <= 128) return function(std::integral_constant<int, 128>());
  return cudaErrorInvalidValue;
}

}  // namespace

}  // namespace pgn_fast::cuda
