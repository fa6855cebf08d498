// The patch rows of prompted_patch_embed on Hopper: warpgroup products (wgmma) with the pixels in
// registers and the weight by tensor copies (TMA). CMake compiles this file for sm_90a alone, the
// one architecture that has these instructions.
//
// A thread of a warpgroup product holds four numbers of a patch in each step of 16: with
// t = lane % 4, those at 2t, 2t + 1, 2t + 8 and 2t + 9. The order of the inner dimension is ours to
// choose, so number 16t + 4j + i of a panel of 64 is taken to step j: a thread's pixels of a whole
// panel are 16 neighbors in memory, one or two loads, and never pass through shared memory.
// prepare_kernel brings the weight into that order, and folds the normalization into it: weight *
// scale, and a float32 bias that holds the shifts. uint8 pixels are centered by 128, which leaves
// them exact in either 16-bit type.
//
// A block makes 128 patches x 128 columns: two warpgroups of 64 patches, and one warp that keeps
// kStages panels of the weight coming. The result leaves through shared memory in rows of 256
// bytes.
#include "hopper.cuh"

namespace pgn_fast::cuda {
namespace {

constexpr int kStages = 4, kRows = 128, kColumns = 128, kThreads = 2 * 128 + 32;
constexpr int kPixels = 16;  // neighbors that a thread takes of every panel
constexpr int kBoxBytes = kColumns * kPanel * 2;

// Where number k of a row of the weight stands in the order of the products.
__host__ __device__ inline int product_order(int k) {
  const int t = k % kPanel / 16, j = k % 16 / 4, i = k % 4;
  return k / kPanel * kPanel + j * 16 + i / 2 * 8 + t * 2 + i % 2;
}

// One warp a row of the weight.
template <typename T>
__global__ void __launch_bounds__(128) prepare_kernel(PatchEmbed a, T* weight, float* bias) {
  const int area = a.p_h * a.p_w, K = a.C * area, d = blockIdx.x * 4 + warp_id();
  if (d >= a.D) return;
  const T* row = static_cast<const T*>(a.weight) + int64_t{d} * K;
  float sum = 0.0f;
  for (int k = lane_id(); k < K; k += 32) {
    const float w = to_float(row[k]), scale = a.normalize ? a.scale[k / area] : 1.0f;
    const float shift = a.normalize ? a.shift[k / area] : 0.0f;
    weight[int64_t{d} * K + product_order(k)] = from_float<T>(w * scale);
    // the centering is undone by the exact weight: pixels average near 128, so the rounding of
    // the folded weight must not be multiplied by it
    sum += w * shift + (a.uint8 ? 128.0f * w * scale : 0.0f);
  }
  sum = lanes_sum<32>(sum);
  if (lane_id() == 0) {
    bias[d] = sum + (a.bias ? to_float(static_cast<const T*>(a.bias)[d]) : 0.0f);
  }
}

// kPixels neighbors as they come from memory, and pairs of them as operands.
template <typename T, typename Pixel>
struct alignas(16) Pixels {
  Pixel values[kPixels];

