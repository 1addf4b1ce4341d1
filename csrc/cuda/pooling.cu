// Pooling of hidden states. Forward: one block per feature of a token, or of an item for "mean", where an item is a
// rollout or a window; it reads its rows twice, the second time from the cache. Backward: one block per packed row,
// which gathers what the features that the row is part of pass back, so that every gradient is written once.
#include "../core/pooling.h"

#include "device.h"
#include "dispatch.h"

namespace ebft::cuda {
namespace {

// An item: the B*A*n rollouts come first, then the B*A windows.
struct Item {
  int64_t batch;
  int64_t anchor;  // b * A + a
  int64_t number;  // among the rollouts, or among the windows
  bool is_target;
};

__device__ Item item_of(const EbftCudaTokens& tokens, int64_t i) {
  const int64_t rollouts = tokens.batch * tokens.anchors * tokens.samples;
  const bool is_target = i >= rollouts;
  const int64_t number = is_target ? i - rollouts : i;
  const int64_t anchor = is_target ? number : number / tokens.samples;
  return {anchor / tokens.anchors, anchor, number, is_target};
}

__device__ double weight_of(const EbftCudaTokens& tokens, const Item& item, int64_t step) {
  if (tokens.counted && !tokens.counted[item.anchor * tokens.steps + step]) return 0;
  return Pooling(tokens.pooling) == Pooling::mean ? 1.0 / double(tokens.steps) : 1;
}

__device__ FeatureLayout layout_of(const EbftCudaTokens& tokens) {
  return FeatureLayout(Pooling(tokens.pooling), tokens.layers, tokens.steps, tokens.channels);
}

template <class T>
__device__ const T* row_of(const EbftCudaLayer& layer, int64_t batch, int64_t row) {
  const char* data = static_cast<const char*>(layer.data);
  return reinterpret_cast<const T*>(data + batch * layer.batch_stride + row * layer.row_stride);
}

// The sum of squares of a row, as far as this thread reads it.
template <class T>
__device__ double part_of_square(const T* row, int64_t channels, bool aligned) {
  Sum<T> square = 0;
  for_each_piece<T>(channels, aligned, [&](int64_t f, auto width) {
    constexpr int Width = width;
    const Pack<T, Width> x = load<Width>(row + f);
#pragma unroll
    for (int v = 0; v < Width; ++v) square += Sum<T>(x[v]) * x[v];
  });
  return square;
}

// Fills `scales` [L], `stride` apart, with what the hidden states of one token are multiplied by.
template <class T>
__device__ void find_scales(const EbftCudaTokens& tokens, int64_t batch, int64_t row, double weight, bool aligned,
                            double* scales, int64_t stride) {
  const Normalization normalization = Normalization(tokens.normalization);
  double joint[1] = {};
  for (int l = 0; normalization != Normalization::none && l < tokens.layers; ++l) {
    double square[1] = {part_of_square(row_of<T>(tokens.layer[l], batch, row), tokens.channels, aligned)};
    joint[0] += square[0];
    if (normalization == Normalization::joint) continue;
    block_sum(square);
    if (threadIdx.x == 0) scales[l * stride] = weight * token_scale(square[0]);
  }
  if (normalization == Normalization::per_layer) return;
  if (normalization == Normalization::joint) block_sum(joint);
  if (threadIdx.x != 0) return;
  const double scale = normalization == Normalization::none ? weight : weight * token_scale(joint[0]);
  for (int l = 0; l < tokens.layers; ++l) scales[l * stride] = scale;
}

// Block: one token; with "mean", one item and all its K tokens. In shared memory: `scales` [L, tokens], then `rows`
// [tokens].
template <class T>
__global__ void __launch_bounds__(most_threads, 4)
    pool_fwd_kernel(const __grid_constant__ EbftCudaTokens tokens, bool aligned, Sum<T>* rollouts, Sum<T>* targets) {
  double* scales = dynamic_shared();
  const bool mean = Pooling(tokens.pooling) == Pooling::mean;
  const int64_t count = mean ? tokens.steps : 1, parts = mean ? 1 : tokens.steps;
  int64_t* rows = reinterpret_cast<int64_t*>(scales + tokens.layers * count);
  const int64_t first = blockIdx.x % parts;
  const Item item = item_of(tokens, blockIdx.x / parts);
  const int64_t* item_rows = (item.is_target ? tokens.target_rows : tokens.rollout_rows) + item.number * tokens.steps;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t row = item_rows[first + k];
    const bool exists = row >= 0 && row < tokens.packed;
    const double weight = exists ? weight_of(tokens, item, first + k) : nan("");
    find_scales<T>(tokens, item.batch, exists ? row : 0, weight, aligned, scales + k, count);
    if (threadIdx.x == 0) rows[k] = exists ? row : 0;
  }
  __syncthreads();
  const FeatureLayout place = layout_of(tokens);
  Sum<T>* out = (item.is_target ? targets : rollouts) + item.number * place.size + first * place.step;
  for (int l = 0; l < tokens.layers; ++l) {
    for_each_piece<T>(tokens.channels, aligned, [&](int64_t f, auto width) {
      constexpr int Width = width;
      Sum<T> total[Width] = {};
#pragma unroll 4
      for (int64_t k = 0; k < count; ++k) {
        const Pack<T, Width> x = load<Width>(row_of<T>(tokens.layer[l], item.batch, rows[k]) + f);
        const Sum<T> scale = Sum<T>(scales[l * count + k]);
#pragma unroll
        for (int v = 0; v < Width; ++v) total[v] += scale * x[v];
      }
      store<Width>(out + l * place.layer + f, total);
    });
  }
}

// The gradients to be written, [B, S, C] each.
struct Gradients {
  void* layer[ebft_cuda_most_layers];
};

// What a packed row is used for: the gradient of the feature where its first layer stands, and its weight there.
template <class T>
struct Use {
  const Sum<T>* grad;
  Sum<T> weight;
};

// The uses of one packed row. The first ones are looked up once for all threads; more than that are rare.
template <class T>
struct Uses {
  static constexpr int most_kept = 32;
  const EbftCudaTokens& tokens;
  FeatureLayout place;
  const Sum<T>* grad_rollouts;
  const Sum<T>* grad_targets;
  const int64_t* numbers;
  int64_t count;
  Use<T>* kept;

