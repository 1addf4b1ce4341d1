// From codes and numbers that are known at run time to types and constants that the compiler knows.
#pragma once

#include "../core/config.h"
#include "../core/half.h"

namespace ebft::cuda {

template <class T>
struct Type {
  using type = T;
};

// Calls run(Type<T>()) for the element type with this code; false if there is none.
template <class Run>
bool with_dtype(int code, const Run& run) {
  switch (code) {
    case 0: return run(Type<double>()), true;
    case 1: return run(Type<float>()), true;
    case 2: return run(Type<BFloat16>()), true;
    case 3: return run(Type<Float16>()), true;
    default: return false;
  }
}

// Calls run(rows, tiled) for n + 1 rows of which all inner products are wanted: those of `rows` rows fit the registers
// of a thread. Where they are fewer than n + 1, rows are taken in tiles of that many.
template <class Run>
void with_rows(int64_t n, const Run& run) {
  if (n <= 1) return run(Fixed<2>(), Fixed<false>());
  if (n <= 2) return run(Fixed<3>(), Fixed<false>());
  if (n <= 4) return run(Fixed<5>(), Fixed<false>());
  if (n <= 8) return run(Fixed<9>(), Fixed<false>());
  run(Fixed<5>(), Fixed<true>());
}

}  // namespace ebft::cuda
