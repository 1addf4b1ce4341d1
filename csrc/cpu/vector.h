// Vectors of EBFT_LANES doubles, and their loads from and stores to arrays of any element type.
//
// Included inside the namespace of one instruction set, with that instruction set switched on; without a guard, because
// each instruction set has types and functions of its own.

typedef double Vector __attribute__((vector_size(8 * EBFT_LANES)));
typedef float Floats __attribute__((vector_size(4 * EBFT_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * EBFT_LANES)));
typedef uint16_t Halfwords __attribute__((vector_size(2 * EBFT_LANES)));

// Not std::min: see includes.h.
EBFT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The conversions by intrinsics where there are some: gcc 12 makes several narrower ones of __builtin_convertvector,
// and warns of what the unmasked ones for AVX-512 do inside.
#if EBFT_LANES == 8

EBFT_INLINE Vector widen(Floats x) { return (Vector)_mm512_maskz_cvtps_pd(0xff, (__m256)x); }
EBFT_INLINE Floats narrow(Vector x) { return (Floats)_mm512_maskz_cvtpd_ps(0xff, (__m512d)x); }
EBFT_INLINE Words words_of(Halfwords x) { return (Words)_mm256_cvtepu16_epi32((__m128i)x); }
EBFT_INLINE Floats floats_of_float16(Halfwords x) { return (Floats)_mm256_cvtph_ps((__m128i)x); }
EBFT_INLINE Halfwords float16_of_floats(Floats x) { return (Halfwords)_mm256_cvtps_ph((__m256)x, 0); }

#elif EBFT_LANES == 4

EBFT_INLINE Vector widen(Floats x) { return (Vector)_mm256_cvtps_pd((__m128)x); }
EBFT_INLINE Floats narrow(Vector x) { return (Floats)_mm256_cvtpd_ps((__m256d)x); }
EBFT_INLINE Words words_of(Halfwords x) { return (Words)_mm_cvtepu16_epi32(_mm_cvtsi64_si128((long long)x)); }
EBFT_INLINE Floats floats_of_float16(Halfwords x) { return (Floats)_mm_cvtph_ps(_mm_cvtsi64_si128((long long)x)); }
EBFT_INLINE Halfwords float16_of_floats(Floats x) {
  return (Halfwords)_mm_cvtsi128_si64(_mm_cvtps_ph((__m128)x, 0));
}

#else

EBFT_INLINE Vector widen(Floats x) { return __builtin_convertvector(x, Vector); }
EBFT_INLINE Floats narrow(Vector x) { return __builtin_convertvector(x, Floats); }
EBFT_INLINE Words words_of(Halfwords x) { return __builtin_convertvector(x, Words); }
EBFT_INLINE Floats floats_of_float16(Halfwords x) {
  Floats y;
  for (int i = 0; i < EBFT_LANES; ++i) y[i] = to_float(Float16{x[i]});
  return y;
}
EBFT_INLINE Halfwords float16_of_floats(Floats x) {
  Halfwords y;
  for (int i = 0; i < EBFT_LANES; ++i) y[i] = to_float16(x[i]).bits;
  return y;
}

#endif

template <class V>
EBFT_INLINE V bits_at(const void* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}

EBFT_INLINE Floats load_floats(const float* from) { return bits_at<Floats>(from); }
EBFT_INLINE Floats load_floats(const BFloat16* from) { return (Floats)(words_of(bits_at<Halfwords>(from)) << 16); }
EBFT_INLINE Floats load_floats(const Float16* from) { return floats_of_float16(bits_at<Halfwords>(from)); }

EBFT_INLINE Vector load(const double* from) { return bits_at<Vector>(from); }
template <class T>
EBFT_INLINE Vector load(const T* from) {
  return widen(load_floats(from));
}

EBFT_INLINE void store(double* to, Vector x) { memcpy(to, &x, sizeof x); }

EBFT_INLINE void store(float* to, Vector x) {
  const Floats y = narrow(x);
  memcpy(to, &y, sizeof y);
}

EBFT_INLINE void store(BFloat16* to, Vector x) {
  const Floats y = narrow(x);
  const Words bits = (Words)y, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, is_nan = (Words)(y != y);
  const Halfwords z = __builtin_convertvector((rounded & ~is_nan) | ((bits >> 16 | 0x40) & is_nan), Halfwords);
  memcpy(to, &z, sizeof z);
}

EBFT_INLINE void store(Float16* to, Vector x) {
  const Halfwords y = float16_of_floats(narrow(x));
  memcpy(to, &y, sizeof y);
}

// The first `count` elements, then zeros.
template <class T>
EBFT_INLINE Vector load_part(const T* from, int64_t count) {
  T part[EBFT_LANES] = {};
  memcpy(part, from, count * sizeof(T));
  return load(part);
}

template <class T>
EBFT_INLINE void store_part(T* to, Vector x, int64_t count) {
  T part[EBFT_LANES];
  store(part, x);
  memcpy(to, part, count * sizeof(T));
}

// What sums of elements T are kept in between ops.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Whole registers of sums, where the arithmetic is not in doubles throughout. Integers are unsigned: they may wrap.
template <class S>
struct Whole;
template <>
struct Whole<double> {
  static constexpr int lanes = EBFT_LANES, mantissa_bits = 52;
  typedef Vector Type;
  typedef uint64_t Integers __attribute__((vector_size(8 * EBFT_LANES)));
};
template <>
struct Whole<float> {
  static constexpr int lanes = 2 * EBFT_LANES, mantissa_bits = 23;
  typedef float Type __attribute__((vector_size(8 * EBFT_LANES)));
  typedef uint32_t Integers __attribute__((vector_size(8 * EBFT_LANES)));
};

// Calls column(f, load_at, store_at) for every vector of `count` elements that starts at f; the last one may be a part.
template <class Column>
EBFT_INLINE void for_each_vector(int64_t count, const Column& column) {
  int64_t f = 0;
  for (; f + EBFT_LANES <= count; f += EBFT_LANES) {
    column(f, [](const auto* from) __attribute__((always_inline)) { return load(from); },
           [](auto* to, Vector x) __attribute__((always_inline)) { store(to, x); });
  }
  const int64_t rest = count - f;
  if (rest > 0) {
    column(f, [rest](const auto* from) __attribute__((always_inline)) { return load_part(from, rest); },
           [rest](auto* to, Vector x) __attribute__((always_inline)) { store_part(to, x, rest); });
  }
}

EBFT_INLINE double sum(Vector x) {
  double total = 0;
  for (int i = 0; i < EBFT_LANES; ++i) total += x[i];
  return total;
}