  __device__ Use<T> look_up(int64_t u) const {
    const int64_t step = numbers[u] % tokens.steps;
    const Item item = item_of(tokens, numbers[u] / tokens.steps);
    const Sum<T>* grad = item.is_target ? grad_targets : grad_rollouts;
    return {grad + item.number * place.size + step * place.step, Sum<T>(weight_of(tokens, item, step))};
  }

  // The sum of all gradients of `Width` channels from f on of one layer.
  template <int Width>
  __device__ void gather(int layer, int64_t f, Sum<T> (&total)[Width]) const {
#pragma unroll
    for (int v = 0; v < Width; ++v) total[v] = 0;
    for (int64_t u = 0; u < count; ++u) {
      const Use<T> use = u < most_kept ? kept[u] : look_up(u);
      Sum<T> grad[Width];
      load_sums(use.grad + layer * place.layer + f, grad);
#pragma unroll
      for (int v = 0; v < Width; ++v) total[v] += use.weight * grad[v];
    }
  }
};

// The packed row of a block.
struct Row {
  int64_t batch;
  int64_t row;
  int64_t number;  // b * S + s
  bool aligned;
};

// |x|^2 and <x, g> of the hidden states x of layers [first, last) of one row, over the block.
template <class T>
__device__ TokenGradient measure(const Uses<T>& uses, const Row& at, int first, int last) {
  double sums[2] = {};
  for (int l = first; l < last; ++l) {
    const T* row = row_of<T>(uses.tokens.layer[l], at.batch, at.row);
    Sum<T> square = 0, along = 0;
    for_each_piece<T>(uses.tokens.channels, at.aligned, [&](int64_t f, auto width) {
      constexpr int Width = width;
      Sum<T> grad[Width];
      uses.gather(l, f, grad);
      const Pack<T, Width> x = load<Width>(row + f);
#pragma unroll
      for (int v = 0; v < Width; ++v) {
        square += Sum<T>(x[v]) * x[v];
        along += x[v] * grad[v];
      }
    });
    sums[0] += square;
    sums[1] += along;
  }
  block_sum(sums);
  return token_gradient(sums[0], sums[1]);
}

// Writes the gradients of layers [first, last) of one row.
template <class T>
__device__ void write(const Uses<T>& uses, const Row& at, int first, int last, const TokenGradient& gradient,
                      const Gradients& grads) {
  const Sum<T> of_grad = Sum<T>(gradient.grad), of_token = Sum<T>(gradient.token);
  for (int l = first; l < last; ++l) {
    const T* row = row_of<T>(uses.tokens.layer[l], at.batch, at.row);
    T* out = static_cast<T*>(grads.layer[l]) + at.number * uses.tokens.channels;
    for_each_piece<T>(uses.tokens.channels, at.aligned, [&](int64_t f, auto width) {
      constexpr int Width = width;
      Sum<T> grad[Width];
      uses.gather(l, f, grad);
      const Pack<T, Width> x = load<Width>(row + f);
#pragma unroll
      for (int v = 0; v < Width; ++v) {
        grad[v] *= of_grad;
        // What is not normalised does not depend on x, which may be infinite.
        if (of_token != 0) grad[v] += of_token * x[v];
      }
      store<Width>(out + f, grad);
    });
  }
}

// Block: one packed row.
template <class T>
__global__ void __launch_bounds__(most_threads, 4)
    pool_bwd_kernel(const __grid_constant__ EbftCudaTokens tokens, const __grid_constant__ Gradients grads,
                    const int64_t* begin, const int64_t* numbers, bool aligned, const Sum<T>* grad_rollouts,
                    const Sum<T>* grad_targets) {
  __shared__ Use<T> kept[Uses<T>::most_kept];
  const int64_t number = blockIdx.x, first = begin[number], count = begin[number + 1] - first;
  const Row at = {number / tokens.packed, number % tokens.packed, number, aligned};
  const Uses<T> uses = {tokens, layout_of(tokens), grad_rollouts, grad_targets, numbers + first, count, kept};
  for (int u = threadIdx.x; u < uses.most_kept && u < count; u += blockDim.x) kept[u] = uses.look_up(u);
  __syncthreads();
  const Normalization normalization = Normalization(tokens.normalization);
  if (count == 0 || normalization == Normalization::none) return write(uses, at, 0, tokens.layers, {1, 0}, grads);
  const int together = normalization == Normalization::joint ? tokens.layers : 1;
  for (int l = 0; l < tokens.layers; l += together) {
    write(uses, at, l, l + together, measure(uses, at, l, l + together), grads);
  }
}

// Whether every row that is read, of `element_bytes` per channel, starts at a multiple of 16 bytes.
bool rows_are_aligned(const EbftCudaTokens& x, int64_t element_bytes) {
  bool aligned = x.channels * element_bytes % 16 == 0;
  for (int l = 0; l < x.layers; ++l) {
    aligned = aligned && is_aligned(x.layer[l].data) && x.layer[l].batch_stride % 16 == 0 &&
              x.layer[l].row_stride % 16 == 0;
  }
  return aligned;
}

EbftCudaStatus check(int dtype, const EbftCudaTokens* x) {
  if (!x) return null_address("tokens");
  if (dtype < 0 || dtype > 3) return bad_choice("dtype", 4, dtype);
  for (int64_t size : {x->batch, x->packed, x->channels, x->anchors}) {
    if (size < 0) return bad_argument("sizes: expected no negative one", size);
  }
  if (x->samples < 1) return bad_argument("n: expected at least one rollout", x->samples);
  if (x->steps < 1) return bad_argument("K: expected at least one token", x->steps);
  if (x->pooling < 0 || x->pooling >= poolings) return bad_choice("pooling", poolings, x->pooling);
  if (x->normalization < 0 || x->normalization >= normalizations) {
    return bad_choice("normalization", normalizations, x->normalization);
  }
  if (x->layers < 1 || x->layers > ebft_cuda_most_layers) {
    return bad_argument("layers: on CUDA pooling takes 1 to 64 layers", x->layers);
  }
  if (Pooling(x->pooling) == Pooling::last_token && x->steps != 1) {
    return bad_argument("K: expected 1 token for last_token", x->steps);
  }
  if (x->batch * x->packed * x->channels > 0) {
    for (int l = 0; l < x->layers; ++l) {
      if (!x->layer[l].data) return null_address("layer");
    }
  }
  if (x->batch * x->anchors == 0) return {};
  if (!x->rollout_rows) return null_address("rollout_rows");
  if (!x->target_rows) return null_address("target_rows");
  return {};
}

}  // namespace
}  // namespace ebft::cuda

