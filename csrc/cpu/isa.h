// Instruction-set dispatch for the CPU kernels, and the element types that they read.
//
// Every csrc/cpu/isa/<op>.inc is compiled once per instruction set inside namespace
// pgn_fast::PGN_ISA (see CMakeLists.txt). Those objects must hold no weak symbols: the linker could
// merge an AVX-512 copy of a shared inline function into code that runs on every machine. So this
// header includes no C++ standard or torch header, and helpers there live in anonymous namespaces.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace pgn_fast {

enum class Isa : int { scalar, avx2, avx512 };

Isa isa();  // the best that this processor has, or what set_isa chose
const char* isa_name();
bool set_isa(const char* name);  // for tests; false where the processor lacks it

struct bfloat16 {
  uint16_t bits;
};
#if defined(__aarch64__) && !defined(__clang__) && __GNUC__ < 13
using float16 = __fp16;  // C++ has _Float16 there since GCC 13
#else
using float16 = _Float16;
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define PGN_FAST_X86 1
#define PGN_DECLARE_ISA(declaration) \
  namespace scalar {                 \
  declaration;                       \
  }                                  \
  namespace avx2 {                   \
  declaration;                       \
  }                                  \
  namespace avx512 {                 \
  declaration;                       \
  }
#define PGN_ISA_CALL(function)                                     \
  (::pgn_fast::isa() == ::pgn_fast::Isa::avx512 ? avx512::function \
   : ::pgn_fast::isa() == ::pgn_fast::Isa::avx2 ? avx2::function   \
                                                : scalar::function)
#else
#define PGN_DECLARE_ISA(declaration) \
  namespace scalar {                 \
  declaration;                       \
  }
#define PGN_ISA_CALL(function) (scalar::function)
#endif

enum class DType : int { float32, float16, bfloat16 };  // element type behind a void pointer

constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace pgn_fast
