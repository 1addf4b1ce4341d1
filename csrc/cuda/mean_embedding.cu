// The mean-embedding loss || mean_j x_j - y ||^2 and its gradients: one block per anchor, which reads each feature once
// (with `unbiased` twice, the second time from the cache).
#include "../core/mean_embedding.h"

#include "features.h"

namespace ebft::cuda {
namespace {

// mean_j x_j of `Width` columns from `first` on; `first` is the address in the first rollout.
template <class T, int Width>
__device__ void mean_of(const T* first, int64_t stride, int n, Sum<T> (&mean)[Width]) {
#pragma unroll
  for (int v = 0; v < Width; ++v) mean[v] = 0;
#pragma unroll 4
  for (int j = 0; j < n; ++j) {
    const Pack<T, Width> x = load<Width>(reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + j * stride));
#pragma unroll
    for (int v = 0; v < Width; ++v) mean[v] += x[v];
  }
#pragma unroll
  for (int v = 0; v < Width; ++v) mean[v] /= Sum<T>(n);
}

// Calls visit(j, x_j - mean) for each rollout.
template <class T, int Width, class Visit>
__device__ void for_each_deviation(const T* first, int64_t stride, int n, const Sum<T> (&mean)[Width],
                                   const Visit& visit) {
#pragma unroll 4
  for (int j = 0; j < n; ++j) {
    const Pack<T, Width> x = load<Width>(reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + j * stride));
    Sum<T> deviation[Width];
#pragma unroll
    for (int v = 0; v < Width; ++v) deviation[v] = x[v] - mean[v];
    visit(j, deviation);
  }
}

// Block: one anchor.
template <class T>
__global__ void __launch_bounds__(most_threads)
    mean_embedding_fwd_kernel(const __grid_constant__ EbftCudaFeatures features, bool unbiased, bool aligned,
                              Sum<T>* loss, Sum<T>* difference) {
  const int64_t number = blockIdx.x;
  const Anchor anchor = find_anchor(features, number);
  const int n = int(features.rollouts_per_anchor);
  const T *rollout = reinterpret_cast<const T*>(anchor.rollouts), *target = reinterpret_cast<const T*>(anchor.target);
  double squares[2] = {};  // of the difference, and of what the rollouts deviate from their mean
  for_each_piece<T>(features.features, aligned, [&](int64_t f, auto width) {
    constexpr int Width = width;
    Sum<T> mean[Width], d[Width];
    mean_of(rollout + f, anchor.stride, n, mean);
    const Pack<T, Width> y = load<Width>(target + f);
#pragma unroll
    for (int v = 0; v < Width; ++v) {
      d[v] = mean[v] - y[v];
      squares[0] += double(d[v]) * d[v];
    }
    store<Width>(difference + number * features.features + f, d);
    if (!unbiased) return;
    for_each_deviation(rollout + f, anchor.stride, n, mean, [&](int, const Sum<T>(&deviation)[Width]) {
#pragma unroll
      for (int v = 0; v < Width; ++v) squares[1] += double(deviation[v]) * deviation[v];
    });
  });
  block_sum(squares);
  if (threadIdx.x == 0) loss[number] = Sum<T>(mean_embedding_loss(n, unbiased, squares[0], squares[1]));
}