EbftCudaStatus ebft_cuda_pool_features(int dtype, const EbftCudaTokens* tokens, void* rollouts, void* targets,
                                       void* stream) {
  using namespace ebft;
  using namespace ebft::cuda;
  EbftCudaStatus status = check(dtype, tokens);
  if (status.error || tokens->batch * tokens->anchors * tokens->channels == 0) return status;
  if (!rollouts) return null_address("rollouts");
  if (!targets) return null_address("targets");
  if (tokens->packed == 0) return bad_argument("S: expected at least one packed row", 0);
  const bool mean = Pooling(tokens->pooling) == Pooling::mean;
  const int64_t items = tokens->batch * tokens->anchors * (tokens->samples + 1);
  const int64_t tokens_of_block = mean ? tokens->steps : 1, scales = tokens->layers * tokens_of_block;
  if (scales > ebft_cuda_most_averaged) {
    return bad_argument("L*K: on CUDA a mean is taken over at most 2560 hidden states", scales);
  }
  const int64_t shared = 8 * (scales + tokens_of_block);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = rows_are_aligned(*tokens, sizeof(T)) && is_aligned(rollouts) && is_aligned(targets);
    status = launch("pool_fwd_kernel", pool_fwd_kernel<T>, items * (mean ? 1 : tokens->steps),
                    threads_for(tokens->channels, sizeof(T)), size_t(shared), stream, *tokens, aligned,
                    static_cast<Sum<T>*>(rollouts), static_cast<Sum<T>*>(targets));
  });
  return status;
}

