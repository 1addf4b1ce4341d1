// What every header of core/ needs: it is compiled for the host by any C++17 compiler and for the device by nvcc.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define EBFT_FN __host__ __device__ inline
#else
#define EBFT_FN inline
#endif

namespace ebft {

// A number of rollouts that the compiler knows, so that loops unroll and arrays become registers. Where it is known at
// run time only, functions that take a `Size n` are called with an int.
template <int Value>
struct Fixed {
  EBFT_FN constexpr operator int() const { return Value; }
};

// Neither NaN nor infinite.
EBFT_FN bool is_finite(double x) { return x - x == 0; }

// max(x, lowest) that keeps NaN.
EBFT_FN double at_least(double x, double lowest) { return x < lowest ? lowest : x; }

}  // namespace ebft
