// The attention of a tile of query rows: blocks of keys, one after the other, by products of small matrices. Included
// as vector.h is.
//
// Forward, for each block: scores = q k^T; with the largest score of each row so far, weights = exp(score - largest);
// the outputs and sums so far are brought to the new largest score, and weights v is added. Backward, with the final
// log-sum-exp: weights = exp(score - lse), and
//
//   grad_v += weights^T grad    grad_scores = weights * (grad v^T - <grad, out>)    grad_k += grad_scores^T q
//   grad_q += grad_scores k
//
// In these products keys that a row does not see have weights of 0, which is nothing unless they hold what is not finite.
// Then so are results of rows that do not see it; those are found when they are done, and computed once more from the
// keys alone that each row sees. Sums have the same order both times.

// From one row of scores to the next: not a power of two, so that the rows of a column are spread over the cache.
constexpr int64_t score_step = key_block + 16;
using Scores = Down<score_step>;
using ScoresTransposed = Across<score_step>;
using Queries = Across<tile_rows>;

// Beside it any score is the largest.
template <class S>
constexpr S lowest_score = sizeof(S) == 8 ? S(-0x1.fffffffffffffp1023) : S(-0x1.fffffep127);

// A thread's memory, taken piece by piece.
template <class S>
struct Memory {
  S* next;

  S* take(int64_t count) {
    S* taken = next;
    next += round_up(count, 16);
    return taken;
  }
};

// One folded row: where it stands, what it sees of the prompt, and of the current block of keys.
struct Row {
  int64_t row;
  int64_t head;
  int64_t packed;    // its row of the packed row
  int64_t in_batch;  // the same, counted through the batch
  int64_t prefix_begin, prefix_end;
  int seen_begin, seen_end;
};

// Up to `tile_rows` folded rows, and what has become of them.
template <class S>
struct Block {
  const AttentionTile& tile;
  const Attention& attention;
  int64_t begin;  // first folded row, and how many
  int64_t count;
  S *queries, *scores, *buffer, *results;
  Row rows[tile_rows];
  S largest[tile_rows];
  WholeVector<S> sums[tile_rows];

  // In a tensor [B, H, rows].
  int64_t number(const Row& row) const {
    return (tile.batch * attention.kv_heads * attention.repeat + row.head) * attention.rows + row.row;
  }
};

// `width`: that of the results.
template <class S>
static void start(Block<S>& block, Memory<S>& memory, int64_t width) {
  const Attention& x = block.attention;
  block.queries = memory.take(x.size * tile_rows);
  block.scores = memory.take(tile_rows * score_step);
  block.buffer = memory.take(padded(larger(x.size, x.value_size)));
  block.results = memory.take(tile_rows * width);
  memset(block.results, 0, size_t(block.count * width) * sizeof(S));
  int64_t row = block.begin / x.repeat, head = block.begin % x.repeat;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t packed = x.first + row * x.spacing, in_batch = block.tile.batch * x.packed + packed;
    block.rows[i] = {row, block.tile.kv_head * x.repeat + head, packed, in_batch, x.prefix_start[in_batch],
                     x.prefix_end[in_batch], 0, 0};
    if (++head == x.repeat) ++row, head = 0;
  }
}

// Keys as right-hand sides of products, see PromptKeys; `down_step` takes from panel to panel of those laid down.
template <class S>
struct Keys {
  S *across, *down, *values_across, *values_down;
  int64_t down_step;
};

// Keeps of what a row sees, [from, to), the part within [key, key + count), counted from `key`.
EBFT_INLINE void see(Row& row, int64_t from, int64_t to, int64_t key, int64_t count) {
  row.seen_begin = int(smaller(count, larger(0, from - key)));
  row.seen_end = int(larger(row.seen_begin, smaller(count, to - key)));
}

