// The 16-bit floating-point formats as bit patterns, and their conversion where the hardware has none.
#pragma once

#include "config.h"

#include <string.h>

namespace ebft {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

EBFT_FN float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

EBFT_FN uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

EBFT_FN float to_float(BFloat16 x) { return float_of_bits(uint32_t(x.bits) << 16); }

EBFT_FN float to_float(Float16 x) {
  const uint32_t exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float magnitude;
  if (exponent == 0) {
    magnitude = float(mantissa) * 0x1p-24f;  // zero and the subnormal numbers
  } else {
    magnitude = float_of_bits((exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13);
  }
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

// To the nearest number, ties to the even one.
EBFT_FN BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};  // quiet: rounding would carry a NaN over into infinity
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// To the nearest number, ties to the even one.
EBFT_FN Float16 to_float16(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  if (x != x) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) {  // in units of the smallest number; the addition rounds as required
    return {uint16_t(sign | (bits_of_float(magnitude + 0.5f) - bits_of_float(0.5f)))};
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return {uint16_t(sign | ((rounded >> 13) - (112 << 10)))};
}

}  // namespace ebft
