// Strided attention on packed rows (core/layout.h), forward and backward, on several threads.
#pragma once

#include "kernels.h"

namespace ebft::cpu {

// A tensor [B, heads, rows, size] whose last axis is contiguous; strides in bytes.
struct Heads {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;

  char* row(int64_t batch, int64_t head, int64_t row) const {
    return static_cast<char*>(data) + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

// Query rows, and the keys that they see: query row r is row first + r * spacing of a packed row of S tokens.
//
//   score  = scale * <q, k>, then with a softcap: softcap * tanh(score / softcap)
//   weight = exp(score) / (sum over visible keys of exp(score) [+ exp(sinks[head])])
struct Attention {
  int64_t batch;       // B
  int64_t kv_heads;    // Hkv
  int64_t repeat;      // H / Hkv, query heads that share a key and value head
  int64_t rows;        // query rows
  int64_t first;
  int64_t spacing;     // 1, or G: one step of every rollout
  int64_t packed;      // S
  int64_t length;      // P
  int64_t horizon;     // G
  int64_t size;        // D
  int64_t value_size;  // Dv
  Heads q;             // [B, H, rows, D]
  Heads k;             // [B, Hkv, S, D]; of a rollout's tokens those after the queries' are not read
  Heads v;             // [B, Hkv, S, Dv]
  // [B, S]: a row sees the keys [prefix_start, prefix_end) of the prompt, and its own rollout from own_start to itself,
  // or with `full` to the end. Every row sees a key.
  const int32_t* prefix_start;
  const int32_t* prefix_end;
  const int32_t* own_start;
  bool full;
  double scale;
  double softcap;       // 0: none
  const double* sinks;  // [H], or null
};

// Writes out [B, H, rows, Dv] in the type of the queries and the log of each row's denominator, lse [B, H, rows] in
// float32 (float64 for float64). Throws std::out_of_range if a row sees what it cannot see.
void strided_attention(const Execution& execution, Dtype dtype, const Attention& attention, const Heads& out,
                       void* lse);

// Writes the gradients of q, k and v, in their type, from that of the output, for all rows of the packed row. Sums over
// rows have an order that does not depend on the number of threads.
void strided_attention_backward(const Execution& execution, Dtype dtype, const Attention& attention, const Heads& out,
                                const void* lse, const Heads& grad, const Heads& grad_q, const Heads& grad_k,
                                const Heads& grad_v);

}  // namespace ebft::cpu
