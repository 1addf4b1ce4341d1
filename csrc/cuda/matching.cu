// Feature matching in two kernels. The first makes the Gram matrix of every anchor, one block each, as fast as memory
// gives the features. The second does the arithmetic on these small matrices, one anchor per thread: a warp that does
// it for 32 anchors takes as long as for one, which matters where float64 is slow.
#include "../core/matching.h"

#include "features.h"

namespace ebft::cuda {
namespace {

// Which inner products a thread keeps: those of rows [first, first + Rows) with rows [second, second + Rows).
template <int Rows, bool Triangle>
struct Tile {
  static constexpr int count = Triangle ? Rows * (Rows + 1) / 2 : Rows * Rows;
  int first;
  int second;
};

// Row i of an anchor, the target last; rows beyond it are the target again.
template <class T>
__device__ const T* row_of(const Anchor& anchor, int n, int i, int64_t offset) {
  const char* row = i < n ? anchor.rollouts + i * anchor.stride : anchor.target;
  return reinterpret_cast<const T*>(row) + offset;
}

// Writes both triangles of one tile of the Gram matrix [n+1,n+1] of `count` columns from `offset` on.
template <class T, int Rows, bool Triangle>
__device__ void gram_tile(const Anchor& anchor, int n, Tile<Rows, Triangle> tile, int64_t offset, int64_t count,
                          bool aligned, double* gram) {
  double sums[tile.count] = {};
  const T *left[Rows], *right[Rows];
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
    left[i] = row_of<T>(anchor, n, tile.first + i, offset);
    right[i] = row_of<T>(anchor, n, tile.second + i, offset);
  }
  for_each_piece<T>(count, aligned, [&](int64_t f, auto width) {
    constexpr int Width = width;
    Pack<T, Width> x[Rows], y[Rows];
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      x[i] = load<Width>(left[i] + f);
      y[i] = Triangle ? x[i] : load<Width>(right[i] + f);
    }
#pragma unroll
    for (int v = 0; v < Width; ++v) {
      int next = 0;
#pragma unroll
      for (int i = 0; i < Rows; ++i) {
        const double xi = x[i][v];
#pragma unroll
        for (int k = Triangle ? i : 0; k < Rows; ++k) sums[next++] += xi * double(y[k][v]);
      }
    }
  });
  block_sum(sums);
  int next = 0;
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
#pragma unroll
    for (int k = Triangle ? i : 0; k < Rows; ++k, ++next) {
      const int row = tile.first + i, column = tile.second + k;
      if (int(threadIdx.x) != next % warp_size || row > n || column > n) continue;
      gram[row * (n + 1) + column] = gram[column * (n + 1) + row] = sums[next];
    }
  }
}

// Block: one of `groups` parts of the features of one anchor.
template <class T, int Rows, bool Tiled>
__global__ void __launch_bounds__(most_threads, 2)
    gram_kernel(const __grid_constant__ EbftCudaFeatures features, int64_t groups, bool aligned, double* grams) {
  const int64_t item = blockIdx.x, part = features.features / groups;
  const int64_t offset = item % groups * part;
  const Anchor anchor = find_anchor(features, item / groups);
  const int n = int(features.rollouts_per_anchor);
  double* gram = grams + item * (n + 1) * (n + 1);
  if constexpr (!Tiled) {
    gram_tile<T>(anchor, n, Tile<Rows, true>{0, 0}, offset, part, aligned, gram);
  } else {
    for (int first = 0; first <= n; first += Rows) {
      gram_tile<T>(anchor, n, Tile<Rows, true>{first, first}, offset, part, aligned, gram);
      for (int second = first + Rows; second <= n; second += Rows) {
        gram_tile<T>(anchor, n, Tile<Rows, false>{first, second}, offset, part, aligned, gram);
      }
    }
  }
}

// Doubles from the scratch memory of one thread to that of the next: odd, so that threads do not meet in a bank.
__host__ __device__ int64_t scratch_of(int64_t n) { return matching_memory(n) | 1; }

