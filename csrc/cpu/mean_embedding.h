// The mean-embedding loss and its gradients, column by column. Included as vector.h is.

template <class T>
static double mean_difference(const void* const* rows, int count, const void* target, int64_t features,
                              void* difference, double* spread) {
  const T* y = static_cast<const T*>(target);
  auto* out = static_cast<Sum<T>*>(difference);
  Vector squares = {}, deviations = {};
  for_each_vector(features, [&](int64_t f, auto&& load_at, auto&& store_at) __attribute__((always_inline)) {
    Vector mean = {};
    for (int j = 0; j < count; ++j) mean += load_at(static_cast<const T*>(rows[j]) + f);
    mean /= double(count);
    for (int j = 0; spread && j < count; ++j) {
      const Vector deviation = load_at(static_cast<const T*>(rows[j]) + f) - mean;
      deviations += deviation * deviation;
    }
    const Vector d = mean - load_at(y + f);
    squares += d * d;
    store_at(out + f, d);
  });
  if (spread) *spread = sum(deviations);
  return sum(squares);
}

template <class T>
static void mean_embedding_gradients(const void* const* rows, int count, const void* difference, int64_t features,
                                     MeanEmbeddingGradient gradient, void* grad_rows, void* grad_target) {
  const auto* d = static_cast<const Sum<T>*>(difference);
  T *out = static_cast<T*>(grad_rows), *out_target = static_cast<T*>(grad_target);
  if (gradient.target == 0) {  // an anchor without weight, whatever its features are
    memset(out, 0, size_t(count * features) * sizeof(T));
    memset(out_target, 0, size_t(features) * sizeof(T));
    return;
  }
  for_each_vector(features, [&](int64_t f, auto&& load_at, auto&& store_at) __attribute__((always_inline)) {
    const Vector x = load_at(d + f), base = x * gradient.rollout;
    store_at(out_target + f, x * gradient.target);
    if (gradient.spread == 0) {
      for (int j = 0; j < count; ++j) store_at(out + j * features + f, base);
      return;
    }
    Vector mean = {};
    for (int j = 0; j < count; ++j) mean += load_at(static_cast<const T*>(rows[j]) + f);
    mean /= double(count);
    for (int j = 0; j < count; ++j) {
      const Vector deviation = load_at(static_cast<const T*>(rows[j]) + f) - mean;
      store_at(out + j * features + f, base + gradient.spread * deviation);
    }
  });
}
