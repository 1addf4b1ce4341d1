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

// A tensor of a layout: address, type as torch names it, sizes, and strides in elements.
using LayoutTensor = std::tuple<uintptr_t, std::string, Sizes, Sizes>;

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

inline std::string text_of(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// The numbers of a tensor of a layout, which the kernels find by the layout's sizes alone: another tensor in its place
// would be read, or written, beyond its end.
inline int32_t* int32_array(const char* name, const LayoutTensor& tensor, const Sizes& expected) {
  const auto& [address, type, sizes, strides] = tensor;
  bool contiguous = sizes.size() == strides.size();
  int64_t count = 1;
  for (size_t axis = sizes.size(); contiguous && axis > 0; count *= sizes[--axis]) {
    contiguous = sizes[axis - 1] <= 1 || strides[axis - 1] == count;
  }
  if (type != "torch.int32" || sizes != expected || !(contiguous || count == 0)) {
    throw std::invalid_argument(std::string(name) + ": expected a contiguous torch.int32 tensor " + text_of(expected) +
                                ", got a " + type + " tensor " + text_of(sizes) + " with strides " + text_of(strides));
  }
  require(address != 0 || count == 0, "address: expected that of a tensor, got 0");
  return reinterpret_cast<int32_t*>(address);
}

// `sizes` [leading..., n, F] of the rollouts; strides without those of the last axes.
inline void check_strides(const Sizes& sizes, const Sizes& rollout_strides, const Sizes& target_strides) {
  require(sizes.size() >= 2 && sizes.size() == rollout_strides.size() + 1 && sizes.size() == target_strides.size() + 2,
          "strides: expected one for each axis but the last");
}

}  // namespace ebft
