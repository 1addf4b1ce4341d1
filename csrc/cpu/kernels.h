// What is done with the rows of one anchor, once for each instruction set and element type.
#pragma once

#include "../core/mean_embedding.h"

#include <cstdint>

// There is code for the newer instruction sets of x86-64 where the compiler can switch them on within a file.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EBFT_X86 1
#endif

namespace ebft::cpu {

struct Attention;
struct AttentionGradients;
struct AttentionTile;
struct Heads;
struct PromptKeys;

// The codes by which Python names element types, and their order in `kernels_for`.
enum class Dtype : int { float64, float32, bfloat16, float16 };

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// What sums of such elements are kept in between ops: float64 for float64, else float32.
inline Dtype sum_dtype(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

enum class Isa : int { baseline, avx2, avx512 };

// How to run: results depend on `isa` (through the order of sums), not on `threads`.
struct Execution {
  Isa isa;
  int threads;
};

// Targets of one row of logits; columns are counted from column 0 of all logits, of which the row may be a part.
struct RowTargets {
  const int64_t* ids;
  int64_t count, first_column;
};

// Rows are contiguous and need no alignment. Sums are float64, but for those of weighted_sum, in an order that depends
// on the instruction set and the length of the rows alone.
struct Kernels {
  // For matching. gram [count,count] = inner products of all rows with each other.
  void (*gram)(const void* const* rows, int count, int64_t features, double* gram);

  // Writes mean_j rows_j - target to `difference`, in float32 (float64 for float64 rows), and returns its square.
  // *spread, unless null, becomes sum_j |rows_j - mean|^2.
  double (*mean_difference)(const void* const* rows, int count, const void* target, int64_t features,
                            void* difference, double* spread);

  // Writes the gradients of the rollouts [count, features] and of the target [features] in the type of the rows. `rows`
  // is read only if `gradient.spread` is not 0.
  void (*mean_embedding_gradients)(const void* const* rows, int count, const void* difference, int64_t features,
                                   MeanEmbeddingGradient gradient, void* grad_rows, void* grad_target);

  // For pooling.
  double (*square)(const void* row, int64_t count);

  // out = sum_k scales_k * rows_k, in float32 (float64 for float64 rows).
  void (*weighted_sum)(const void* const* rows, const double* scales, int rows_count, int64_t count, void* out);

  // |row|^2 and <row, g> for g = sum_k scales_k * grads_k, the gradients in float32 (float64 for float64 rows).
  void (*products)(const void* row, const void* const* grads, const double* scales, int grads_count, int64_t count,
                   double* square, double* along);

  // out = token * row + grad * sum_k scales_k * grads_k, in the type of the row.
  void (*gradient)(const void* row, double token, double grad, const void* const* grads, const double* scales,
                   int grads_count, int64_t count, void* out);

  // For attention; sums and statistics are float32 (float64 for float64). Lays out the keys and values of one head, for
  // the forward or the backward pass; `buffer` has a padded row.
  void (*lay_prompt)(const Attention& attention, int64_t batch, int64_t kv_head, bool backward, void* buffer,
                     const PromptKeys& keys);
  void (*attention_forward)(const AttentionTile& tile, const Heads& out, void* lse);
  void (*attention_backward)(const AttentionTile& tile, const AttentionGradients& gradients);

  // Writes the gradients of the prompt's keys, or values, [begin, end) of one head: the sums of `parts` parts, `step`
  // apart, in their order.
  void (*add_parts)(void* sums, int64_t step, int64_t parts, int64_t begin, int64_t end, int64_t size,
                    const Heads& grads, int64_t batch, int64_t kv_head);

  // For log-probabilities; statistics, and what is given or found per target, are float32 (float64 for float64).
  // `factor` and `softcap` as in LogitsTile. Adds a row to its statistics.
  void (*softmax_add)(const void* row, int64_t columns, double factor, double softcap, const RowTargets& targets,
                      void* largest, void* total, void* at_target);

  // Overwrites a row with whole_upstream * exp(logit - largest - log_total), minus upstream at its targets, times
  // the slope of tanh.
  void (*softmax_gradient)(void* row, int64_t columns, double factor, double softcap, const RowTargets& targets,
                           const void* largest, const void* log_total, const void* whole_upstream,
                           const void* upstream);
};

// The instruction sets that this machine can run, the best last.
int isa_count();
const char* isa_name(Isa isa);
const Kernels& kernels_for(Isa isa, Dtype dtype);

}  // namespace ebft::cpu