  __device__ uint32_t pair(int i) const {
    if constexpr (sizeof(Pixel) == 1) {
      return pack<T>(centered(values[i]), centered(values[i + 1]));
    } else {
      uint32_t bits;
      memcpy(&bits, values + i, 4);
      return bits;
    }
  }
  // value - 128: the byte as the last of a float of 2^23, which needs no integer conversion
  static __device__ float centered(uint8_t value) {
    const uint32_t bits = 0x4b000000u | value;
    float x;
    memcpy(&x, &bits, 4);
    return x - 8388736.0f;
  }
};

template <typename T, typename Pixel>
__global__ void __launch_bounds__(kThreads, 1)
    patch_embed_sm90_kernel(PatchEmbed a, const float* bias,
#ifdef PGN_FAST_CUDA_HOST
                            TensorMap weight
#else
                            const __grid_constant__ TensorMap weight
#endif
    ) {
#if defined(PGN_FAST_CUDA_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  T* boxes = reinterpret_cast<T*>(dynamic_shared());  // [kStages, kColumns, kPanel], swizzled
  Barrier* full = reinterpret_cast<Barrier*>(boxes + kStages * kColumns * kPanel);  // [kStages]
  Barrier* empty = full + kStages;                                                  // [kStages]
  const int columns = a.W / a.p_w, N = a.H / a.p_h * columns, area = a.p_h * a.p_w;
  const int panels = a.C * area / kPanel, column_blocks = ceil_div(a.D, kColumns);
  // columns vary fastest: the blocks that share pixels run together and find them in the L2 cache
  const int first_column = blockIdx.x % column_blocks * kColumns;
  const int first_row = blockIdx.x / column_blocks * kRows, patches = a.B * N;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, kThreads / 32 - 1);  // one arrival of each warp that multiplies
    }
    barriers_visible();
  }
  __syncthreads();

  if (warp_id() == 8) {  // the warp that keeps the weight coming
    if (lane_id() == 0) {
      for (int panel = 0; panel < panels; ++panel) {
        const int s = panel % kStages, round = panel / kStages;
        if (round > 0) barrier_wait(empty + s, (round - 1) % 2);
        barrier_expect(full + s, kBoxBytes);
        copy_box(boxes + s * kColumns * kPanel, &weight, full + s, first_column, panel * kPanel);
      }
    }
  } else {
    const int group = warp_id() / 4, t = lane_id() % 4;
    const int row = group * 64 + warp_id() % 4 * 16 + lane_id() / 4;  // and row + 8
    const Pixel* corner[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = first_row + row + 8 * i, b = m / N, n = m % N;
      corner[i] = m < patches ? static_cast<const Pixel*>(a.images) + b * a.stride_b +
                                    int64_t{n / columns} * a.p_h * a.stride_y + n % columns * a.p_w
                              : nullptr;
    }
    Pixels<T, Pixel> next[2];
    auto fetch = [&](int panel) {
      const int k = panel * kPanel + t * kPixels, c = k / area, y = k % area / a.p_w, x = k % a.p_w;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // rows past the end read the first pixels there are; their sums are not stored
        const Pixel* from = corner[i] ? corner[i] + c * a.stride_c + y * a.stride_y + x
                                      : static_cast<const Pixel*>(a.images);
        next[i] = *reinterpret_cast<const Pixels<T, Pixel>*>(from);
      }
    };
    fetch(0);
    float sums[64] = {};
    for (int panel = 0; panel < panels; ++panel) {
      uint32_t left[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        left[j][0] = next[0].pair(4 * j);
        left[j][1] = next[1].pair(4 * j);
        left[j][2] = next[0].pair(4 * j + 2);
        left[j][3] = next[1].pair(4 * j + 2);
      }
      if (panel + 1 < panels) fetch(panel + 1);
      const int s = panel % kStages;
      barrier_wait(full + s, panel / kStages % 2);
#pragma unroll
      for (int j = 0; j < 16; ++j) settle(left[j / 4][j % 4]);
#pragma unroll
      for (int i = 0; i < 64; ++i) settle(sums[i]);
      products_begin();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply_warpgroup<T>(sums, left[j], boxes + s * kColumns * kPanel, 16 * j);
      }
      products_end();
      // products_end waits for this warp's own products only, so each warp arrives for itself
      if (lane_id() == 0) barrier_arrive(empty + s);
    }

    // every box has been read by both warpgroups before their room is used for the result
    barrier_wait(empty + (panels - 1) % kStages, (panels - 1) / kStages % 2);
    constexpr int kStride = kColumns + 8;
    T* tile = boxes + group * 64 * kStride;  // [64, kColumns]
    const T* pos = static_cast<const T*>(a.pos);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = first_row + row + 8 * i, n = m < patches ? m % N : 0;