// Calls visit(keys, key, count, first row, rows) for the blocks of the prompt's keys, `together` rows at a time and
// only with keys that one of them sees.
template <bool Backward, class S, class Visit>
static void for_each_block_of_prompt(Block<S>& block, int64_t together, const Visit& visit) {
  const Attention& x = block.attention;
  const PromptKeys& prompt = block.tile.prompt;
  const auto part = [](void* from, int64_t offset) { return static_cast<S*>(from) + offset; };
  int64_t low = x.length, high = 0;
  for (int64_t i = 0; i < block.count; ++i) {
    low = smaller(low, block.rows[i].prefix_begin);
    high = larger(high, block.rows[i].prefix_end);
  }
  // Blocks begin where they do for any other tile, so that no result depends on who shares one.
  for (int64_t start = low / key_block * key_block; start < high; start += key_block) {
    for (int64_t first = 0; first < block.count; first += together) {
      const int64_t rows = smaller(together, block.count - first), end = smaller(start + key_block, high);
      int64_t from = end, to = start;
      for (int64_t i = first; i < first + rows; ++i) {
        if (block.rows[i].prefix_begin >= block.rows[i].prefix_end) continue;
        from = smaller(from, larger(start, block.rows[i].prefix_begin));
        to = larger(to, smaller(end, block.rows[i].prefix_end));
      }
      if (from >= to) continue;
      const int64_t key = from / panel<S> * panel<S>;
      for (int64_t i = first; i < first + rows; ++i) {
        see(block.rows[i], block.rows[i].prefix_begin, block.rows[i].prefix_end, key, to - key);
      }
      Keys<S> keys = {part(prompt.keys_across, key * x.size), nullptr, nullptr, nullptr, x.length * panel<S>};
      if (Backward) {
        keys.down = part(prompt.keys_down, key * panel<S>);
        keys.values_across = part(prompt.values_across, key * x.value_size);
      } else {
        keys.values_down = part(prompt.values_down, key * panel<S>);
      }
      visit(keys, key, to - key, first, rows);
    }
  }
}

// The same for each rollout's own tokens, which are laid out here: nobody else sees them. After the rows of the block
// that belong to the rollout at packed row `own`, finish(own, first row, rows) is called.
template <class T, bool Backward, class S, class Visit, class Finish>
static void for_each_block_of_rollouts(Block<S>& block, Memory<S> memory, const Visit& visit, const Finish& finish) {
  const Attention& x = block.attention;
  const int64_t size = x.size, value_size = x.value_size;
  const Keys<S> keys = {memory.take(size * key_block), memory.take(padded(size) * key_block),
                        memory.take(value_size * key_block), memory.take(padded(value_size) * key_block),
                        key_block * panel<S>};
  for (int64_t i = 0; i < block.count;) {
    const int64_t row = block.rows[i].packed;
    if (row < x.length) {
      ++i;
      continue;
    }
    const int64_t own = x.length + (row - x.length) / x.horizon * x.horizon;
    int64_t rows = 0, from = own + x.horizon, to = 0;
    for (; i + rows < block.count && block.rows[i + rows].packed < own + x.horizon; ++rows) {
      from = smaller(from, x.own_start[block.rows[i + rows].in_batch]);
      to = x.full ? own + x.horizon : block.rows[i + rows].packed + 1;
    }
    for (int64_t key = from; key < to; key += key_block) {
      const int64_t count = smaller(key_block, to - key);
      for (int64_t j = i; j < i + rows; ++j) {
        Row& other = block.rows[j];
        see(other, x.own_start[other.in_batch], x.full ? to : other.packed + 1, key, count);
      }
      const char *k = x.k.row(block.tile.batch, block.tile.kv_head, key),
                 *v = x.v.row(block.tile.batch, block.tile.kv_head, key);
      lay_across<T, panel<S>>(k, x.k.row_stride, count, size, 1, block.buffer, keys.across);
      if (Backward) {
        lay_down<T>(k, x.k.row_stride, count, size, 1, block.buffer, keys.down, keys.down_step);
        lay_across<T, panel<S>>(v, x.v.row_stride, count, value_size, 1, block.buffer, keys.values_across);
      } else {
        lay_down<T>(v, x.v.row_stride, count, value_size, 1, block.buffer, keys.values_down, keys.down_step);
      }
      visit(keys, key, count, i, rows);
    }
    finish(own, i, rows);
    i += rows;
  }
}