// Thread: one anchor.
template <class T>
__global__ void __launch_bounds__(warp_size, 1)
    match_kernel(int64_t anchors, int n, int64_t groups, const double* grams, MatchingOptions options,
                 MatchingResults<T> results) {
  const int64_t anchor = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (anchor >= anchors) return;
  Matching<int> matching = matching_begin(n, dynamic_shared() + threadIdx.x * scratch_of(n));
  for (int64_t group = 0; group < groups; ++group) {
    const double* gram = grams + (anchor * groups + group) * (n + 1) * (n + 1);
    matching_add(matching, gram, options.whitening);
  }
  const int64_t first = anchor * n;
  matching_finish(matching, options,
                  MatchingResults<T>{results.loss + anchor, results.alignment + first, results.diversity + first,
                                     results.reward + first, results.advantage + first});
}

template <class T>
EbftCudaStatus make_grams(const EbftCudaFeatures& x, int64_t groups, double* gram, void* stream) {
  const int64_t part = x.features / groups;
  const bool aligned =
      rollouts_are_aligned(x) && targets_are_aligned(x) && (groups == 1 || part * int64_t(sizeof(T)) % 16 == 0);
  EbftCudaStatus status;
  with_rows(x.rollouts_per_anchor, [&](auto rows, auto tiled) {
    status = launch("gram_kernel", gram_kernel<T, decltype(rows){}, decltype(tiled){}>, count_anchors(x) * groups,
                    threads_for(part, sizeof(T)), 0, stream, x, groups, aligned, gram);
  });
  return status;
}

template <class T>
EbftCudaStatus match_grams(const EbftCudaFeatures& x, int64_t groups, const double* gram,
                           const MatchingOptions& options, const MatchingResults<void>& results, void* stream) {
  const int64_t anchors = count_anchors(x), n = x.rollouts_per_anchor;
  const int64_t shared = 48 << 10, bytes = scratch_of(n) * int64_t(sizeof(double));
  const int threads = int(shared / bytes < warp_size ? shared / bytes : warp_size);
  const auto to = [](void* out) { return static_cast<T*>(out); };
  return launch("match_kernel", match_kernel<T>, (anchors + threads - 1) / threads, threads, threads * bytes, stream,
                anchors, int(n), groups, gram, options,
                MatchingResults<T>{to(results.loss), to(results.alignment), to(results.diversity), to(results.reward),
                                   to(results.advantage)});
}

EbftCudaStatus check(const EbftCudaFeatures& x, int64_t groups, int whitening, int estimator, const double* gram,
                     const MatchingResults<void>& results) {
  if (x.rollouts_per_anchor > ebft_cuda_most_rollouts) {
    return bad_argument("n: on CUDA feature matching takes at most 16 rollouts per anchor", x.rollouts_per_anchor);
  }
  if (groups < 1 || x.features % groups) return bad_argument("groups: expected a divisor of F", groups);
  if (whitening < 0 || whitening > 2) return bad_choice("whitening", 3, whitening);
  if (estimator < 0 || estimator > 2) return bad_choice("estimator", 3, estimator);
  if (count_anchors(x) == 0) return {};
  if (!x.targets) return null_address("targets");
  if (!gram) return null_address("gram");
  if (!results.loss) return null_address("loss");
  if (!results.alignment) return null_address("alignment");
  if (!results.diversity) return null_address("diversity");
  if (!results.reward) return null_address("reward");
  if (!results.advantage) return null_address("advantage");
  return {};
}

}  // namespace
}  // namespace ebft::cuda

EbftCudaStatus ebft_cuda_feature_matching(int dtype, const EbftCudaFeatures* features, int64_t groups, int whitening,
                                          double alignment_coef, double diversity_coef, int estimator, double* gram,
                                          void* loss, void* alignment, void* diversity, void* reward, void* advantage,
                                          void* stream) {
  using namespace ebft;
  using namespace ebft::cuda;
  const MatchingResults<void> results = {loss, alignment, diversity, reward, advantage};
  EbftCudaStatus status = check_features(dtype, features);
  if (!status.error) status = check(*features, groups, whitening, estimator, gram, results);
  if (status.error) return status;
  const MatchingOptions options = {Whitening(whitening), Estimator(estimator), alignment_coef, diversity_coef};
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    status = make_grams<T>(*features, groups, gram, stream);
    if (!status.error) status = match_grams<Sum<T>>(*features, groups, gram, options, results, stream);
  });
  return status;
}
