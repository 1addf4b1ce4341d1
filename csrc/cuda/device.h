// What kernels share: loads and stores of 16 bytes, conversions, loops over a row, sums over a block.
#pragma once

#include "../core/config.h"
#include "../core/half.h"

#include <cuda_runtime.h>
#include <string.h>

#include "launch.h"

namespace ebft::cuda {

// In what sums of elements are kept between ops, and within a thread: float64 for float64, else float32.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

// How many elements 16 bytes hold.
template <class T>
constexpr int wide = 16 / int(sizeof(T));

inline __device__ double widen(double x) { return x; }
inline __device__ float widen(float x) { return x; }
inline __device__ float widen(BFloat16 x) { return to_float(x); }
inline __device__ float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return to_float(x);
#endif
}

// To the nearest number, ties to the even one.
template <class T>
__device__ T narrow(Sum<T> x) {
  return x;
}
template <>
inline __device__ BFloat16 narrow<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  return to_bfloat16(x);
#endif
}
template <>
inline __device__ Float16 narrow<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  return to_float16(x);
#endif
}

// `Width` elements that lie side by side, as they were loaded: a row's elements wait in half the registers if they are
// widened one by one. More than one element: the address is a multiple of 16, or of their size if that is less.
template <class T, int Width>
struct Pack {
  static constexpr int words = Width * int(sizeof(T)) / 4 > 0 ? Width * int(sizeof(T)) / 4 : 1;
  uint32_t word[words];

  __device__ Sum<T> operator[](int i) const {
    T x;
    if constexpr (sizeof(T) == 2) {
      const uint16_t bits = uint16_t(word[i / 2] >> i % 2 * 16);
      memcpy(&x, &bits, sizeof x);
    } else {
      memcpy(&x, &word[i * (int(sizeof(T)) / 4)], sizeof x);
    }
    return widen(x);
  }
};

template <int Width, class T>
__device__ Pack<T, Width> load(const T* from) {
  Pack<T, Width> pack = {};
  if constexpr (Width * sizeof(T) == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    memcpy(pack.word, &words, sizeof words);
  } else {
    for (int i = 0; i < Width; ++i) memcpy(reinterpret_cast<T*>(pack.word) + i, from + i, sizeof(T));
  }
  return pack;
}

// Loads `Width` numbers from float32, or float64, memory: one or more times 16 bytes.
template <int Width, class T>
__device__ void load_sums(const T* from, T (&to)[Width]) {
  constexpr int step = Width < wide<T> ? Width : wide<T>;
#pragma unroll
  for (int start = 0; start < Width; start += step) {
    const Pack<T, step> pack = load<step>(from + start);
    for (int i = 0; i < step; ++i) to[start + i] = pack[i];
  }
}

template <int Width, class T>
__device__ void store(T* to, const Sum<T> (&from)[Width]) {
  constexpr int step = Width < wide<T> ? Width : wide<T>;
#pragma unroll
  for (int start = 0; start < Width; start += step) {
    T narrowed[step];
    for (int i = 0; i < step; ++i) narrowed[i] = narrow<T>(from[start + i]);
    if constexpr (step * sizeof(T) == 16) {
      uint4 words;
      memcpy(&words, narrowed, sizeof words);
      *reinterpret_cast<uint4*>(to + start) = words;
    } else {
      for (int i = 0; i < step; ++i) to[start + i] = narrowed[i];
    }
  }
}

// The threads of a block share a row of `count` elements: calls body(f, width), where `width` is the number of elements
// from f on that the thread takes, wide<T> at a time if the row is `aligned` to 16 bytes and 1 else and in the end.
template <class T, class Body>
__device__ void for_each_piece(int64_t count, bool aligned, const Body& body) {
  const int64_t whole = aligned ? count / wide<T> * wide<T> : 0;
  for (int64_t f = threadIdx.x * wide<T>; f < whole; f += blockDim.x * wide<T>) body(f, Fixed<wide<T>>());
  for (int64_t f = whole + threadIdx.x; f < count; f += blockDim.x) body(f, Fixed<1>());
}

// The shared memory that a launch asked for.
inline __device__ double* dynamic_shared() {
  extern __shared__ double dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// Replaces each number by its sum over the threads of the block, in the same order every time.
template <int Count>
__device__ void block_sum(double (&x)[Count]) {
  __shared__ double of_warp[most_threads / warp_size][Count];
// Not unrolled, which saves code; the numbers do not wait for each other.
#pragma unroll 1
  for (int lane = warp_size / 2; lane > 0; lane /= 2) {
#pragma unroll
    for (int i = 0; i < Count; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], lane);
  }
  if (blockDim.x == warp_size) return;
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % warp_size == 0) {
#pragma unroll
    for (int i = 0; i < Count; ++i) of_warp[threadIdx.x / warp_size][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Count; ++i) x[i] = of_warp[0][i];
#pragma unroll 1
  for (unsigned warp = 1; warp < blockDim.x / warp_size; ++warp) {
#pragma unroll
    for (int i = 0; i < Count; ++i) x[i] += of_warp[warp][i];
  }
}

}  // namespace ebft::cuda