// Scores of rows [first, first + rows) with `count` keys, to the end of a whole vector.
template <class S>
EBFT_INLINE void score(Block<S>& block, const Keys<S>& keys, int64_t count, int64_t first, int64_t rows) {
  product<Queries>(block.queries + first, keys.across, block.attention.size * panel<S>, rows,
                   round_up(count, lanes<S>), block.attention.size, block.scores + first * score_step, score_step,
                   false);
}

// Of one row's numbers for `count` keys those of keys that it does not see become `value`, to the end of a whole vector.
template <class S>
EBFT_INLINE void hide(S* numbers, const Row& row, int64_t count, S value) {
  for (int64_t k = 0; k < row.seen_begin; ++k) numbers[k] = value;
  for (int64_t k = row.seen_end; k < round_up(count, lanes<S>); ++k) numbers[k] = value;
}

// Whether any of `count` numbers, up to a whole vector, is infinite or NaN.
template <class S>
EBFT_INLINE bool has_infinite(const S* numbers, int64_t count) {
  using V = WholeVector<S>;
  V nothing = {};
  for (int64_t d = 0; d < count; d += lanes<S>) nothing += load_whole(numbers + d) * S(0);
  return sum_of<S>(nothing) != 0;
}

// results of rows [first, first + rows) += scores times the rows of `keys`, `step` from panel to panel. `apart`: of each
// row with the keys alone that it sees.
template <class S>
EBFT_INLINE void add_seen(Block<S>& block, const S* scores, const S* keys, int64_t step, int64_t count, int64_t first,
                          int64_t rows, int64_t width, bool apart) {
  S* results = block.results + first * width;
  scores += first * score_step;
  if (!apart) return product<Scores>(scores, keys, step, rows, width, count, results, width, true);
  for (int64_t i = 0; i < rows; ++i) {
    const Row& row = block.rows[first + i];
    product<Scores>(scores + i * score_step + row.seen_begin, keys + row.seen_begin * panel<S>, step, 1, width,
                    row.seen_end - row.seen_begin, results + i * width, width, true);
  }
}

// Softmax so far of row i: its scores become weights.
template <class S>
EBFT_INLINE void weigh(Block<S>& block, int64_t i, int64_t count, int64_t width) {
  using V = WholeVector<S>;
  S* scores = block.scores + i * score_step;
  const S softcap = S(block.attention.softcap);
  const int64_t columns = round_up(count, lanes<S>);
  for (int64_t k = 0; softcap > 0 && k < columns; k += lanes<S>) {
    store_whole(scores + k, tanh_of<S>(load_whole(scores + k) / softcap) * softcap);
  }
  hide(scores, block.rows[i], count, -S(__builtin_inf()));
  V highest = V{} + block.largest[i];
  for (int64_t k = 0; k < columns; k += lanes<S>) {
    const V x = load_whole(scores + k);
    highest = x > highest ? x : highest;
  }
  const S largest = largest_of<S>(highest);
  if (largest != block.largest[i]) {
    const V faded = exp_of<S>(V{} + (block.largest[i] - largest));
    S* results = block.results + i * width;
    for (int64_t d = 0; d < width; d += lanes<S>) store_whole(results + d, load_whole(results + d) * faded);
    block.sums[i] *= faded;
    block.largest[i] = largest;
  }
  V total = {};
  for (int64_t k = 0; k < columns; k += lanes<S>) {
    const V weight = exp_of<S>(load_whole(scores + k) - largest);
    store_whole(scores + k, weight);
    total += weight;
  }
  block.sums[i] += total;
}

// The rows of `heads` as the left-hand side of products and, unless `down` is null, as the right-hand side.
template <class T, class S>
static void lay_queries(Block<S>& block, const Heads& heads, int64_t size, S scale, S* across, S* down) {
  for (int64_t i = 0; i < block.count; ++i) {
    const Row& row = block.rows[i];
    load_row<T>(heads.row(block.tile.batch, row.head, row.row), size, scale, block.buffer);
    for (int64_t d = 0; d < size; ++d) across[d * tile_rows + i] = block.buffer[d];
    for (int64_t d = 0; down && d < size; d += lanes<S>) {
      store_whole(down + d / panel<S> * tile_rows * panel<S> + i * panel<S> + d % panel<S>,
                  load_whole(block.buffer + d));
    }
  }
}

