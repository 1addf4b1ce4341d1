// Attention of a few queries to many keys that they share, by an online softmax over blocks of keys. Included as vector.h
// is.
//
// A block of keys is brought into the order in which it is used, keys side by side, once for all queries of a tile. Then
// EBFT_ROWS queries at a time take their scores with it from registers.

constexpr int block_keys = 64;

template <class S>
using WholeVector = typename Whole<S>::Type;

// Beside it any score is the highest.
template <class S>
constexpr S most_negative = sizeof(S) == 8 ? S(-0x1.fffffffffffffp1023) : S(-0x1.fffffep127);

template <class S>
EBFT_INLINE WholeVector<S> load_whole(const S* from) {
  return bits_at<WholeVector<S>>(from);
}

template <class S>
EBFT_INLINE void store_whole(S* to, WholeVector<S> x) {
  memcpy(to, &x, sizeof x);
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
  V rest = r * 0 + coefficient;
  EBFT_UNROLL for (int k = terms; k > 1; --k) {
    coefficient *= S(k);
    rest = rest * r + coefficient;
  }
  rest *= r;
  const Integers exponent = (Integers)shifted << bits;
  const V scale = (V)(exponent + (Integers)(V{} + S(1)));
  const Integers too_low = x < V{} + Exponential<S>::lowest;
  return {(V)((Integers)scale & ~too_low), (V)((Integers)rest & ~too_low)};
}

// softcap * tanh(x / softcap). By e^x - 1, which keeps the digits of small numbers.
template <class S>
EBFT_INLINE WholeVector<S> capped(WholeVector<S> x, S softcap) {
  using V = WholeVector<S>;
  using Integers = typename Whole<S>::Integers;
  const V minus_zero = -V{};
  const Integers sign = (Integers)x & (Integers)minus_zero;
  const V y = (V)((Integers)(x / softcap) ^ sign);  // |x / softcap|
  const auto [scale, rest] = exponential<S>(-2 * y);
  const V less_one = scale * rest + (scale - 1);
  const V tanh = -less_one / (less_one + 2);
  return (V)((Integers)(tanh * softcap) ^ sign);
}

// The elements of a row as sums are kept.
template <class T>
EBFT_INLINE void widen_row(const void* row, int64_t count, Sum<T>* to) {
  const T* from = static_cast<const T*>(row);
  if constexpr (std::is_same_v<T, Sum<T>>) {
    memcpy(to, from, count * sizeof(T));
  } else {
    int64_t f = 0;
    for (; f + EBFT_LANES <= count; f += EBFT_LANES) {
      const Floats x = load_floats(from + f);
      memcpy(to + f, &x, sizeof x);
    }
    if (f < count) store_part(to + f, load_part(from + f, count - f), count - f);
  }
}

EBFT_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The scratch memory of a tile of at most `rows` queries.
template <class S>
struct AttentionMemory {
  static constexpr int lanes = Whole<S>::lanes;

  int64_t depth;    // D and Dv in whole vectors
  int64_t width;
  S* queries;       // [rows, depth], zeros behind D
  S* sums;          // [rows, width] weighted values
  S* totals;        // [rows, lanes] weights, still to be added up
  S* highest;       // [rows] score
  S* keys;          // [depth, block_keys]
  S* values;        // [block_keys, width], zeros behind Dv
  S* scores;        // [EBFT_ROWS, block_keys], then weights
  S* row;           // [depth or width], zeros behind D or Dv
  int64_t size = 0; // of all of it

  AttentionMemory(S* memory, int rows, int64_t key_size, int64_t value_size)
      : depth(round_up(key_size, lanes)), width(round_up(value_size, lanes)) {
    const int64_t padded = round_up(rows, EBFT_ROWS);
    const auto take = [&](int64_t count) {
      S* taken = memory + size;
      size += round_up(count, lanes);
      return taken;
    };
    queries = take(padded * depth);
    sums = take(padded * width);
    totals = take(padded * lanes);
    highest = take(padded);
    keys = take(depth * block_keys);
    values = take(block_keys * width);
    scores = take(EBFT_ROWS * block_keys);
    row = take(depth > width ? depth : width);
  }
};

