// Runs the CUDA kernels' source on the host: every thread of a block is a fiber, blocks run one
// after the other. It stands in for csrc/cuda/device.cuh's device instructions and models what can
// go wrong:
//   - background copies land only when they are waited for: a missing wait leaves poison behind;
//   - the fibers run in an order shuffled by a seed, and shared memory starts as poison: a missing
//     barrier is seen as a wrong or unstable result;
//   - a barrier that not all threads reach, an unaligned copy, or more shared memory than the card
//     has is an error of the launch.
// It does not model timing, memory ordering between warps without barriers, or a GPU's rounding of
// the order of additions inside one tensor-core instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#undef __shared__
#define __shared__ static  // one block at a time
#undef __global__
#define __global__
#undef __host__
#define __host__
#undef __device__
#define __device__
#undef __launch_bounds__
#define __launch_bounds__(...)
#define __syncthreads() ::pgn_fast::cuda::host::block_barrier()
#define __syncwarp() ::pgn_fast::cuda::host::warp_barrier()
#define threadIdx (::pgn_fast::cuda::host::current().index)
#define blockIdx (::pgn_fast::cuda::host::block_index)

namespace pgn_fast::cuda {
namespace host {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  dim3 index;
  ucontext_t context;
  std::vector<char> stack;
  std::vector<Copy> open;                 // copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, not yet landed
  bool done = false;
  int64_t block_waits = 0, warp_waits = 0, group_waits = 0;  // barriers reached
};

inline dim3 block_index;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline int running = 0;
inline unsigned seed = 0;  // of the order in which fibers run
inline std::vector<char> shared_bytes;
inline size_t shared_limit = 163 * 1024;  // an A100's; what a block may ask for
inline size_t largest_request = 0;
// what the lanes of each warp exchange
struct Exchange {
  float value[32];
  const void* address[32];
};
inline std::vector<Exchange> exchanges;

inline Fiber& current() { return *fibers[running]; }
inline void pause() { swapcontext(&current().context, &scheduler); }
inline int lane() { return running % 32; }
inline Exchange& warp() { return exchanges[running / 32]; }

inline bool failed = false;

// The launch ends here and returns an error; what the fibers hold is not unwound.
inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s (thread %d)\n", what, running);
  failed = true;
  pause();
}

// A fiber goes on once every other of its group has reached as many barriers as it has.
template <typename Count>
inline void barrier(int begin, int end, Count count) {
  const int64_t mine = ++count(current());
  for (bool all = false; !all;) {
    all = true;
    for (int i = begin; i < end; ++i) {
      if (count(*fibers[i]) < mine) {
        if (fibers[i]->done) fail("a barrier that another thread left out");
        all = false;
      }
    }
    if (!all) pause();
  }
}
inline void block_barrier() {
  barrier(0, static_cast<int>(fibers.size()), [](Fiber& f) -> int64_t& { return f.block_waits; });
}
inline void warp_barrier() {
  const int begin = running / 32 * 32;
  barrier(begin, std::min<int>(begin + 32, fibers.size()),
          [](Fiber& f) -> int64_t& { return f.warp_waits; });
}

inline std::function<void()> body;
inline void enter() {
  body();
  current().done = true;
  swapcontext(&current().context, &scheduler);
}

inline void run_block(int threads, size_t bytes) {
  shared_bytes.assign(bytes, static_cast<char>(0xff));  // NaN in every format
  exchanges.resize((threads + 31) / 32);
  if (static_cast<int>(fibers.size()) != threads) fibers.clear();
  for (int i = 0; i < threads; ++i) {
    if (static_cast<int>(fibers.size()) <= i) {
      fibers.push_back(std::make_unique<Fiber>());
      fibers[i]->stack.resize(256 * 1024);
    }
    Fiber& f = *fibers[i];
    f.index = dim3(i);
    f.open.clear();
    f.groups.clear();
    f.done = false;
    f.block_waits = f.warp_waits = f.group_waits = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (bool any = true; any && !failed;) {
    any = false;
    for (int i : order) {
      if (fibers[i]->done || failed) continue;
      any = true;
      running = i;
      swapcontext(&scheduler, &fibers[i]->context);
    }
  }
}

}  // namespace host