template <class T>
static void attention_forward(const AttentionTile& tile, const Heads& out, void* lse) {
  using S = Sum<T>;
  const Attention& x = tile.attention;
  const int64_t width = round_up(x.value_size, lanes<S>), end = tile.end * x.repeat;
  for (int64_t begin = tile.begin * x.repeat; begin < end; begin += tile_rows) {
    Memory<S> memory = {static_cast<S*>(tile.scratch)};
    Block<S> block = {tile, x, begin, smaller(tile_rows, end - begin), {}, {}, {}, {}, {}, {}, {}};
    start(block, memory, width);
    lay_queries<T>(block, x.q, x.size, S(x.scale), block.queries, static_cast<S*>(nullptr));
    const auto attend = [&](bool apart) {
      for (int64_t i = 0; i < block.count; ++i) {
        const S sink = x.sinks ? S(x.sinks[block.rows[i].head]) : lowest_score<S>;
        block.largest[i] = sink > lowest_score<S> ? sink : lowest_score<S>;
        block.sums[i] = WholeVector<S>{};
        if (sink > lowest_score<S>) block.sums[i][0] = 1;
      }
      const auto visit = [&](const Keys<S>& keys, int64_t, int64_t count, int64_t first, int64_t rows) {
        score(block, keys, count, first, rows);
        for (int64_t i = first; i < first + rows; ++i) weigh(block, i, count, width);
        add_seen<S>(block, block.scores, keys.values_down, keys.down_step, count, first, rows, width, apart);
      };
      for_each_block_of_prompt<false>(block, EBFT_ROWS, visit);
      for_each_block_of_rollouts<T, false>(block, memory, visit, [](int64_t, int64_t, int64_t) {});
    };
    attend(false);
    if (has_infinite(block.results, block.count * width)) {
      memset(block.results, 0, size_t(block.count * width) * sizeof(S));
      attend(true);
    }
    for (int64_t i = 0; i < block.count; ++i) {
      const Row& row = block.rows[i];
      const S weights = sum_of<S>(block.sums[i]), sum = weights == 0 ? 1 : weights;  // 0: all of its scores are -inf
      store_row<T>(out.row(tile.batch, row.head, row.row), block.results + i * width, 1 / sum, x.value_size);
      static_cast<S*>(lse)[block.number(row)] = block.largest[i] + S(log(double(sum)));
    }
  }
}

// Of row i: scores become weights, and grad v^T becomes the gradient of the scores. `along`: <grad, out>.
template <class S>
EBFT_INLINE void differentiate(Block<S>& block, int64_t i, int64_t count, S lse, S along, S* grad_scores) {
  using V = WholeVector<S>;
  S *scores = block.scores + i * score_step, *grad = grad_scores + i * score_step;
  const S softcap = S(block.attention.softcap);
  const int64_t columns = round_up(count, lanes<S>);
  for (int64_t k = 0; softcap > 0 && k < columns; k += lanes<S>) {
    const V bounded = tanh_of<S>(load_whole(scores + k) / softcap);
    store_whole(scores + k, bounded * softcap);
    // The slope of the softcap times what the weights are multiplied by below.
    store_whole(grad + k, (load_whole(grad + k) - along) * (1 - bounded * bounded) + along);
  }
  for (int64_t k = 0; k < columns; k += lanes<S>) {
    const V weight = exp_of<S>(load_whole(scores + k) - lse);
    store_whole(scores + k, weight);
    store_whole(grad + k, weight * (load_whole(grad + k) - along));
  }
  // Whatever came of what the row does not see.
  hide(scores, block.rows[i], count, S(0));
  hide(grad, block.rows[i], count, S(0));
}

