// The Python module ebft_kernels._C: the kernels for the CPU.
#include "bindings_common.h"
#include "cpu/matching.h"
#include "cpu/pooling.h"

#include <limits>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

using namespace ebft;

cpu::Execution execution(int isa, int threads) {
  require(threads >= 1, "threads: expected at least 1");
  return {checked_enum<cpu::Isa>("isa", isa, cpu::isa_count()), threads};
}

void* pointer(uintptr_t address, bool needed) {
  require(address != 0 || !needed, "address: expected that of a tensor, got 0");
  return reinterpret_cast<void*>(address);
}

// `sizes` [leading..., n, F] of the rollouts; strides in bytes, those of the last axes left out.
cpu::Features features(int dtype, Sizes sizes, uintptr_t rollouts, Sizes rollout_strides, uintptr_t targets,
                       Sizes target_strides) {
  check_strides(sizes, rollout_strides, target_strides);
  cpu::Features x;
  x.dtype = checked_enum<cpu::Dtype>("dtype", dtype, 4);
  for (int64_t size : sizes) require(size >= 0, "sizes: expected no negative one");
  x.features = sizes.back();
  const int64_t n = sizes[sizes.size() - 2];
  // Positions in an n x n matrix are ints.
  require(n >= 1 && n <= 16384 && x.features >= 1, "sizes: expected at least one feature and 1 to 16384 rollouts");
  x.rollouts_per_anchor = int(n);
  sizes.resize(sizes.size() - 2);
  x.leading = std::move(sizes);
  const bool needed = x.anchors() > 0;
  x.rollouts = {pointer(rollouts, needed), std::move(rollout_strides)};
  x.targets = {pointer(targets, needed), std::move(target_strides)};
  return x;
}

void feature_matching(int isa, int threads, int dtype, const Sizes& sizes, uintptr_t rollouts,
                      const Sizes& rollout_strides, uintptr_t targets, const Sizes& target_strides, int groups,
                      int whitening, double alignment_coef, double diversity_coef, int estimator, uintptr_t loss,
                      uintptr_t alignment, uintptr_t diversity, uintptr_t reward, uintptr_t advantage) {
  const cpu::Execution run = execution(isa, threads);
  const cpu::Features x = features(dtype, sizes, rollouts, rollout_strides, targets, target_strides);
  require(groups >= 1 && x.features % groups == 0, "groups: expected a divisor of the number of features");
  const MatchingOptions options = {checked_enum<Whitening>("whitening", whitening, 3),
                                   checked_enum<Estimator>("estimator", estimator, 3), alignment_coef, diversity_coef};
  const bool needed = x.anchors() > 0;
  const cpu::MatchingOutputs outputs = {pointer(loss, needed), pointer(alignment, needed), pointer(diversity, needed),
                                        pointer(reward, needed), pointer(advantage, needed)};
  const py::gil_scoped_release unlocked;
  cpu::feature_matching(run, x, groups, options, outputs);
}

void mean_embedding_forward(int isa, int threads, int dtype, const Sizes& sizes, uintptr_t rollouts,
                            const Sizes& rollout_strides, uintptr_t targets, const Sizes& target_strides,
                            bool unbiased, uintptr_t loss, uintptr_t difference) {
  const cpu::Execution run = execution(isa, threads);
  const cpu::Features x = features(dtype, sizes, rollouts, rollout_strides, targets, target_strides);
  require(!unbiased || x.rollouts_per_anchor > 1, "unbiased: expected at least 2 rollouts");
  const bool needed = x.anchors() > 0;
  void *loss_out = pointer(loss, needed), *difference_out = pointer(difference, needed);
  const py::gil_scoped_release unlocked;
  cpu::mean_embedding_forward(run, x, unbiased, loss_out, difference_out);
}

void mean_embedding_backward(int isa, int threads, int dtype, const Sizes& sizes, uintptr_t rollouts,
                             const Sizes& rollout_strides, uintptr_t grad, uintptr_t difference, bool unbiased,
                             uintptr_t grad_rollouts, uintptr_t grad_targets) {
  const cpu::Execution run = execution(isa, threads);
  const Sizes unread(sizes.size() < 2 ? 0 : sizes.size() - 2);
  const cpu::Features x = features(dtype, sizes, rollouts, rollout_strides, rollouts, unread);
  require(!unbiased || x.rollouts_per_anchor > 1, "unbiased: expected at least 2 rollouts");
  const bool needed = x.anchors() > 0;
  const void *grad_in = pointer(grad, needed), *difference_in = pointer(difference, needed);
  void *rollouts_out = pointer(grad_rollouts, needed), *targets_out = pointer(grad_targets, needed);
  const py::gil_scoped_release unlocked;
  cpu::mean_embedding_backward(run, x, unbiased, grad_in, difference_in, rollouts_out, targets_out);
}

