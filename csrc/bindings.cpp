// The Python module pgn_fast._C: facts about the build and the choice of instruction set. Tensors
// never pass here; they go through the registered ops.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

// MKL chooses its kernels by the processor's vendor, and so does who packs weights for it.
const char* cpu_vendor() {
#ifdef PGN_FAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "other";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pgn_fast (registered as torch ops when this module is imported)";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cpu_isa"] = pgn_fast::isa_name();
        info["cpu_vendor"] = cpu_vendor();
        return info;
      },
      "Compiler, processor's vendor and instruction set.");
  m.def(
      "set_isa", [](const std::string& name) { return pgn_fast::set_isa(name.c_str()); },
      py::arg("name"),
      "Choose \"scalar\", \"avx2\" or \"avx512\"; False where this processor lacks it.");
}