// A block of rows in the backward pass.
template <class S>
struct BackwardBlock : Block<S> {
  S *queries_down, *grad_across, *grad_down, *grad_scores;
  S along[tile_rows], lse[tile_rows];
};

template <class T, class S>
static void start_backward(BackwardBlock<S>& block, Memory<S>& memory, const AttentionGradients& gradients) {
  const Attention& x = block.attention;
  const int64_t value_width = round_up(x.value_size, lanes<S>);
  start<S>(block, memory, round_up(x.size, lanes<S>));
  block.queries_down = memory.take(padded(x.size) * tile_rows);
  block.grad_across = memory.take(x.value_size * tile_rows);
  block.grad_down = memory.take(padded(x.value_size) * tile_rows);
  block.grad_scores = memory.take(tile_rows * score_step);
  lay_queries<T, S>(block, x.q, x.size, S(x.scale), block.queries, block.queries_down);
  lay_queries<T, S>(block, gradients.grad, x.value_size, 1, block.grad_across, block.grad_down);
  for (int64_t i = 0; i < block.count; ++i) {
    const Row& row = block.rows[i];
    load_row<T>(gradients.out.row(block.tile.batch, row.head, row.row), x.value_size, 1, block.buffer);
    WholeVector<S> total = {};
    for (int64_t d = 0; d < value_width; d += lanes<S>) {
      const S* grad = block.grad_down + d / panel<S> * tile_rows * panel<S> + i * panel<S> + d % panel<S>;
      total += load_whole(block.buffer + d) * load_whole(grad);
    }
    block.along[i] = sum_of<S>(total);
    block.lse[i] = static_cast<const S*>(gradients.lse)[block.number(row)];
  }
}

template <class T>
static void attention_backward(const AttentionTile& tile, const AttentionGradients& gradients) {
  using S = Sum<T>;
  const Attention& x = tile.attention;
  const int64_t width = round_up(x.size, lanes<S>), value_width = round_up(x.value_size, lanes<S>);
  const int64_t end = tile.end * x.repeat;
  Memory<S> kept = {static_cast<S*>(tile.scratch)};
  // Sums over the rows of one rollout, which may reach from one block into the next.
  S *own_keys = kept.take(x.horizon * width), *own_values = kept.take(x.horizon * value_width);
  for (int64_t begin = tile.begin * x.repeat; begin < end; begin += tile_rows) {
    Memory<S> memory = kept;
    BackwardBlock<S> block = {{tile, x, begin, smaller(tile_rows, end - begin), {}, {}, {}, {}, {}, {}, {}},
                              {}, {}, {}, {}, {}, {}};
    start_backward<T>(block, memory, gradients);
    // Without grad_k and grad_v: to the gradients of the queries, row by row, alone.
    const auto add = [&](const Keys<S>& keys, int64_t count, int64_t first, int64_t rows, S* grad_k, S* grad_v) {
      const int64_t offset = first * score_step;
      const bool apart = !grad_k;
      score<S>(block, keys, count, first, rows);
      product<Queries>(block.grad_across + first, keys.values_across, x.value_size * panel<S>, rows,
                       round_up(count, lanes<S>), x.value_size, block.grad_scores + offset, score_step, false);
      for (int64_t i = first; i < first + rows; ++i) {
        differentiate<S>(block, i, count, block.lse[i], block.along[i], block.grad_scores);
      }
      if (!apart) {
        product<ScoresTransposed>(block.scores + offset, block.grad_down + first * panel<S>, tile_rows * panel<S>,
                                  count, value_width, rows, grad_v, value_width, true);
        product<ScoresTransposed>(block.grad_scores + offset, block.queries_down + first * panel<S>,
                                  tile_rows * panel<S>, count, width, rows, grad_k, width, true);
      }
      add_seen<S>(block, block.grad_scores, keys.down, keys.down_step, count, first, rows, width, apart);
    };
    S *prompt_keys = static_cast<S*>(gradients.prompt_keys), *prompt_values = static_cast<S*>(gradients.prompt_values);
    for_each_block_of_prompt<true, S>(
        block, tile_rows, [&](const Keys<S>& keys, int64_t key, int64_t count, int64_t first, int64_t rows) {
          add(keys, count, first, rows, prompt_keys + key * width, prompt_values + key * value_width);
        });
    int64_t open = -1;  // the rollout that has been begun in this block
    const auto visit = [&](const Keys<S>& keys, int64_t key, int64_t count, int64_t first, int64_t rows) {
      const int64_t own = x.length + (key - x.length) / x.horizon * x.horizon;
      if (own != open && block.rows[first].packed == own && (begin + first) % x.repeat == 0) {
        memset(own_keys, 0, size_t(x.horizon * width) * sizeof(S));
        memset(own_values, 0, size_t(x.horizon * value_width) * sizeof(S));
      }
      open = own;
      add(keys, count, first, rows, own_keys + (key - own) * width, own_values + (key - own) * value_width);
    };
    const auto finish = [&](int64_t own, int64_t first, int64_t rows) {
      const bool complete = block.rows[first + rows - 1].packed + 1 == own + x.horizon;
      if (!complete || (begin + first + rows) % x.repeat) return;
      for (int64_t g = 0; g < x.horizon; ++g) {
        store_row<T>(gradients.grad_k.row(tile.batch, tile.kv_head, own + g), own_keys + g * width, 1, x.size);
        store_row<T>(gradients.grad_v.row(tile.batch, tile.kv_head, own + g), own_values + g * value_width, 1,
                     x.value_size);
      }
    };
    for_each_block_of_rollouts<T, true, S>(block, memory, visit, finish);
    if (has_infinite<S>(block.results, block.count * width)) {
      memset(block.results, 0, size_t(block.count * width) * sizeof(S));
      const auto again = [&](const Keys<S>& keys, int64_t, int64_t count, int64_t first, int64_t rows) {
        add(keys, count, first, rows, nullptr, nullptr);
      };
      for_each_block_of_prompt<true, S>(block, tile_rows, again);
      for_each_block_of_rollouts<T, true, S>(block, memory, again, [](int64_t, int64_t, int64_t) {});
    }
    for (int64_t i = 0; i < block.count; ++i) {
      const Row& row = block.rows[i];
      store_row<T>(gradients.grad_q.row(tile.batch, row.head, row.row), block.results + i * width, S(x.scale), x.size);
    }
  }
}

