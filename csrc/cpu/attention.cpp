#include "attention_tile.h"

#include "parallel.h"

#include <cstring>
#include <stdexcept>
#include <vector>

namespace ebft::cpu {
namespace {

// The prompt's keys and values of all heads, laid out for products.
class Prompt {
 public:
  Prompt(const Execution& execution, Dtype dtype, const Attention& x, bool backward)
      : backward_(backward), bytes_(element_bytes(sum_dtype(dtype))), keys_(padded(x.size) * padded(x.length)),
        values_(padded(x.value_size) * padded(x.length)),
        head_((backward ? 2 * keys_ + values_ : keys_ + values_) * bytes_),
        memory_(1, head_ * x.batch * x.kv_heads) {
    const Kernels& kernels = kernels_for(execution.isa, dtype);
    Scratch<char> buffers(execution.threads, padded(std::max(x.size, x.value_size)) * bytes_);
    for_each(x.batch * x.kv_heads, execution.threads, [&](int64_t head, int thread) {
      kernels.lay_prompt(x, head / x.kv_heads, head % x.kv_heads, backward, buffers.of(thread), of(head));
    });
  }

  // Of head b * Hkv + h.
  PromptKeys of(int64_t head) {
    char* at = memory_.of(0) + head * head_;
    char *second = at + keys_ * bytes_, *third = second + keys_ * bytes_;
    if (backward_) return {at, second, third, nullptr};
    return {at, nullptr, nullptr, second};
  }

 private:
  bool backward_;
  int64_t bytes_;   // of a sum
  int64_t keys_;    // sums for the keys of one head
  int64_t values_;
  int64_t head_;    // bytes for one head
  Scratch<char> memory_;
};

// Where tiles of query rows begin, and the end: whole rollouts, of at most `tile_rows` folded rows if they fit.
std::vector<int64_t> cut_rows(const Attention& x) {
  std::vector<int64_t> cuts;
  const int64_t most = std::max<int64_t>(1, tile_rows / x.repeat);
  const int64_t prompt_rows = x.first < x.length ? x.length : 0;
  const int64_t rollout = x.spacing == 1 ? std::max<int64_t>(1, x.horizon) : 1;
  for (int64_t row = 0; row < prompt_rows; row += most) cuts.push_back(row);
  const int64_t step = std::max<int64_t>(1, most / rollout) * rollout;
  for (int64_t row = prompt_rows; row < x.rows; row += step) cuts.push_back(row);
  cuts.push_back(x.rows);
  return cuts;
}

// Sums that a tile takes from its scratch memory, for either pass.
int64_t attention_scratch(const Attention& x) {
  const int64_t both = padded(x.size) + padded(x.value_size), pieces = 16;
  return x.horizon * both + 2 * both * key_block + (3 * both + 2 * (key_block + 16)) * tile_rows + both + 16 * pieces;
}

void check_ranges(const Attention& x) {
  for (int64_t i = 0; i < x.batch * x.rows; ++i) {
    const int64_t row = x.first + i % x.rows * x.spacing, at = i / x.rows * x.packed + row;
    const int64_t start = x.prefix_start[at], end = x.prefix_end[at], own = x.own_start[at];
    const bool in_prompt = row < x.length;
    const int64_t rollout = in_prompt ? row + 1 : row - (row - x.length) % x.horizon;
    if (start < 0 || end > x.length || own < rollout || own > row + in_prompt || (in_prompt && start >= end)) {
      throw std::out_of_range("key ranges: expected keys that a rollout can see");
    }
  }
}

// Heads are few; the sums over rows that a head's keys need are split so that all threads have some. The split depends
// on the sizes alone.
int64_t parts_of_head(int64_t heads, int64_t tiles) {
  const int64_t enough = 16;
  return std::clamp<int64_t>(enough / std::max<int64_t>(heads, 1), 1, std::max<int64_t>(tiles, 1));
}

}  // namespace

void strided_attention(const Execution& execution, Dtype dtype, const Attention& x, const Heads& out, void* lse) {
  check_ranges(x);
  const Kernels& kernels = kernels_for(execution.isa, dtype);
  const std::vector<int64_t> cuts = cut_rows(x);
  const int64_t tiles = int64_t(cuts.size()) - 1, heads = x.batch * x.kv_heads;
  Prompt prompt(execution, dtype, x, false);
  Scratch<char> scratch(execution.threads, attention_scratch(x) * element_bytes(sum_dtype(dtype)));
  for_each(heads * tiles, execution.threads, [&](int64_t i, int thread) {
    // The last tiles of a row see most keys; they come first, so that threads finish together.
    const int64_t tile = tiles - 1 - i / heads, head = i % heads;
    kernels.attention_forward({x, prompt.of(head), head / x.kv_heads, head % x.kv_heads, cuts[tile], cuts[tile + 1],
                               scratch.of(thread)},
                              out, lse);
  });
}

void strided_attention_backward(const Execution& execution, Dtype dtype, const Attention& x, const Heads& out,
                                const void* lse, const Heads& grad, const Heads& grad_q, const Heads& grad_k,
                                const Heads& grad_v) {
  check_ranges(x);
  const Kernels& kernels = kernels_for(execution.isa, dtype);
  const std::vector<int64_t> cuts = cut_rows(x);
  const int64_t tiles = int64_t(cuts.size()) - 1, heads = x.batch * x.kv_heads, parts = parts_of_head(heads, tiles);
  const int64_t bytes = element_bytes(sum_dtype(dtype));
  const int64_t keys = x.length * padded(x.size), step = keys + x.length * padded(x.value_size);
  Prompt prompt(execution, dtype, x, true);
  Scratch<char> scratch(execution.threads, attention_scratch(x) * bytes);
  Scratch<char> sums(1, heads * parts * step * bytes);  // the prompt's gradients, by head and part
  for_each(heads * parts, execution.threads, [&](int64_t i, int thread) {
    const int64_t head = i / parts, part = i % parts, batch = head / x.kv_heads, kv_head = head % x.kv_heads;
    char* of_keys = sums.of(0) + i * step * bytes;
    std::memset(of_keys, 0, size_t(step * bytes));
    const AttentionGradients gradients = {out,    lse,    grad,    grad_q,
                                          grad_k, grad_v, of_keys, of_keys + keys * bytes};
    for (int64_t tile = part; tile < tiles; tile += parts) {
      kernels.attention_backward(
          {x, prompt.of(head), batch, kv_head, cuts[tile], cuts[tile + 1], scratch.of(thread)}, gradients);
    }
  });
  const int64_t piece = 64, pieces = (x.length + piece - 1) / piece;
  for_each(heads * pieces, execution.threads, [&](int64_t i, int) {
    const int64_t head = i / pieces, begin = i % pieces * piece, end = std::min(begin + piece, x.length);
    char* of_keys = sums.of(0) + head * parts * step * bytes;
    const int64_t batch = head / x.kv_heads, kv_head = head % x.kv_heads;
    kernels.add_parts(of_keys, step, parts, begin, end, x.size, grad_k, batch, kv_head);
    kernels.add_parts(of_keys + keys * bytes, step, parts, begin, end, x.value_size, grad_v, batch, kv_head);
  });
}

}  // namespace ebft::cpu