template <class T>
static int64_t attention_memory(int rows, int64_t key_size, int64_t value_size) {
  return AttentionMemory<Sum<T>>(nullptr, rows, key_size, value_size).size;
}

// scale * <q, k> and its softcap.
template <class S>
EBFT_INLINE WholeVector<S> score_of(WholeVector<S> product, S scale, S softcap) {
  const WholeVector<S> score = product * scale;
  return softcap > 0 ? capped<S>(score, softcap) : score;
}

// Turns scores[first, last), whole vectors, into weights beside a highest score that may rise, and adds them to `totals`.
// Returns the factor for what was summed before.
template <class S>
EBFT_INLINE S weigh(S* scores, int first, int last, S* highest, S* totals) {
  constexpr int lanes = Whole<S>::lanes;
  using V = WholeVector<S>;
  V tops = V{} + *highest;
  for (int k = first; k < last; k += lanes) {
    const V x = load_whole(scores + k);
    tops = tops < x ? x : tops;
  }
  S top = tops[0];
  for (int lane = 1; lane < lanes; ++lane) top = top < tops[lane] ? tops[lane] : top;
  const Exponential<S> before = exponential<S>(V{} + (*highest - top));
  const V factor = before.scale + before.scale * before.rest;
  V total = load_whole(totals) * factor;
  for (int k = first; k < last; k += lanes) {
    const Exponential<S> e = exponential<S>(load_whole(scores + k) - top);
    const V weight = e.scale + e.scale * e.rest;
    store_whole(scores + k, weight);
    total += weight;
  }
  store_whole(totals, total);
  *highest = top;
  return factor[0];
}

// Starts the sums of one row with its sink and its own keys.
template <class T, class S>
static void attend_own(const AttentionTile& tile, const AttentionRow& row, int index, const AttentionMemory<S>& memory) {
  constexpr int lanes = Whole<S>::lanes;
  using V = WholeVector<S>;
  S *query = memory.queries + index * memory.depth, *sums = memory.sums + index * memory.width;
  S *totals = memory.totals + index * lanes, *highest = memory.highest + index;
  widen_row<T>(row.query, tile.key_size, query);
  for (int64_t f = tile.key_size; f < memory.depth; ++f) query[f] = 0;
  for (int64_t f = 0; f < memory.width; ++f) sums[f] = 0;
  const bool sink = row.sink >= most_negative<S>;
  *highest = sink ? S(row.sink) : most_negative<S>;
  for (int lane = 0; lane < lanes; ++lane) totals[lane] = sink && lane == 0;
  for (int64_t first = 0; first < row.own_count; first += block_keys) {
    const int count = int(smaller(block_keys, row.own_count - first));
    for (int k = 0; k < count; ++k) {
      for (int64_t f = tile.key_size; f < memory.depth; ++f) memory.row[f] = 0;
      widen_row<T>(static_cast<const char*>(row.own_keys) + (first + k) * tile.key_stride, tile.key_size, memory.row);
      V product = {};
      for (int64_t f = 0; f < memory.depth; f += lanes) product += load_whole(query + f) * load_whole(memory.row + f);
      S total = 0;
      for (int lane = 0; lane < lanes; ++lane) total += product[lane];
      memory.scores[k] = score_of<S>(V{} + total, S(tile.scale), S(tile.softcap))[0];
    }
    const int last = int(round_up(count, lanes));
    for (int k = count; k < last; ++k) memory.scores[k] = -__builtin_inf();
    const S factor = weigh<S>(memory.scores, 0, last, highest, totals);
    for (int64_t f = 0; f < memory.width; f += lanes) store_whole(sums + f, load_whole(sums + f) * factor);
    for (int k = 0; k < count; ++k) {
      for (int64_t f = tile.value_size; f < memory.width; ++f) memory.row[f] = 0;
      widen_row<T>(static_cast<const char*>(row.own_values) + (first + k) * tile.value_stride, tile.value_size,
                   memory.row);
      const S weight = memory.scores[k];
      for (int64_t f = 0; f < memory.width; f += lanes) {
        store_whole(sums + f, load_whole(sums + f) + weight * load_whole(memory.row + f));
      }
    }
  }
}