template <class T>
static void lay_prompt(const Attention& x, int64_t batch, int64_t kv_head, bool backward, void* scratch,
                       const PromptKeys& keys) {
  using S = Sum<T>;
  S* buffer = static_cast<S*>(scratch);
  const char *k = x.k.row(batch, kv_head, 0), *v = x.v.row(batch, kv_head, 0);
  const auto across = [&](const char* rows, int64_t stride, int64_t size, void* to) {
    lay_across<T, panel<S>>(rows, stride, x.length, size, 1, buffer, static_cast<S*>(to));
  };
  const auto down = [&](const char* rows, int64_t stride, int64_t size, void* to) {
    lay_down<T>(rows, stride, x.length, size, 1, buffer, static_cast<S*>(to), x.length * panel<S>);
  };
  across(k, x.k.row_stride, x.size, keys.keys_across);
  if (!backward) return down(v, x.v.row_stride, x.value_size, keys.values_down);
  down(k, x.k.row_stride, x.size, keys.keys_down);
  across(v, x.v.row_stride, x.value_size, keys.values_across);
}

template <class T>
static void add_parts(void* sums, int64_t step, int64_t parts, int64_t begin, int64_t end, int64_t size,
                      const Heads& grads, int64_t batch, int64_t kv_head) {
  using S = Sum<T>;
  const int64_t width = round_up(size, lanes<S>);
  for (int64_t key = begin; key < end; ++key) {
    S* first = static_cast<S*>(sums) + key * width;
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t d = 0; d < width; d += lanes<S>) {
        store_whole(first + d, load_whole(first + d) + load_whole(first + part * step + d));
      }
    }
    store_row<T>(grads.row(batch, kv_head, key), first, 1, size);
  }
}
