// Chooses the instruction set once, by cpuid; set_isa and PGN_FAST_CPU_ISA override it for tests.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace pgn_fast {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};

bool supported(Isa isa) {
#ifdef PGN_FAST_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  return isa == Isa::scalar || (isa == Isa::avx2 ? avx2 : avx512);
#else
  return isa == Isa::scalar;
#endif
}

bool find(const char* name, Isa* found) {
  for (int i = 0; i < 3; ++i) {
    if (!std::strcmp(name, kNames[i]) && supported(static_cast<Isa>(i))) {
      *found = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

Isa detect() {
  Isa isa = Isa::scalar;
  const char* wanted = std::getenv("PGN_FAST_CPU_ISA");
  if (wanted && find(wanted, &isa)) return isa;
  return supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::scalar;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{detect()};
  return isa;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

bool set_isa(const char* name) {
  Isa isa;
  if (!find(name, &isa)) return false;
  current().store(isa);
  return true;
}

}  // namespace pgn_fast
