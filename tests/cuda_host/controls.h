// What the tests set and ask of kernels that are compiled for the host; see __init__.py.
#pragma once

#include "device.cuh"

extern "C" {
void set_seed(unsigned seed) { pgn_fast::cuda::host::seed = seed; }
void set_shared_limit(int64_t bytes) {
  pgn_fast::cuda::host::shared_limit = bytes;
  pgn_fast::cuda::host::largest_request = 0;
}
int64_t largest_request() { return pgn_fast::cuda::host::largest_request; }
}
