// The CUDA kernels as plain functions: addresses of device memory, sizes, strides in bytes, a code for the type of the
// elements (0 float64, 1 float32, 2 bfloat16, 3 float16) and a stream. They start kernels on the stream and return at
// once; nothing is allocated, copied or waited for, so that CUDA graphs can record them. Results are the same from run
// to run: sums have a fixed order, and every result is written by one thread.
//
// What is cheap to check is checked: sizes, codes, null addresses. A result is float64 for float64 elements, else
// float32, and contiguous, unless something else is said.
#pragma once

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

enum {
  ebft_cuda_most_rollouts = 16,  // of one anchor, in feature matching
  ebft_cuda_most_layers = 64,
  ebft_cuda_most_averaged = 2560,  // hidden states, L*K, of one mean: a scale for each in shared memory
  ebft_cuda_bad_argument = -1,
};

// What came of a call. `error` is 0, or `ebft_cuda_bad_argument`, or the code of a CUDA error; then the message names
// the argument, or the kernel, the error and the launch geometry.
typedef struct {
  int32_t error;
  char message[252];
} EbftCudaStatus;

// Rollouts [a, b, c, n, F] and targets [a, b, c, F] of a * b * c anchors, whose last axis is contiguous.
typedef struct {
  int64_t anchors[3];  // a, b, c
  int64_t rollouts_per_anchor;
  int64_t features;
  const void* rollouts;
  int64_t rollout_strides[4];
  const void* targets;
  int64_t target_strides[3];
} EbftCudaFeatures;

// `groups` divides F. whitening: 0 none, 1 sample, 2 feature; estimator: 0 rloo, 1 reinforce, 2 group_norm. At most
// `ebft_cuda_most_rollouts` rollouts. `gram` is memory for a * b * c * groups * (n + 1) * (n + 1) doubles. Writes the
// loss [a, b, c] and the others [a, b, c, n].
EbftCudaStatus ebft_cuda_feature_matching(int dtype, const EbftCudaFeatures* features, int64_t groups, int whitening,
                                          double alignment_coef, double diversity_coef, int estimator, double* gram,
                                          void* loss, void* alignment, void* diversity, void* reward, void* advantage,
                                          void* stream);

// Writes the loss [a, b, c] and mean_j x_j - y [a, b, c, F]. unbiased: at least 2 rollouts.
EbftCudaStatus ebft_cuda_mean_embedding_forward(int dtype, const EbftCudaFeatures* features, int unbiased, void* loss,
                                                void* difference, void* stream);

// Writes the gradients of rollouts [a, b, c, n, F] and targets [a, b, c, F] in the type of the features, from the
// upstream gradient [a, b, c] and the difference that the forward pass wrote. Does not read the targets, and the
// rollouts only if `unbiased`.
EbftCudaStatus ebft_cuda_mean_embedding_backward(int dtype, const EbftCudaFeatures* features, int unbiased,
                                                 const void* grad, const void* difference, void* grad_rollouts,
                                                 void* grad_targets, void* stream);

// One layer [B, S, C] whose last axis is contiguous.
typedef struct {
  const void* data;
  int64_t batch_stride;
  int64_t row_stride;
} EbftCudaLayer;

// Hidden states, and which rows of them are the K tokens of each rollout and of each window.
typedef struct {
  int64_t batch;                // B
  int64_t packed;               // S
  int64_t channels;             // C
  int64_t anchors;              // A
  int64_t samples;              // n
  int64_t steps;                // K
  const int64_t* rollout_rows;  // [B, A, n, K]
  const int64_t* target_rows;   // [B, A, K]
  const uint8_t* counted;       // [B, A, K], or null: all count
  int32_t pooling;              // of ebft::Pooling, see core/pooling.h; K = 1 for last_token
  int32_t normalization;        // of ebft::Normalization
  int32_t layers;               // L
  EbftCudaLayer layer[ebft_cuda_most_layers];
} EbftCudaTokens;

// Writes the features of rollouts [B, A, n, ...] and windows [B, A, ...]: L*C, for concat L*K*C, for token K*L*C. A
// token whose row does not exist is NaN.
EbftCudaStatus ebft_cuda_pool_features(int dtype, const EbftCudaTokens* tokens, void* rollouts, void* targets,
                                       void* stream);

// Writes the gradients [B, S, C] of the L layers, in their type, from those of the features. Every row gathers what its
// tokens get: with the rollouts first, then the windows, token k of item i has the number i * K + k; `uses` [(B*A*n +
// B*A) * K] are these numbers sorted by the row b * S + s that the token is, ascending for each row, whose part begins
// at `begin` [B*S + 1].
EbftCudaStatus ebft_cuda_pool_features_backward(int dtype, const EbftCudaTokens* tokens, const int64_t* begin,
                                                const int64_t* uses, const void* grad_rollouts,
                                                const void* grad_targets, void* const* grads, void* stream);

// Packed rows of S = P + A*n*G tokens; a row sees the keys [prefix_start, prefix_end) and [own_start, row].
typedef struct {
  int64_t batch;    // B
  int64_t prompt;   // P
  int64_t anchors;  // A
  int64_t samples;  // n
  int64_t horizon;  // G
} EbftCudaLayout;

// Writes the positions [B, S] and the key ranges, each [B, S], from anchors [B, A] and the first token of the document
// of each prompt token [B, P].
EbftCudaStatus ebft_cuda_layout_geometry(const EbftCudaLayout* layout, const int32_t* anchors,
                                         const int32_t* prompt_start, int64_t* positions, int32_t* prefix_start,
                                         int32_t* prefix_end, int32_t* own_start, void* stream);

// Writes the mask [B, S, S], 1 = may attend, from key ranges, which a sliding window may have narrowed. full: a rollout
// token sees the later tokens of its rollout too.
EbftCudaStatus ebft_cuda_layout_mask(const EbftCudaLayout* layout, const int32_t* prefix_start,
                                     const int32_t* prefix_end, const int32_t* own_start, int full, uint8_t* mask,
                                     void* stream);

#if defined(__cplusplus)
}
#endif
