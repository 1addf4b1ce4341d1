// The Python module ebft_kernels._C: the kernels for the CPU.
#include "bindings_common.h"
#include "cpu/attention.h"
#include "cpu/layout.h"
#include "cpu/log_probs.h"
#include "cpu/matching.h"
#include "cpu/pooling.h"

#include <algorithm>
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

template <class T>
T* array(uintptr_t address, bool needed) {
  return static_cast<T*>(pointer(address, needed));
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

// `sizes`: rows, columns, the first column, all targets.
cpu::LogitsTile logits_tile(int dtype, const Sizes& sizes, uintptr_t logits, uintptr_t targets, uintptr_t offsets,
                            double factor, double softcap) {
  require(sizes.size() == 4 && sizes[0] >= 0 && sizes[1] >= 1 && sizes[2] >= 0 && sizes[3] >= 0,
          "sizes: expected rows, at least one column, the first column, and targets");
  require(softcap >= 0, "softcap: expected no negative one");
  const bool needed = sizes[0] > 0;
  return {checked_enum<cpu::Dtype>("dtype", dtype, 4), pointer(logits, needed), sizes[0], sizes[1], sizes[2],
          array<const int64_t>(targets, sizes[3] > 0), array<const int64_t>(offsets, needed), factor, softcap};
}

void softmax_add(int isa, int threads, int dtype, const Sizes& sizes, uintptr_t logits, uintptr_t targets,
                 uintptr_t offsets, double factor, double softcap, uintptr_t largest, uintptr_t total,
                 uintptr_t at_target) {
  const cpu::Execution run = execution(isa, threads);
  const cpu::LogitsTile tile = logits_tile(dtype, sizes, logits, targets, offsets, factor, softcap);
  const bool needed = tile.rows > 0;
  void *largest_out = pointer(largest, needed), *total_out = pointer(total, needed);
  void* target_out = pointer(at_target, sizes[3] > 0);
  const py::gil_scoped_release unlocked;
  cpu::softmax_add(run, tile, largest_out, total_out, target_out);
}

void softmax_gradient(int isa, int threads, int dtype, const Sizes& sizes, uintptr_t logits, uintptr_t targets,
                      uintptr_t offsets, double factor, double softcap, uintptr_t largest, uintptr_t log_total,
                      uintptr_t whole_upstream, uintptr_t upstream) {
  const cpu::Execution run = execution(isa, threads);
  const cpu::LogitsTile tile = logits_tile(dtype, sizes, logits, targets, offsets, factor, softcap);
  const bool needed = tile.rows > 0;
  const void *largest_in = pointer(largest, needed), *total_in = pointer(log_total, needed);
  const void *whole_in = pointer(whole_upstream, needed), *upstream_in = pointer(upstream, sizes[3] > 0);
  const py::gil_scoped_release unlocked;
  cpu::softmax_gradient(run, tile, largest_in, total_in, whole_in, upstream_in);
}

// `sizes`: rows, columns, columns of a block.
void softmax_blocks(int isa, int threads, int dtype, const Sizes& sizes, uintptr_t logits, uintptr_t largest,
                    uintptr_t total) {
  const cpu::Execution run = execution(isa, threads);
  require(sizes.size() == 3 && sizes[0] >= 0 && sizes[1] >= 1 && sizes[2] >= 1,
          "sizes: expected rows, at least one column, and at least one column of a block");
  const bool needed = sizes[0] > 0;
  const cpu::LogitsBlocks blocks = {checked_enum<cpu::Dtype>("dtype", dtype, 4), pointer(logits, needed), sizes[0],
                                    sizes[1], sizes[2]};
  void *largest_out = pointer(largest, needed), *total_out = pointer(total, needed);
  const py::gil_scoped_release unlocked;
  cpu::softmax_blocks(run, blocks, largest_out, total_out);
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
  return {checked_enum<Pooling>("pooling", pooling, poolings),
          checked_enum<Normalization>("normalization", normalization, normalizations)};
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

// `sizes`: B, P, A, n, G.
PackedSizes packed_sizes(const Sizes& sizes) {
  require(sizes.size() == 5, "sizes: expected 5");
  for (int64_t size : sizes) require(size >= 0, "sizes: expected no negative one");
  const PackedSizes packed = {sizes[1], sizes[2], sizes[3], sizes[4]};
  // Rows are numbered with 32 bits.
  const double rows = double(packed.anchors) * double(packed.samples) * double(packed.horizon) + double(packed.prompt);
  require(rows < std::numeric_limits<int32_t>::max(), "sizes: expected fewer than 2^31 tokens in a packed row");
  return packed;
}

// Address and the strides, in bytes, of all axes but the last of a tensor [B, heads, rows, size].
using Operand = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

cpu::Heads heads(const Operand& operand, bool needed) {
  const auto [address, batch, head, row] = operand;
  return {pointer(address, needed), batch, head, row};
}

// `sizes`: B, H, Hkv, D, Dv, P, R rollouts, G. `step`: the queries are the rows of this step; -1: all rows.
cpu::Attention attention(const Sizes& sizes, int64_t step, const Operand& q, const Operand& k, const Operand& v,
                         const std::vector<LayoutTensor>& ranges, bool full, double scale, double softcap) {
  require(sizes.size() == 8, "sizes: expected 8");
  const PackedSizes packed = packed_sizes({sizes[0], sizes[5], sizes[6], 1, sizes[7]});
  for (int64_t size : sizes) require(size >= 0, "sizes: expected no negative one");
  require(sizes[2] >= 1 && sizes[1] >= 1 && sizes[1] % sizes[2] == 0,
          "sizes: expected key heads that divide the query heads");
  require(sizes[3] >= 1 && sizes[4] >= 1, "sizes: expected heads of at least one number");
  require(step >= -1 && step < std::max<int64_t>(packed.horizon, 0), "step: expected less than the horizon");
  require(ranges.size() == 3, "ranges: expected 3");
  require(softcap >= 0, "softcap: expected none (0) or a positive one");
  cpu::Attention x = {};
  x.batch = sizes[0], x.kv_heads = sizes[2], x.repeat = sizes[1] / sizes[2];
  x.packed = packed.packed(), x.length = packed.prompt, x.horizon = packed.horizon;
  x.size = sizes[3], x.value_size = sizes[4];
  x.rows = step < 0 ? x.packed : packed.anchors;
  x.first = step < 0 ? 0 : x.length + step, x.spacing = step < 0 ? 1 : x.horizon;
  const bool needed = x.batch * x.rows > 0;
  x.q = heads(q, needed), x.k = heads(k, needed), x.v = heads(v, needed);
  x.prefix_start = int32_array("prefix_start", ranges[0], {x.batch, x.packed});
  x.prefix_end = int32_array("prefix_end", ranges[1], {x.batch, x.packed});
  x.own_start = int32_array("own_start", ranges[2], {x.batch, x.packed});
  x.full = full, x.scale = scale, x.softcap = softcap;
  return x;
}

void strided_attention(int isa, int threads, int dtype, const Sizes& sizes, int64_t step, const Operand& q,
                       const Operand& k, const Operand& v, const std::vector<LayoutTensor>& ranges, bool full,
                       double scale, double softcap, uintptr_t sinks, const Operand& out, uintptr_t lse) {
  const cpu::Execution run = execution(isa, threads);
  const auto type = checked_enum<cpu::Dtype>("dtype", dtype, 4);
  cpu::Attention x = attention(sizes, step, q, k, v, ranges, full, scale, softcap);
  const bool needed = x.batch * x.rows > 0;
  x.sinks = array<const double>(sinks, false);
  const cpu::Heads results = heads(out, needed);
  void* statistics = pointer(lse, needed);
  const py::gil_scoped_release unlocked;
  cpu::strided_attention(run, type, x, results, statistics);
}

void strided_attention_backward(int isa, int threads, int dtype, const Sizes& sizes, const Operand& q,
                                const Operand& k, const Operand& v, const std::vector<LayoutTensor>& ranges, bool full,
                                double scale, double softcap, const Operand& out, uintptr_t lse, const Operand& grad,
                                const Operand& grad_q, const Operand& grad_k, const Operand& grad_v) {
  const cpu::Execution run = execution(isa, threads);
  const auto type = checked_enum<cpu::Dtype>("dtype", dtype, 4);
  const cpu::Attention x = attention(sizes, -1, q, k, v, ranges, full, scale, softcap);
  const bool needed = x.batch * x.rows > 0;
  const cpu::Heads results = heads(out, needed), upstream = heads(grad, needed), to_q = heads(grad_q, needed),
                   to_k = heads(grad_k, needed), to_v = heads(grad_v, needed);
  const void* statistics = pointer(lse, needed);
  const py::gil_scoped_release unlocked;
  cpu::strided_attention_backward(run, type, x, results, statistics, upstream, to_q, to_k, to_v);
}

cpu::RangeArrays<int32_t> range_arrays(const LayoutTensor& prefix_start, const LayoutTensor& prefix_end,
                                       const LayoutTensor& own_start, const Sizes& sizes) {
  return {int32_array("prefix_start", prefix_start, sizes), int32_array("prefix_end", prefix_end, sizes),
          int32_array("own_start", own_start, sizes)};
}

void layout_geometry(int isa, int threads, const Sizes& sizes, const LayoutTensor& anchors,
                     const LayoutTensor& prompt_start, uintptr_t positions, const LayoutTensor& prefix_start,
                     const LayoutTensor& prefix_end, const LayoutTensor& own_start) {
  const cpu::Execution run = execution(isa, threads);
  const PackedSizes packed = packed_sizes(sizes);
  const int64_t batch = sizes[0];
  const int32_t* from = int32_array("anchors", anchors, {batch, packed.anchors});
  const int32_t* starts = int32_array("prompt_start", prompt_start, {batch, packed.prompt});
  auto* to = array<int64_t>(positions, batch * packed.packed() > 0);
  const auto ranges = range_arrays(prefix_start, prefix_end, own_start, {batch, packed.packed()});
  const py::gil_scoped_release unlocked;
  cpu::layout_geometry(run.threads, packed, batch, from, starts, to, ranges);
}

void layout_mask(int isa, int threads, const Sizes& sizes, const LayoutTensor& prefix_start,
                 const LayoutTensor& prefix_end, const LayoutTensor& own_start, bool full, uintptr_t mask) {
  const cpu::Execution run = execution(isa, threads);
  const PackedSizes packed = packed_sizes(sizes);
  const auto ranges = range_arrays(prefix_start, prefix_end, own_start, {sizes[0], packed.packed()});
  auto* to = array<uint8_t>(mask, sizes[0] * packed.packed() > 0);
  const py::gil_scoped_release unlocked;
  cpu::dense_mask(run.threads, packed, sizes[0], {ranges.prefix_start, ranges.prefix_end, ranges.own_start}, full, to);
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
  m.attr("poolings") = std::vector<std::string>(pooling_names, pooling_names + poolings);
  m.attr("normalizations") = std::vector<std::string>(normalization_names, normalization_names + normalizations);
  m.def("isas", &isas, "Instruction sets that this machine can run, the best last.");
  m.def("feature_matching", &feature_matching);
  m.def("mean_embedding_forward", &mean_embedding_forward);
  m.def("mean_embedding_backward", &mean_embedding_backward);
  m.def("softmax_add", &softmax_add);
  m.def("softmax_gradient", &softmax_gradient);
  m.def("softmax_blocks", &softmax_blocks);
  m.def("pool_features", &pool_features);
  m.def("pool_features_backward", &pool_features_backward);
  m.def("layout_geometry", &layout_geometry);
  m.def("layout_mask", &layout_mask);
  m.def("strided_attention", &strided_attention);
  m.def("strided_attention_backward", &strided_attention_backward);
}