std::vector<cpu::Layer> checked_layers(const Layers& layers, bool needed) {
  require(!layers.empty(), "layers: expected at least one");
  std::vector<cpu::Layer> checked;
  for (const auto& [address, batch, row] : layers) checked.push_back({pointer(address, needed), batch, row});
  return checked;
}

// `sizes`: B, S, C, A, n, K.
cpu::Tokens tokens(const Sizes& sizes, uintptr_t rollout_rows, uintptr_t target_rows, uintptr_t counted) {
  require(sizes.size() == 6, "sizes: expected 6");
  for (int64_t size : sizes) require(size >= 0, "sizes: expected no negative one");
  const bool needed = sizes[0] * sizes[3] > 0;
  require(!needed || (sizes[4] >= 1 && sizes[5] >= 1), "sizes: expected at least one rollout and one step");
  require(sizes[5] < std::numeric_limits<int>::max(), "sizes: expected fewer steps");
  return {sizes[0],
          sizes[1],
          sizes[3],
          sizes[4],
          sizes[5],
          static_cast<const int64_t*>(pointer(rollout_rows, needed)),
          static_cast<const int64_t*>(pointer(target_rows, needed)),
          static_cast<const bool*>(pointer(counted, false))};
}

cpu::PoolingOptions pooling_options(int pooling, int normalization) {
  return {checked_enum<Pooling>("pooling", pooling, 4), checked_enum<Normalization>("normalization", normalization, 3)};
}

void pool_features(int isa, int threads, int dtype, const Sizes& sizes, const Layers& layers, uintptr_t rollout_rows,
                   uintptr_t target_rows, uintptr_t counted, int pooling, int normalization, uintptr_t rollouts,
                   uintptr_t targets) {
  const cpu::Execution run = execution(isa, threads);
  const auto type = checked_enum<cpu::Dtype>("dtype", dtype, 4);
  const cpu::Tokens rows = tokens(sizes, rollout_rows, target_rows, counted);
  const cpu::PoolingOptions options = pooling_options(pooling, normalization);
  const bool needed = rows.targets() * sizes[2] > 0;
  const std::vector<cpu::Layer> hidden = checked_layers(layers, needed);
  void *rollouts_out = pointer(rollouts, needed), *targets_out = pointer(targets, needed);
  const py::gil_scoped_release unlocked;
  cpu::pool_features(run, type, hidden, sizes[2], rows, options, rollouts_out, targets_out);
}

void pool_features_backward(int isa, int threads, int dtype, const Sizes& sizes, const Layers& layers,
                            uintptr_t rollout_rows, uintptr_t target_rows, uintptr_t counted, int pooling,
                            int normalization, uintptr_t grad_rollouts, uintptr_t grad_targets, const Layers& grads) {
  const cpu::Execution run = execution(isa, threads);
  const auto type = checked_enum<cpu::Dtype>("dtype", dtype, 4);
  const cpu::Tokens rows = tokens(sizes, rollout_rows, target_rows, counted);
  const cpu::PoolingOptions options = pooling_options(pooling, normalization);
  const bool needed = sizes[0] * sizes[1] * sizes[2] > 0, read = rows.targets() * sizes[2] > 0;
  require(layers.size() == grads.size(), "grads: expected one for each layer");
  const std::vector<cpu::Layer> hidden = checked_layers(layers, needed), out = checked_layers(grads, needed);
  const void *rollouts_in = pointer(grad_rollouts, read), *targets_in = pointer(grad_targets, read);
  const py::gil_scoped_release unlocked;
  cpu::pool_features_backward(run, type, hidden, sizes[2], rows, options, rollouts_in, targets_in, out);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::isa_count(); ++i) names.emplace_back(cpu::isa_name(cpu::Isa(i)));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of ebft_kernels. Not a public interface: addresses are believed.";
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
  m.def("isas", &isas, "Instruction sets that this machine can run, the best last.");
  m.def("feature_matching", &feature_matching);
  m.def("mean_embedding_forward", &mean_embedding_forward);
  m.def("mean_embedding_backward", &mean_embedding_backward);
  m.def("pool_features", &pool_features);
  m.def("pool_features_backward", &pool_features_backward);
}