// Brings `count` shared keys and values, from key `first` on, into the order of AttentionMemory.
template <class T, class S>
static void pack_block(const AttentionTile& tile, int64_t first, int count, const AttentionMemory<S>& memory) {
  const char* keys = static_cast<const char*>(tile.keys) + first * tile.key_stride;
  const char* values = static_cast<const char*>(tile.values) + first * tile.value_stride;
  for (int k = 0; k < count; ++k) {
    widen_row<T>(keys + k * tile.key_stride, tile.key_size, memory.row);
    for (int64_t f = 0; f < tile.key_size; ++f) memory.keys[f * block_keys + k] = memory.row[f];
    S* value = memory.values + k * memory.width;
    widen_row<T>(values + k * tile.value_stride, tile.value_size, value);
    for (int64_t f = tile.value_size; f < memory.width; ++f) value[f] = 0;
  }
}

// Scores of EBFT_ROWS queries, from `index` on, with the keys of the block from `first` to `last` or somewhat beyond.
template <class S>
EBFT_INLINE void score_block(const AttentionTile& tile, int index, int first, int last,
                             const AttentionMemory<S>& memory) {
  constexpr int lanes = Whole<S>::lanes;
  using V = WholeVector<S>;
  const S* queries = memory.queries + index * memory.depth;
  for (int k = first; k < last; k += EBFT_COLS * lanes) {
    V products[EBFT_ROWS][EBFT_COLS] = {};
    for (int64_t f = 0; f < tile.key_size; ++f) {
      V x[EBFT_COLS];
      EBFT_UNROLL for (int c = 0; c < EBFT_COLS; ++c) x[c] = load_whole(memory.keys + f * block_keys + k + c * lanes);
      EBFT_UNROLL for (int i = 0; i < EBFT_ROWS; ++i) {
        const S q = queries[i * memory.depth + f];
        EBFT_UNROLL for (int c = 0; c < EBFT_COLS; ++c) products[i][c] += q * x[c];
      }
    }
    EBFT_UNROLL for (int i = 0; i < EBFT_ROWS; ++i) {
      EBFT_UNROLL for (int c = 0; c < EBFT_COLS; ++c) {
        store_whole(memory.scores + i * block_keys + k + c * lanes,
                    score_of<S>(products[i][c], S(tile.scale), S(tile.softcap)));
      }
    }
  }
}

// sums = factors * sums + weights * values over the keys [first, last) of the block, for C vectors from `column` on.
template <int C, class S>
static void add_values(int index, int first, int last, const S* factors, int64_t column,
                       const AttentionMemory<S>& memory) {
  constexpr int lanes = Whole<S>::lanes;
  using V = WholeVector<S>;
  S* to = memory.sums + index * memory.width + column;
  V sums[EBFT_ROWS][C];
  EBFT_UNROLL for (int i = 0; i < EBFT_ROWS; ++i) {
    EBFT_UNROLL for (int c = 0; c < C; ++c) sums[i][c] = factors[i] * load_whole(to + i * memory.width + c * lanes);
  }
  for (int k = first; k < last; ++k) {
    V x[C];
    EBFT_UNROLL for (int c = 0; c < C; ++c) x[c] = load_whole(memory.values + k * memory.width + column + c * lanes);
    EBFT_UNROLL for (int i = 0; i < EBFT_ROWS; ++i) {
      const S weight = memory.scores[i * block_keys + k];
      EBFT_UNROLL for (int c = 0; c < C; ++c) sums[i][c] += weight * x[c];
    }
  }
  EBFT_UNROLL for (int i = 0; i < EBFT_ROWS; ++i) {
    EBFT_UNROLL for (int c = 0; c < C; ++c) store_whole(to + i * memory.width + c * lanes, sums[i][c]);
  }
}

