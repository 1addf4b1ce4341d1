// Kernels with the mistakes that the emulation is there to find, and one without.
#include "../../csrc/cuda/device.h"

namespace ebft::cuda {
namespace {

__global__ void sound_kernel(double* out) {
  double x[1] = {double(threadIdx.x)};
  block_sum(x);
  out[threadIdx.x] = x[0];
}

__global__ void ends_early_kernel(double* out) {
  if (threadIdx.x == 37) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void waits_elsewhere_kernel(double* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void shuffles_alone_kernel(double* out) {
  double x = threadIdx.x;
  if (threadIdx.x % 2) x = __shfl_xor_sync(0xffffffffu, x, 1);
  out[threadIdx.x] = x;
}

__global__ void reads_unwritten_kernel(double* out) {
  __shared__ double x[64];
  if (threadIdx.x != 5) x[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void reads_unwritten_dynamic_kernel(double* out) {
  if (threadIdx.x != 5) dynamic_shared()[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = dynamic_shared()[threadIdx.x];
}

__global__ void forgets_a_barrier_kernel(double* out) {
  __shared__ double x[64];
  x[threadIdx.x] = 0;
  __syncthreads();
  x[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = x[(threadIdx.x + 63) % 64];
}

__global__ void overwrites_too_early_kernel(double* out) {
  __shared__ double x[2];
  out[threadIdx.x] = 0;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x % 32 == 0) x[threadIdx.x / 32] = i;
    __syncthreads();
    out[threadIdx.x] += x[0] + x[1];
    __syncwarp();
  }
}

__global__ void writes_beyond_kernel(double* out) {
  dynamic_shared()[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

}  // namespace
}  // namespace ebft::cuda

// Runs kernel `which` with 64 threads, which write a number each. What went wrong, or "".
extern "C" const char* emulation_run_broken(int which, double* out) {
  using namespace ebft::cuda;
  constexpr struct {
    const char* name;
    void (*kernel)(double*);
  } kernels[] = {
      {"sound_kernel", sound_kernel},
      {"ends_early_kernel", ends_early_kernel},
      {"waits_elsewhere_kernel", waits_elsewhere_kernel},
      {"shuffles_alone_kernel", shuffles_alone_kernel},
      {"reads_unwritten_kernel", reads_unwritten_kernel},
      {"reads_unwritten_dynamic_kernel", reads_unwritten_dynamic_kernel},
      {"forgets_a_barrier_kernel", forgets_a_barrier_kernel},
      {"overwrites_too_early_kernel", overwrites_too_early_kernel},
      {"writes_beyond_kernel", writes_beyond_kernel},
  };
  static EbftCudaStatus status;
  status = launch(kernels[which].name, kernels[which].kernel, 1, 64, 64 * sizeof(double), nullptr, out);
  return status.message;
}