#pragma unroll
      for (int block = 0; block < kColumns / 8; ++block) {
        // columns past the end read column 0: without a branch all loads are under way at once
        const int d = first_column + block * 8 + t * 2, column = d < a.D ? d : 0;
        const float2 add = *reinterpret_cast<const float2*>(bias + column);
        uint32_t bits = 0;
        if (pos) memcpy(&bits, __builtin_assume_aligned(pos + int64_t{n} * a.D + column, 4), 4);
        T position[2];
        memcpy(position, &bits, 4);
        bits = pack<T>(sums[block * 4 + i * 2] + add.x + to_float(position[0]),
                       sums[block * 4 + i * 2 + 1] + add.y + to_float(position[1]));
        memcpy(tile + (row - group * 64 + 8 * i) * kStride + block * 8 + t * 2, &bits, 4);
      }
    }
    warpgroup_barrier(group);
    for (int i = threadIdx.x % 128; i < 64 * kColumns / 8; i += 128) {
      const int r = i / (kColumns / 8), d = first_column + i % (kColumns / 8) * 8;
      const int m = first_row + group * 64 + r;
      if (m < patches && d < a.D) {
        const int b = m / N, n = m - b * N;
        T* to = static_cast<T*>(a.out) + (int64_t{b} * a.tokens + a.first + n) * a.D + d;
        *reinterpret_cast<uint4*>(to) =
            *reinterpret_cast<const uint4*>(tile + r * kStride + d - first_column);
      }
    }
  }
#else
  __trap();  // compiled without sm_90a's instructions: fail, and never return what was not written
#endif
}

template <typename T, typename Pixel>
cudaError_t launch_embed(const PatchEmbed& a, void* scratch, cudaStream_t stream) {
  const int64_t patches = int64_t{a.B} * (a.H / a.p_h) * (a.W / a.p_w);
  const int K = a.C * a.p_h * a.p_w;
  T* weight = static_cast<T*>(scratch);
  float* bias = reinterpret_cast<float*>(weight + int64_t{a.D} * K);
  cudaError_t error =
      launch(prepare_kernel<T>, dim3(ceil_div(a.D, 4)), 128, 0, stream, a, weight, bias);
  if (error != cudaSuccess) return error;
  TensorMap map;
  error = make_tensor_map<T>(&map, weight, a.D, K, kColumns);
  if (error != cudaSuccess) return error;
  const size_t bytes = kStages * (kBoxBytes + 2 * sizeof(Barrier));
  return launch(patch_embed_sm90_kernel<T, Pixel>,
                dim3(ceil_div(patches, kRows) * ceil_div(a.D, kColumns)), kThreads, bytes, stream,
                a, static_cast<const float*>(bias), map);
}

}  // namespace

int64_t patch_embed_sm90_scratch(const PatchEmbed& a, DType dtype) {
  const int pixel = a.uint8 ? 1 : 2, K = a.C * a.p_h * a.p_w;
  const bool whole = a.p_w % kPixels == 0 && K % kPanel == 0 && a.D % 8 == 0;
  const bool rows =
      a.stride_x == 1 && a.stride_y * pixel % 16 == 0 && a.stride_c * pixel % 16 == 0 &&
      a.stride_b * pixel % 16 == 0 && reinterpret_cast<uintptr_t>(a.images) % 16 == 0 &&
      reinterpret_cast<uintptr_t>(a.out) % 16 == 0 && reinterpret_cast<uintptr_t>(a.pos) % 4 == 0;
  // patches and blocks are counted in 32 bits
  const bool few = int64_t{a.B} * (a.H / a.p_h) * (a.W / a.p_w) <= INT32_MAX - kRows;
  if (dtype == DType::float32 || !whole || !rows || !few) return 0;
  return int64_t{a.D} * K * 2 + int64_t{a.D} * 4;
}

cudaError_t patch_embed_sm90(const PatchEmbed& a, DType dtype, void* scratch, cudaStream_t stream) {
  if (int64_t{a.B} * a.H * a.W == 0) return cudaSuccess;
  if (dtype == DType::bfloat16) {
    return a.uint8 ? launch_embed<bfloat16, uint8_t>(a, scratch, stream)
                   : launch_embed<bfloat16, bfloat16>(a, scratch, stream);
  }
  return a.uint8 ? launch_embed<float16, uint8_t>(a, scratch, stream)
                 : launch_embed<float16, float16>(a, scratch, stream);
}

}  // namespace pgn_fast::cuda
