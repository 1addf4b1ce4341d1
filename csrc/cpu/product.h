// Products of small matrices, the exponential function, and the layouts that they want; in sums S, float or double.
// Included as vector.h is.
//
// The right-hand side of a product stands in panels of two vectors of columns, each panel row by row, so that what the
// innermost loop reads is contiguous; columns that fill up a vector are zeros.

template <class S>
using WholeVector = typename Whole<S>::Type;

template <class S>
constexpr int64_t lanes = Whole<S>::lanes;
template <class S>
constexpr int64_t panel = 2 * Whole<S>::lanes;

EBFT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
EBFT_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <class S>
EBFT_INLINE WholeVector<S> load_whole(const S* from) {
  return bits_at<WholeVector<S>>(from);
}

template <class S>
EBFT_INLINE void store_whole(S* to, WholeVector<S> x) {
  memcpy(to, &x, sizeof x);
}

template <class S, int Count>
struct PartOfVector {
  typedef S Type __attribute__((vector_size(sizeof(S) * Count)));
};

// One half of the elements with the other, until one is left.
template <class S, int Count, class Combine>
EBFT_INLINE S fold(typename PartOfVector<S, Count>::Type x, const Combine& combine) {
  if constexpr (Count == 2) {
    return combine(x[0], x[1]);
  } else {
    typename PartOfVector<S, Count / 2>::Type halves[2];
    memcpy(halves, &x, sizeof x);
    return fold<S, Count / 2>(combine(halves[0], halves[1]), combine);
  }
}