inline float shuffle_xor(float x, int mask) {
  host::warp().value[host::lane()] = x;
  host::warp_barrier();
  const float y = host::warp().value[host::lane() ^ mask];
  host::warp_barrier();
  return y;
}

inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // results below the normal numbers are flushed
}

inline float fast_reciprocal(float x) { return 1.0f / x; }

inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16) host::fail("copy_async to an unaligned address");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16) {
    host::fail("copy_async from an unaligned address");
  }
  std::memset(to, 0xff, 16);
  host::current().open.push_back({to, from, bytes});
}
inline void commit_copies() {
  host::current().groups.push_back(std::move(host::current().open));
  host::current().open.clear();
}
template <int kPending>
inline void wait_copies() {
  auto& groups = host::current().groups;
  while (static_cast<int>(groups.size()) > kPending) {
    for (const host::Copy& c : groups.front()) {
      std::memset(c.to, 0, 16);
      std::memcpy(c.to, c.from, c.bytes);
    }
    groups.erase(groups.begin());
  }
}

namespace host {
template <bool kTransposed>
inline void matrices(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("load_matrices from an unaligned address");
  warp().address[lane()] = row;
  warp_barrier();
  const int l = lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int line = kTransposed ? l % 4 * 2 + j : l / 4,
                column = kTransposed ? l / 4 : l % 4 * 2 + j;
      pair[j] = static_cast<const uint16_t*>(warp().address[i * 8 + line])[column];
    }
    std::memcpy(&r[i], pair, 4);
  }
  warp_barrier();
}
}  // namespace host
inline void load_matrices(uint32_t (&r)[4], const void* row) { host::matrices<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  host::matrices<true>(r, row);
}

inline float half_bits(uint16_t bits, __half) { return __half2float(__half(__half_raw{bits})); }
inline float half_bits(uint16_t bits, __nv_bfloat16) {
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}

// --- Hopper ----------------------------------------------------------------------------------
struct TensorMap {
  const char* matrix;
  int64_t rows, columns, box_rows;
};
template <typename T>
cudaError_t make_tensor_map(TensorMap* map, const T* matrix, uint64_t rows, uint64_t columns,
                            uint32_t box_rows) {
  if (columns * sizeof(T) % 16) return cudaErrorInvalidValue;
  *map = {reinterpret_cast<const char*>(matrix), static_cast<int64_t>(rows),
          static_cast<int64_t>(columns), box_rows};
  return cudaSuccess;
}

using Barrier = uint64_t;
namespace host {
struct Box {
  char* to;
  TensorMap map;
  int row, column;
};
struct BarrierState {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0, phase = 0;
  std::vector<Box> boxes;  // under way
};
inline std::map<Barrier*, BarrierState> barriers;
inline BarrierState& state(Barrier* barrier) {
  if (!barriers.count(barrier)) fail("a barrier that was not initialized");
  return barriers[barrier];
}
inline void turn(BarrierState& b) {
  if (b.pending == 0 && b.bytes == 0) ++b.phase, b.pending = b.arrivals;
}
// 128 bytes a row, 16-byte chunks swizzled by the row; zeros where the matrix ends
inline void land(BarrierState& b) {
  for (const Box& box : b.boxes) {
    for (int r = 0; r < box.map.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const int64_t row = box.row + r, column = box.column + c;
        char* to = box.to + r * 128 + (c / 8 ^ r % 8) * 16 + c % 8 * 2;
        std::memset(to, 0, 2);
        if (row < box.map.rows && column < box.map.columns) {
          std::memcpy(to, box.map.matrix + (row * box.map.columns + column) * 2, 2);
        }
      }
    b.bytes -= box.map.box_rows * 128;
  }
  if (!b.boxes.empty()) b.boxes.clear(), turn(b);
}
}  // namespace host
inline void barrier_init(Barrier* barrier, int arrivals) {
  host::barriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}
