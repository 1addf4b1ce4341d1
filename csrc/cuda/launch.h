// Starting kernels, and telling what went wrong: every function of api.h fills an EbftCudaStatus through these.
#pragma once

#include "api.h"

#include <cuda_runtime.h>
#include <stdio.h>

#include <utility>

namespace ebft::cuda {

constexpr int warp_size = 32;
// Threads that share one row or one anchor: enough to have all loads of a row of usual length on the way at once.
constexpr int most_threads = 128;

inline EbftCudaStatus bad_argument(const char* what, long long got) {
  EbftCudaStatus status = {ebft_cuda_bad_argument, {}};
  snprintf(status.message, sizeof status.message, "%s, got %lld", what, got);
  return status;
}

// For a number that stands for one of `count` choices.
inline EbftCudaStatus bad_choice(const char* name, int count, int got) {
  EbftCudaStatus status = {ebft_cuda_bad_argument, {}};
  snprintf(status.message, sizeof status.message, "%s: expected a number from 0 to %d, got %d", name, count - 1, got);
  return status;
}

inline EbftCudaStatus null_address(const char* name) {
  EbftCudaStatus status = {ebft_cuda_bad_argument, {}};
  snprintf(status.message, sizeof status.message, "%s: expected an address, got null", name);
  return status;
}

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Threads for a row of `count` elements that are read 16 bytes at a time: whole warps, none of them idle.
inline int threads_for(int64_t count, int64_t element_bytes) {
  const int64_t warp_bytes = 16 * warp_size, bytes = count * element_bytes;
  const int64_t warps = (bytes + warp_bytes - 1) / warp_bytes;
  return int(warps < 1 ? 1 : warps < most_threads / warp_size ? warps : most_threads / warp_size) * warp_size;
}

// Starts `blocks` blocks on a stream; none is fine.
template <class... Parameters, class... Arguments>
EbftCudaStatus launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                      void* stream, Arguments&&... arguments) {
  EbftCudaStatus status = {};
  if (blocks == 0) return status;
  cudaError_t error = cudaErrorInvalidConfiguration;
  if (blocks <= 0x7fffffff) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error == cudaSuccess) return status;
  cudaGetLastError();  // this error is reported here, and not once more by whoever asks next
  status.error = int32_t(error);
  snprintf(status.message, sizeof status.message, "%s (%lld blocks of %d threads, %lld bytes of shared memory): %s: %s",
           name, static_cast<long long>(blocks), threads, static_cast<long long>(shared_bytes),
           cudaGetErrorName(error), cudaGetErrorString(error));
  return status;
}

}  // namespace ebft::cuda
