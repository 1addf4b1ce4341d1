// Softmax of one row of logits, piece by piece, so that everything but the first read and the last write of a piece
// stays in the nearest cache. Included as vector.h is.

constexpr int64_t softmax_piece = 1024;

// A piece of a row: softcap * tanh(factor * x), or factor * x where softcap is 0; vectors are filled up with -inf.
// `slopes`, if there is a softcap and it is not null, becomes the derivative of tanh.
template <class T, class S>
static void load_logits(const T* from, int64_t count, S factor, S softcap, S* logits, S* slopes) {
  load_row<T>(from, count, factor, logits);
  for (int64_t k = 0; softcap > 0 && k < count; k += lanes<S>) {
    const auto bounded = tanh_of<S>(load_whole(logits + k));
    store_whole(logits + k, bounded * softcap);
    if (slopes) store_whole(slopes + k, 1 - bounded * bounded);
  }
  for (int64_t k = count; k < round_up(count, lanes<S>); ++k) logits[k] = S(-__builtin_inf());
}

// Calls body(index of a target, its column) for the targets in a piece of `count` columns of a row.
template <class Body>
static void for_targets_within(const RowTargets& targets, int64_t first, int64_t count, const Body& body) {
  for (int64_t k = 0; k < targets.count; ++k) {
    const int64_t column = targets.ids[k] - targets.first_column - first;
    if (0 <= column && column < count) body(k, column);
  }
}

template <class T>
static void softmax_add(const void* row, int64_t columns, double factor, double softcap, const RowTargets& targets,
                        void* largest, void* total, void* at_target) {
  using S = Sum<T>;
  using V = WholeVector<S>;
  S logits[softmax_piece], most = *static_cast<S*>(largest), sum = *static_cast<S*>(total);
  for (int64_t first = 0; first < columns; first += softmax_piece) {
    const int64_t count = smaller(softmax_piece, columns - first);
    load_logits(static_cast<const T*>(row) + first, count, S(factor), S(softcap), logits,
                static_cast<S*>(nullptr));
    for_targets_within(targets, first, count,
                       [&](int64_t k, int64_t column) { static_cast<S*>(at_target)[k] = logits[column]; });
    V highest = V{} + most, added = {};
    for (int64_t k = 0; k < count; k += lanes<S>) {
      const V x = load_whole(logits + k);
      highest = x > highest ? x : highest;
    }
    const S before = most;
    most = largest_of<S>(highest);
    for (int64_t k = 0; k < count; k += lanes<S>) added += exp_of<S>(load_whole(logits + k) - most);
    sum = sum * exp_of<S>(V{} + (before - most))[0] + sum_of<S>(added);
  }
  *static_cast<S*>(largest) = most;
  *static_cast<S*>(total) = sum;
}

template <class T>
static void softmax_gradient(void* row, int64_t columns, double factor, double softcap, const RowTargets& targets,
                             const void* largest, const void* log_total, const void* whole_upstream,
                             const void* upstream) {
  using S = Sum<T>;
  S weights[softmax_piece], slopes[softmax_piece];
  const S most = *static_cast<const S*>(largest), logarithm = *static_cast<const S*>(log_total);
  const S scale = *static_cast<const S*>(whole_upstream), *grads = static_cast<const S*>(upstream);
  for (int64_t first = 0; first < columns; first += softmax_piece) {
    T* piece = static_cast<T*>(row) + first;
    const int64_t count = smaller(softmax_piece, columns - first);
    load_logits(piece, count, S(factor), S(softcap), weights, slopes);
    for (int64_t k = 0; k < count; k += lanes<S>) {
      store_whole(weights + k, exp_of<S>((load_whole(weights + k) - most) - logarithm) * scale);
    }
    for_targets_within(targets, first, count, [&](int64_t k, int64_t column) { weights[column] -= grads[k]; });
    for (int64_t k = 0; softcap > 0 && k < count; k += lanes<S>) {
      store_whole(weights + k, load_whole(weights + k) * load_whole(slopes + k));
    }
    store_row<T>(reinterpret_cast<char*>(piece), weights, S(1), count);
  }
}