template <class S, int... Sizes>
EBFT_INLINE void add_all_values(std::integer_sequence<int, Sizes...>, int index, int first, int last, const S* factors,
                                const AttentionMemory<S>& memory) {
  static constexpr void (*parts[])(int, int, int, const S*, int64_t, const AttentionMemory<S>&) = {
      add_values<Sizes + 1, S>...};
  constexpr int64_t step = EBFT_COLS * Whole<S>::lanes;
  for (int64_t column = 0; column < memory.width; column += step) {
    const int64_t vectors = smaller(step, memory.width - column) / Whole<S>::lanes;
    parts[vectors - 1](index, first, last, factors, column, memory);
  }
}

// Adds the block of `count` shared keys from key `start` on to EBFT_ROWS queries from `index` on.
template <class S>
static void attend_block(const AttentionTile& tile, int index, int64_t start, int count,
                         const AttentionMemory<S>& memory) {
  constexpr int lanes = Whole<S>::lanes;
  int begins[EBFT_ROWS], ends[EBFT_ROWS], first = count, last = 0;
  for (int i = 0; i < EBFT_ROWS; ++i) {
    const AttentionRow& row = tile.rows[smaller(index + i, tile.count - 1)];
    begins[i] = int(smaller(row.start > start ? row.start - start : 0, count));
    ends[i] = int(smaller(row.end > start ? row.end - start : 0, count));
    if (begins[i] >= ends[i]) continue;
    first = begins[i] < first ? begins[i] : first;
    last = ends[i] > last ? ends[i] : last;
  }
  if (first >= last) return;
  constexpr int step = EBFT_COLS * lanes;
  static_assert(block_keys % step == 0, "scores are written in steps");
  const int low = first / step * step, high = int(round_up(last, lanes));
  score_block<S>(tile, index, low, high, memory);
  S factors[EBFT_ROWS];
  for (int i = 0; i < EBFT_ROWS; ++i) {
    S* scores = memory.scores + i * block_keys;
    for (int k = low; k < begins[i]; ++k) scores[k] = -__builtin_inf();
    for (int k = ends[i] > low ? ends[i] : low; k < high; ++k) scores[k] = -__builtin_inf();
    factors[i] = weigh<S>(scores, low, high, memory.highest + index + i, memory.totals + (index + i) * lanes);
  }
  add_all_values<S>(std::make_integer_sequence<int, EBFT_COLS>(), index, first, last, factors, memory);
}

template <class T>
static void attend(const AttentionTile& tile, void* scratch) {
  using S = Sum<T>;
  constexpr int lanes = Whole<S>::lanes;
  const AttentionMemory<S> memory(static_cast<S*>(scratch), tile.count, tile.key_size, tile.value_size);
  int64_t start = INT64_MAX, end = 0;
  for (int i = 0; i < tile.count; ++i) {
    const AttentionRow& row = tile.rows[i];
    attend_own<T>(tile, row, i, memory);
    if (row.start >= row.end) continue;
    start = smaller(start, row.start);
    end = row.end > end ? row.end : end;
  }
  for (int i = tile.count; i % EBFT_ROWS; ++i) {  // company for the last rows
    for (int64_t f = 0; f < memory.depth; ++f) memory.queries[i * memory.depth + f] = 0;
    for (int64_t f = 0; f < memory.width; ++f) memory.sums[i * memory.width + f] = 0;
    for (int lane = 0; lane < lanes; ++lane) memory.totals[i * lanes + lane] = 0;
    memory.highest[i] = 0;
  }
  // Blocks begin where they do for any other tile, so that no result depends on who shares one.
  for (int64_t first = start / block_keys * block_keys; first < end; first += block_keys) {
    const int count = int(smaller(block_keys, end - first));
    pack_block<T>(tile, first, count, memory);
    for (int i = 0; i < tile.count; i += EBFT_ROWS) attend_block<S>(tile, i, first, count, memory);
  }
  for (int i = 0; i < tile.count; ++i) {
    S total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += memory.totals[i * lanes + lane];
    const S* sums = memory.sums + i * memory.width;
    T* out = static_cast<T*>(tile.rows[i].out);
    for_each_vector(tile.value_size, [&](int64_t f, auto&& load_at, auto&& store_at) __attribute__((always_inline)) {
      store_at(out + f, load_at(sums + f) / double(total));
    });
  }
}
