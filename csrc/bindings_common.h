// What the Python modules share. Tensors arrive as addresses, sizes and strides, so that one binary serves every version
// of torch; the callers in Python check and allocate, and what is cheap to check is checked again here.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdint.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace ebft {

using Sizes = std::vector<int64_t>;

// Address and the strides, in bytes, of the axes B and S of each layer [B, S, C].
using Layers = std::vector<std::tuple<uintptr_t, int64_t, int64_t>>;

inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

template <class Enum>
Enum checked_enum(const char* name, int value, int count) {
  if (value < 0 || value >= count) {
    throw std::invalid_argument(std::string(name) + ": expected a number from 0 to " + std::to_string(count - 1) +
                                ", got " + std::to_string(value));
  }
  return Enum(value);
}

// `sizes` [leading..., n, F] of the rollouts; strides without those of the last axes.
inline void check_strides(const Sizes& sizes, const Sizes& rollout_strides, const Sizes& target_strides) {
  require(sizes.size() >= 2 && sizes.size() == rollout_strides.size() + 1 && sizes.size() == target_strides.size() + 2,
          "strides: expected one for each axis but the last");
}

}  // namespace ebft
