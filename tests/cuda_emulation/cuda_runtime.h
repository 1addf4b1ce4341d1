// Stands in for CUDA's header of this name, so that any C++17 compiler turns the kernels into code for the CPU: as much
// of CUDA as csrc/cuda uses. The threads of a block are fibers that run one at a time, and one block runs at a time.
//
// Shared memory holds NaN (all bits 1) whenever a block starts. A launch fails, and cudaGetErrorString says why, if
// threads wait for others that do not come, or write beyond the shared memory that they asked for. The threads may be
// run in another order (emulation_set_order): what changes a result then is a race.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
// Static without saying so, as CUDA's are, and all in one place, where they can be found to be overwritten.
#define __shared__ thread_local

// As nvcc defines them; no GPU is this old.
#define __CUDA_ARCH_LIST__ 100
#define CUDART_VERSION 13000

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

namespace emulation {

constexpr int warp_size = 32;

// What a thread waits for: the others of its warp that are in `mask`, or (mask 0) all threads of the block.
struct Wait {
  const char* what;
  const char* file;
  int line;
  uint32_t mask;

  bool operator==(const Wait& other) const {
    return line == other.line && mask == other.mask && !strcmp(file, other.file) && !strcmp(what, other.what);
  }
};

// Returns when all whom it waits for wait for the same. Gives away `sent`, and returns what lane `source` gave.
uint64_t meet(const Wait& wait, uint64_t sent = 0, int source = 0);

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

inline int lane() { return int(threadIdx.x % warp_size); }

template <class T>
T shuffle(const Wait& wait, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "CUDA shuffles at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = meet(wait, bits, source >= 0 && source < warp_size ? source : lane());
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

#define EMULATED_WAIT(what, mask) (emulation::Wait{what, __FILE__, __LINE__, mask})
#define __syncthreads() emulation::meet(EMULATED_WAIT("__syncthreads", 0))
#define __syncwarp() emulation::meet(EMULATED_WAIT("__syncwarp", 0xffffffffu))
#define __shfl_sync(mask, value, from) emulation::shuffle(EMULATED_WAIT("__shfl_sync", mask), value, from)
#define __shfl_xor_sync(mask, value, by) \
  emulation::shuffle(EMULATED_WAIT("__shfl_xor_sync", mask), value, emulation::lane() ^ (by))
#define __shfl_down_sync(mask, value, by) \
  emulation::shuffle(EMULATED_WAIT("__shfl_down_sync", mask), value, emulation::lane() + int(by))

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  return emulation::run(*config, [&] { std::apply(kernel, copies); });
}