inline void barriers_visible() {}
inline void barrier_arrive(Barrier* barrier) {
  host::BarrierState& b = host::state(barrier);
  --b.pending;
  host::turn(b);
}
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  host::state(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  for (int tries = 0; host::state(barrier).phase % 2 == parity; ++tries) {
    if (tries > 100000) host::fail("a barrier that never completes");
    host::land(host::state(barrier));
    host::pause();
  }
}
inline void copy_box(void* shared, const TensorMap* map, Barrier* barrier, int row, int column) {
  if (reinterpret_cast<uintptr_t>(shared) % 1024) host::fail("copy_box to an unaligned box");
  std::memset(shared, 0xff, map->box_rows * 128);
  host::state(barrier).boxes.push_back({static_cast<char*>(shared), *map, row, column});
}
inline void settle(uint32_t&) {}
inline void settle(float&) {}
inline void warpgroup_barrier(int group) {
  const int begin = host::running / 128 * 128;
  if (begin != group * 128) host::fail("a warpgroup barrier of another warpgroup");
  host::barrier(begin, begin + 128, [](host::Fiber& f) -> int64_t& { return f.group_waits; });
}
inline void products_begin() {}
inline void products_end() {}

namespace host {
struct GroupFragments {
  uint32_t a[128][4];
};
inline GroupFragments group_fragments[8];
}  // namespace host
template <typename T>
inline void multiply_warpgroup(float (&c)[64], const uint32_t (&a)[4], const T* box, int k) {
  const int group = host::running / 128, thread = host::running % 128;
  host::GroupFragments& f = host::group_fragments[group];
  std::copy(a, a + 4, f.a[thread]);
  warpgroup_barrier(group);
  float left[2][16];
  for (int i = 0; i < 2; ++i)
    for (int kk = 0; kk < 16; ++kk) {
      const int lane = thread / 4 % 8 * 4 + kk % 8 / 2;
      const uint32_t x = f.a[thread / 32 * 32 + lane][i + kk / 8 * 2];
      left[i][kk] = half_bits(static_cast<uint16_t>(x >> kk % 2 * 16), T());
    }
  for (int i = 0; i < 64; ++i) {
    const int n = i / 4 * 8 + thread % 4 * 2 + i % 2;
    for (int kk = 0; kk < 16; ++kk) {
      const int chunk = (k + kk) / 8 ^ n % 8;
      uint16_t bits;
      std::memcpy(&bits,
                  reinterpret_cast<const char*>(box) + n * 128 + chunk * 16 + (k + kk) % 8 * 2, 2);
      c[i] += left[i % 4 / 2][kk] * half_bits(bits, T());
    }
  }
  warpgroup_barrier(group);
}

namespace host {
struct Fragments {
  uint32_t a[32][4], b[32][2];
};
inline std::vector<Fragments> fragments;
}  // namespace host

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::fragments.resize(host::exchanges.size());
  host::Fragments& f = host::fragments[host::running / 32];
  const int l = host::lane();
  std::copy(a, a + 4, f.a[l]);
  f.b[l][0] = b0, f.b[l][1] = b1;
  host::warp_barrier();
  for (int i = 0; i < 4; ++i) {
    const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = f.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t y = f.b[column * 4 + k % 8 / 2][k / 8];
      const int shift = k % 2 * 16;
      c[i] += half_bits(static_cast<uint16_t>(x >> shift), T()) *
              half_bits(static_cast<uint16_t>(y >> shift), T());
    }
  }
  host::warp_barrier();
}

inline char* dynamic_shared() {
  const uintptr_t p = reinterpret_cast<uintptr_t>(host::shared_bytes.data());
  return reinterpret_cast<char*>((p + 1023) / 1024 * 1024);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t bytes,
                   cudaStream_t, Arguments... arguments) {
  host::body = [=] { kernel(arguments...); };
  host::failed = false;
  host::largest_request = std::max(host::largest_request, bytes);
  if (bytes > host::shared_limit) return cudaErrorInvalidValue;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        host::block_index = dim3(x, y, z);
        host::run_block(threads, bytes + 1024);
        if (host::failed) return cudaErrorLaunchFailure;
      }
  return cudaSuccess;
}

}  // namespace pgn_fast::cuda

using std::fmaf;
