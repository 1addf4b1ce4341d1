// The Gram matrix of a few long rows. Included as vector.h is.
//
// Rows are taken in blocks small enough for all sums of a pair of blocks to stay in registers. Up to EBFT_WHOLE rows
// are one block, so that each element is loaded and widened once; beyond, columns are taken in pieces that stay in
// the cache while all pairs of blocks go over them.

// Adds to `gram` [?, count] the inner products of rows[0, R) with cols[0, C), over `features` columns. With `Triangle`
// both are the same rows and only products of row i with rows k >= i are computed.
template <int R, int C, bool Triangle, class T>
static void gram_block(const void* const* rows, const void* const* cols, int64_t offset, int64_t features,
                       double* gram, int count) {
  const T *left[R], *right[C];
  Vector sums[R][C] = {};
  for (int i = 0; i < R; ++i) left[i] = static_cast<const T*>(rows[i]) + offset;
  for (int k = 0; k < C; ++k) right[k] = static_cast<const T*>(cols[k]) + offset;
  const auto accumulate = [&](auto&& load_at) __attribute__((always_inline)) {
    Vector x[C];
    EBFT_UNROLL for (int k = 0; k < C; ++k) x[k] = load_at(right[k]);
    EBFT_UNROLL for (int i = 0; i < R; ++i) {
      const Vector y = Triangle ? x[i] : load_at(left[i]);
      EBFT_UNROLL for (int k = Triangle ? i : 0; k < C; ++k) sums[i][k] += y * x[k];
    }
  };
  int64_t f = 0;
  for (; f + EBFT_LANES <= features; f += EBFT_LANES) {
    accumulate([f](const T* row) __attribute__((always_inline)) { return load(row + f); });
  }
  if (f < features) {
    accumulate([&](const T* row) __attribute__((always_inline)) { return load_part(row + f, features - f); });
  }
  for (int i = 0; i < R; ++i) {
    for (int k = Triangle ? i : 0; k < C; ++k) gram[int64_t(i) * count + k] += sum(sums[i][k]);
  }
}

template <class T>
using GramBlock = void (*)(const void* const*, const void* const*, int64_t, int64_t, double*, int);

template <class T, int... Sizes>
static void gram_triangle(std::integer_sequence<int, Sizes...>, const void* const* rows, int size, int64_t offset,
                          int64_t features, double* gram, int count) {
  static constexpr GramBlock<T> blocks[] = {gram_block<Sizes + 1, Sizes + 1, true, T>...};
  blocks[size - 1](rows, rows, offset, features, gram, count);
}

template <class T, int... Sizes>
static void gram_rectangle(std::integer_sequence<int, Sizes...>, const void* const* rows, const void* const* cols,
                           int size, int64_t offset, int64_t features, double* gram, int count) {
  static constexpr GramBlock<T> blocks[] = {gram_block<EBFT_BLOCK, Sizes + 1, false, T>...};
  blocks[size - 1](rows, cols, offset, features, gram, count);
}

template <class T>
static void gram(const void* const* rows, int count, int64_t features, double* gram) {
  for (int64_t i = 0; i < int64_t(count) * count; ++i) gram[i] = 0;
  const int block = count <= EBFT_WHOLE ? count : EBFT_BLOCK;
  const int64_t piece = count <= EBFT_WHOLE ? features : 1024;
  for (int64_t f = 0; f < features; f += piece) {
    const int64_t width = smaller(piece, features - f);
    for (int i = 0; i < count; i += block) {
      double* out = gram + int64_t(i) * count;
      gram_triangle<T>(std::make_integer_sequence<int, EBFT_WHOLE>(), rows + i, smaller(block, count - i), f, width,
                       out + i, count);
      for (int k = i + block; k < count; k += block) {
        gram_rectangle<T>(std::make_integer_sequence<int, EBFT_BLOCK>(), rows + i, rows + k,
                          smaller(block, count - k), f, width, out + k, count);
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < i; ++k) gram[int64_t(i) * count + k] = gram[int64_t(k) * count + i];
  }
}
