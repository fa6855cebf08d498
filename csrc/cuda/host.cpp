// Errors of a launch, and facts about this library that Python reads without a GPU.
#include "host.h"

namespace pgn_fast::cuda {

void check_launch(cudaError_t error, const char* op, const Tensor& x) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  std::string shape;
  for (int64_t i = 0; i < x.dim(); ++i) {
    shape += (i > 0 ? ", " : "") + std::to_string(x.size(i));
  }
  cudaDeviceProp properties;
  const bool known = cudaGetDeviceProperties(&properties, x.get_device_index()) == cudaSuccess;
  if (!known) cudaGetLastError();
  STD_TORCH_CHECK(false, op, ": the CUDA kernels failed on cuda:", x.get_device_index(), " (",
                  known ? properties.name : "unknown device", ") for (", shape,
                  "): ", cudaGetErrorString(error), ". backend=\"reference\" runs eager PyTorch.");
}

}  // namespace pgn_fast::cuda

// What pgn_fast/_native.py asks. The architectures are those of the machine code in this very file.
extern "C" {
__attribute__((visibility("default"))) const char* pgn_fast_cuda_archs() {
  return PGN_FAST_CUDA_ARCHS;
}
__attribute__((visibility("default"))) int pgn_fast_cuda_runtime_version() {
  return CUDART_VERSION;
}
// the newest CUDA that the driver runs; 0 without a driver
__attribute__((visibility("default"))) int pgn_fast_cuda_driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) cudaGetLastError();
  return version;
}
}
