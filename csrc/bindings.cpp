// The Python module pgn_fast._C: facts about the build and the choice of instruction set. Tensors
// never pass here; they go through the registered ops. Written against Python's limited API, so
// that one binary serves every Python >= 3.10.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "cpu/isa.h"

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

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "compiler", __VERSION__, "cpu_isa", pgn_fast::isa_name(),
                       "cpu_vendor", cpu_vendor());
}

PyObject* set_isa(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "s:set_isa", &name)) return nullptr;
  return PyBool_FromLong(pgn_fast::set_isa(name));
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "build_info()\n--\n\nCompiler, processor's vendor and instruction set."},
    {"set_isa", set_isa, METH_VARARGS,
     "set_isa(name, /)\n--\n\n"
     "Choose \"scalar\", \"avx2\" or \"avx512\"; False where this processor lacks it."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled kernels of pgn_fast (registered as torch ops when this module is imported)",
    0,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&module); }