EbftCudaStatus ebft_cuda_pool_features_backward(int dtype, const EbftCudaTokens* tokens, const int64_t* begin,
                                                const int64_t* uses, const void* grad_rollouts,
                                                const void* grad_targets, void* const* grads, void* stream) {
  using namespace ebft::cuda;
  EbftCudaStatus status = check(dtype, tokens);
  if (status.error || tokens->batch * tokens->packed * tokens->channels == 0) return status;
  if (!begin) return null_address("begin");
  if (!grads) return null_address("grads");
  if (tokens->batch * tokens->anchors > 0) {
    if (!uses) return null_address("uses");
    if (!grad_rollouts) return null_address("grad_rollouts");
    if (!grad_targets) return null_address("grad_targets");
  }
  Gradients out = {};
  bool grads_are_aligned = is_aligned(grad_rollouts) && is_aligned(grad_targets);
  for (int l = 0; l < tokens->layers; ++l) {
    if (!grads[l]) return null_address("grads");
    out.layer[l] = grads[l];
    grads_are_aligned = grads_are_aligned && is_aligned(grads[l]);
  }
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = grads_are_aligned && rows_are_aligned(*tokens, sizeof(T));
    status = launch("pool_bwd_kernel", pool_bwd_kernel<T>, tokens->batch * tokens->packed,
                    threads_for(tokens->channels, sizeof(T)), 0, stream, *tokens, out, begin, uses, aligned,
                    static_cast<const Sum<T>*>(grad_rollouts), static_cast<const Sum<T>*>(grad_targets));
  });
  return status;
}
