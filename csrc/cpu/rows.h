// Sums, products and norms of rows, for pooling. Included as vector.h is.

template <class T>
static double square(const void* row, int64_t count) {
  const T* x = static_cast<const T*>(row);
  // Four sums, because each addition waits for the one before.
  Vector sums[4] = {};
  int64_t f = 0;
  for (; f + 4 * EBFT_LANES <= count; f += 4 * EBFT_LANES) {
    EBFT_UNROLL for (int i = 0; i < 4; ++i) {
      const Vector y = load(x + f + i * EBFT_LANES);
      sums[i] += y * y;
    }
  }
  for_each_vector(count - f, [&](int64_t g, auto&& load_at, auto&&) __attribute__((always_inline)) {
    const Vector y = load_at(x + f + g);
    sums[0] += y * y;
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
static void weighted_sum(const void* const* rows, const double* scales, int rows_count, int64_t count, void* out) {
  auto* to = static_cast<Sum<T>*>(out);
  int64_t done = 0;
  if constexpr (!std::is_same_v<T, double>) {  // widening would take longer than the memory does
    for (; done + EBFT_LANES <= count; done += EBFT_LANES) {
      Floats total = {};
      for (int k = 0; k < rows_count; ++k) {
        total += float(scales[k]) * load_floats(static_cast<const T*>(rows[k]) + done);
      }
      memcpy(to + done, &total, sizeof total);
    }
  }
  for_each_vector(count - done, [&](int64_t f, auto&& load_at, auto&& store_at) __attribute__((always_inline)) {
    Vector total = {};
    for (int k = 0; k < rows_count; ++k) total += scales[k] * load_at(static_cast<const T*>(rows[k]) + done + f);
    store_at(to + done + f, total);
  });
}

template <class T>
static void products(const void* row, const void* const* grads, const double* scales, int grads_count, int64_t count,
                     double* square, double* along) {
  const T* x = static_cast<const T*>(row);
  Vector squares = {}, alongs = {};
  for_each_vector(count, [&](int64_t f, auto&& load_at, auto&&) __attribute__((always_inline)) {
    const Vector y = load_at(x + f);
    Vector total = {};
    for (int k = 0; k < grads_count; ++k) total += scales[k] * load_at(static_cast<const Sum<T>*>(grads[k]) + f);
    squares += y * y;
    alongs += y * total;
  });
  *square = sum(squares);
  *along = sum(alongs);
}

template <class T>
static void gradient(const void* row, double token, double grad, const void* const* grads, const double* scales,
                     int grads_count, int64_t count, void* out) {
  const T* x = static_cast<const T*>(row);
  T* to = static_cast<T*>(out);
  for_each_vector(count, [&](int64_t f, auto&& load_at, auto&& store_at) __attribute__((always_inline)) {
    Vector total = {};
    for (int k = 0; k < grads_count; ++k) total += scales[k] * load_at(static_cast<const Sum<T>*>(grads[k]) + f);
    total *= grad;
    store_at(to + f, token == 0 ? total : total + token * load_at(x + f));
  });
}