template <class S>
EBFT_INLINE S sum_of(WholeVector<S> x) {
  return fold<S, Whole<S>::lanes>(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <class S>
EBFT_INLINE S largest_of(WholeVector<S> x) {
  return fold<S, Whole<S>::lanes>(x, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// exp(x) = scale * (1 + rest), for x <= 0; both are 0 below `lowest`. NaN stays.
template <class S>
struct Exponential {
  static constexpr S lowest = sizeof(S) == 8 ? S(-708) : S(-87);  // e^lowest is still a normal number
  WholeVector<S> scale;
  WholeVector<S> rest;

};

template <class S>
EBFT_INLINE Exponential<S> exponential(WholeVector<S> x) {
  using V = WholeVector<S>;
  using Integers = typename Whole<S>::Integers;
  constexpr int bits = Whole<S>::mantissa_bits, terms = sizeof(S) == 8 ? 13 : 7;
  constexpr S log2_e = S(1.44269504088896340736);
  // ln 2 in two parts; the first has so few bits that its multiples are exact.
  constexpr S ln2_high = sizeof(S) == 8 ? S(0x1.62e42feep-1) : S(0x1.62e4p-1);
  constexpr S ln2_low = sizeof(S) == 8 ? S(0x1.a39ef35793c76p-33) : S(0x1.7f7d1cf79abcap-20);
  constexpr S to_integer = S(3) * S(int64_t(1) << (bits - 1));  // adding it rounds to an integer, in the lowest bits
  const V shifted = x * log2_e + to_integer, power = shifted - to_integer;
  const V r = (x - power * ln2_high) - power * ln2_low;  // |r| <= ln(2) / 2
  S coefficient = 1;
  for (int k = 2; k <= terms; ++k) coefficient /= S(k);
  V rest = V{} + coefficient;
  EBFT_UNROLL for (int k = terms; k > 1; --k) {
    coefficient *= S(k);
    rest = rest * r + coefficient;
  }
  rest *= r;
  const Integers exponent = (Integers)shifted << bits;
  const V scale = (V)(exponent + (Integers)(V{} + S(1)));
  const auto too_low = x < V{} + Exponential<S>::lowest;
  return {too_low ? V{} : scale, too_low ? V{} : rest};
}

// exp(x) for x <= 0.
template <class S>
EBFT_INLINE WholeVector<S> exp_of(WholeVector<S> x) {
  const Exponential<S> e = exponential<S>(x);
  return e.scale + e.scale * e.rest;
}

// tanh(x), by e^x - 1, which keeps the digits of small numbers.
template <class S>
EBFT_INLINE WholeVector<S> tanh_of(WholeVector<S> x) {
  using V = WholeVector<S>;
  using Integers = typename Whole<S>::Integers;
  const V minus_zero = -V{};
  const Integers sign = (Integers)x & (Integers)minus_zero;
  const V magnitude = (V)((Integers)x ^ sign);
  const auto [scale, rest] = exponential<S>(-2 * magnitude);
  const V less_one = scale * rest + (scale - 1);
  return (V)((Integers)(-less_one / (less_one + 2)) ^ sign);
}

// How the left-hand side of a product stands in memory, from one element of a column, or of a row, to the next.
template <int64_t Step>
struct Down {  // rows contiguous
  static constexpr int64_t row = Step, column = 1;
};
template <int64_t Step>
struct Across {  // columns contiguous
  static constexpr int64_t row = 1, column = Step;
};

// c [R, C vectors] = or += a [R, depth] * b [depth, C vectors]
template <class S, class Left, int R, int C>
static void product_block(const S* a, const S* b, int64_t depth, S* c, int64_t c_step, bool add) {
  using V = WholeVector<S>;
  V sums[R][C] = {};
  for (int64_t k = 0; k < depth; ++k, a += Left::column, b += panel<S>) {
    V y[C];
    EBFT_UNROLL for (int j = 0; j < C; ++j) y[j] = load_whole(b + j * lanes<S>);
    EBFT_UNROLL_ALL for (int i = 0; i < R; ++i) {
      const S x = a[i * Left::row];
      EBFT_UNROLL for (int j = 0; j < C; ++j) sums[i][j] += x * y[j];
    }
  }
  EBFT_UNROLL_ALL for (int i = 0; i < R; ++i) {
    EBFT_UNROLL for (int j = 0; j < C; ++j) {
      S* to = c + i * c_step + j * lanes<S>;
      // At the end, so that rounding grows with the number of products and not with that of all their terms.
      store_whole(to, add ? load_whole(to) + sums[i][j] : sums[i][j]);
    }
  }
}

template <class S>
using ProductBlock = void (*)(const S*, const S*, int64_t, S*, int64_t, bool);

template <class S, class Left, int C, int... Rows>
EBFT_INLINE ProductBlock<S> product_of_rows(std::integer_sequence<int, Rows...>, int64_t rows) {
  static constexpr ProductBlock<S> blocks[] = {product_block<S, Left, Rows + 1, C>...};
  return blocks[rows - 1];
}

// c [rows, columns] = or += a [rows, depth] * b [depth, columns], where `b_step` takes from one panel of b to the next.
// Columns are written in whole vectors.
template <class Left, class S>
static void product(const S* a, const S* b, int64_t b_step, int64_t rows, int64_t columns, int64_t depth, S* c,
                    int64_t c_step, bool add) {
  const std::make_integer_sequence<int, EBFT_ROWS> sizes;
  const int64_t groups = (rows + EBFT_ROWS - 1) / EBFT_ROWS, least = rows / groups, with_one_more = rows % groups;
  for (int64_t column = 0; column < columns; column += panel<S>, b += b_step) {
    for (int64_t group = 0, i = 0; group < groups; ++group) {
      const int64_t count = least + (group < with_one_more);
      const ProductBlock<S> block = columns - column > lanes<S> ? product_of_rows<S, Left, 2>(sizes, count)
                                                                : product_of_rows<S, Left, 1>(sizes, count);
      block(a + i * Left::row, b, depth, c + i * c_step + column, c_step, add);
      i += count;
    }
  }
}

// `count` elements times `scale`, and zeros to the next whole vector.
template <class T>
static void load_row(const void* row, int64_t count, Sum<T> scale, Sum<T>* to) {
  const T* x = static_cast<const T*>(row);
  int64_t f = 0;
  if constexpr (std::is_same_v<T, double>) {
    for (; f + EBFT_LANES <= count; f += EBFT_LANES) store(to + f, load(x + f) * scale);
  } else {
    for (; f + EBFT_LANES <= count; f += EBFT_LANES) {
      const Floats y = load_floats(x + f) * scale;
      memcpy(to + f, &y, sizeof y);
    }
  }
  for (; f < round_up(count, lanes<Sum<T>>); f += EBFT_LANES) {
    store(to + f, load_part(x + f, larger(0, count - f)) * double(scale));
  }
}

template <class T>
static void store_row(char* row, const Sum<T>* from, Sum<T> scale, int64_t count) {
  T* to = reinterpret_cast<T*>(row);
  int64_t f = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; f + lanes<T> <= count; f += lanes<T>) store_whole(to + f, load_whole(from + f) * scale);
  }
  for_each_vector(count - f, [&](int64_t g, auto&& load_at, auto&& store_at) __attribute__((always_inline)) {
    store_at(to + f + g, load_at(from + f + g) * double(scale));
  });
}

// Rows, a column each: `to` [size, Width] for Width columns at a time, `size * Width` apart; `buffer` [padded size].
template <class T, int64_t Width>
static void lay_across(const char* rows, int64_t stride, int64_t count, int64_t size, Sum<T> scale, Sum<T>* buffer,
                       Sum<T>* to) {
  for (int64_t i = 0; i < round_up(count, lanes<Sum<T>>); ++i) {
    Sum<T>* column = to + i / Width * size * Width + i % Width;
    if (i < count) load_row<T>(rows + i * stride, size, scale, buffer);
    for (int64_t d = 0; d < size; ++d) column[d * Width] = i < count ? buffer[d] : 0;
  }
}

// Rows as the rows of panels, `step` numbers from one panel to the next.
template <class T>
static void lay_down(const char* rows, int64_t stride, int64_t count, int64_t size, Sum<T> scale, Sum<T>* buffer,
                     Sum<T>* to, int64_t step) {
  using S = Sum<T>;
  for (int64_t i = 0; i < count; ++i) {
    load_row<T>(rows + i * stride, size, scale, buffer);
    for (int64_t d = 0; d < size; d += lanes<S>) {
      store_whole(to + d / panel<S> * step + i * panel<S> + d % panel<S>, load_whole(buffer + d));
    }
  }
}