// Block: one anchor.
template <class T>
__global__ void __launch_bounds__(most_threads)
    mean_embedding_bwd_kernel(const __grid_constant__ EbftCudaFeatures features, bool unbiased, bool aligned,
                              const Sum<T>* grads, const Sum<T>* difference, T* grad_rollouts, T* grad_targets) {
  const int64_t number = blockIdx.x, count = features.features;
  const Anchor anchor = find_anchor(features, number);
  const int n = int(features.rollouts_per_anchor);
  const MeanEmbeddingGradient gradient = mean_embedding_gradient(n, unbiased, grads[number]);
  const Sum<T> of_target = Sum<T>(gradient.target), of_rollout = Sum<T>(gradient.rollout);
  const Sum<T> of_spread = Sum<T>(gradient.spread);
  const T* rollout = reinterpret_cast<const T*>(anchor.rollouts);
  for_each_piece<T>(count, aligned, [&](int64_t f, auto width) {
    constexpr int Width = width;
    Sum<T> d[Width], mean[Width], out[Width];
    load_sums(difference + number * count + f, d);
#pragma unroll
    for (int v = 0; v < Width; ++v) out[v] = of_target * d[v];
    store<Width>(grad_targets + number * count + f, out);
    T* to = grad_rollouts + number * n * count + f;
    if (unbiased) {
      mean_of(rollout + f, anchor.stride, n, mean);
      for_each_deviation(rollout + f, anchor.stride, n, mean, [&](int j, const Sum<T>(&deviation)[Width]) {
#pragma unroll
        for (int v = 0; v < Width; ++v) out[v] = of_rollout * d[v] + of_spread * deviation[v];
        store<Width>(to + j * count, out);
      });
      return;
    }
#pragma unroll
    for (int v = 0; v < Width; ++v) out[v] = of_rollout * d[v];
    for (int j = 0; j < n; ++j) store<Width>(to + j * count, out);
  });
}

EbftCudaStatus check(int dtype, const EbftCudaFeatures* features, int unbiased) {
  const EbftCudaStatus status = check_features(dtype, features);
  if (status.error || !unbiased || features->rollouts_per_anchor > 1) return status;
  return bad_argument("unbiased: expected at least 2 rollouts per anchor", features->rollouts_per_anchor);
}

}  // namespace
}  // namespace ebft::cuda

EbftCudaStatus ebft_cuda_mean_embedding_forward(int dtype, const EbftCudaFeatures* features, int unbiased, void* loss,
                                                void* difference, void* stream) {
  using namespace ebft::cuda;
  EbftCudaStatus status = check(dtype, features, unbiased);
  if (status.error || count_anchors(*features) == 0) return status;
  if (!features->targets) return null_address("targets");
  if (!loss) return null_address("loss");
  if (!difference) return null_address("difference");
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const EbftCudaFeatures& x = *features;
    const bool aligned = rollouts_are_aligned(x) && targets_are_aligned(x) && is_aligned(difference) &&
                         x.features % wide<T> == 0;
    status = launch("mean_embedding_fwd_kernel", mean_embedding_fwd_kernel<T>, count_anchors(x),
                    threads_for(x.features, sizeof(T)), 0, stream, x, unbiased != 0, aligned,
                    static_cast<Sum<T>*>(loss), static_cast<Sum<T>*>(difference));
  });
  return status;
}

EbftCudaStatus ebft_cuda_mean_embedding_backward(int dtype, const EbftCudaFeatures* features, int unbiased,
                                                 const void* grad, const void* difference, void* grad_rollouts,
                                                 void* grad_targets, void* stream) {
  using namespace ebft::cuda;
  EbftCudaStatus status = check(dtype, features, unbiased);
  if (status.error || count_anchors(*features) == 0) return status;
  if (!grad) return null_address("grad");
  if (!difference) return null_address("difference");
  if (!grad_rollouts) return null_address("grad_rollouts");
  if (!grad_targets) return null_address("grad_targets");
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const EbftCudaFeatures& x = *features;
    const bool aligned = (!unbiased || rollouts_are_aligned(x)) && is_aligned(difference) &&
                         is_aligned(grad_rollouts) && is_aligned(grad_targets) && x.features % wide<T> == 0;
    status = launch("mean_embedding_bwd_kernel", mean_embedding_bwd_kernel<T>, count_anchors(x),
                    threads_for(x.features, sizeof(T)), 0, stream, x, unbiased != 0, aligned,
                    static_cast<const Sum<T>*>(grad), static_cast<const Sum<T>*>(difference),
                    static_cast<T*>(grad_rollouts), static_cast<T*>(grad_targets));
  });
  return status;
}
