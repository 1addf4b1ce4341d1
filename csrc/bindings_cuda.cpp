// The Python module ebft_kernels._cuda: the kernels for CUDA. Its functions take those of ebft_kernels._C's arguments
// that say what to compute, with a stream in front, and the memory that the kernels need to work behind.
#include "bindings_common.h"
#include "cuda/api.h"

#include <cuda_runtime.h>

namespace py = pybind11;

namespace {

using namespace ebft;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

const int64_t* numbers(uintptr_t address) { return static_cast<const int64_t*>(pointer(address)); }

void raise_error(const EbftCudaStatus& status) {
  if (status.error == ebft_cuda_bad_argument) throw std::invalid_argument(status.message);
  if (status.error) throw std::runtime_error(status.message);
}

// `sizes` [leading..., n, F] of the rollouts; strides in bytes, those of the last axes left out.
EbftCudaFeatures features(const Sizes& sizes, uintptr_t rollouts, const Sizes& rollout_strides, uintptr_t targets,
                          const Sizes& target_strides) {
  check_strides(sizes, rollout_strides, target_strides);
  const int leading = int(sizes.size()) - 2, missing = 3 - leading;
  require(missing >= 0, "sizes: expected at most three leading axes");
  EbftCudaFeatures x = {{1, 1, 1}, sizes[leading], sizes.back(), pointer(rollouts), {}, pointer(targets), {}};
  for (int axis = 0; axis < leading; ++axis) {
    x.anchors[missing + axis] = sizes[axis];
    x.rollout_strides[missing + axis] = rollout_strides[axis];
    x.target_strides[missing + axis] = target_strides[axis];
  }
  x.rollout_strides[3] = rollout_strides.back();
  return x;
}

void feature_matching(uintptr_t stream, int dtype, const Sizes& sizes, uintptr_t rollouts,
                      const Sizes& rollout_strides, uintptr_t targets, const Sizes& target_strides, int64_t groups,
                      int whitening, double alignment_coef, double diversity_coef, int estimator, uintptr_t loss,
                      uintptr_t alignment, uintptr_t diversity, uintptr_t reward, uintptr_t advantage, uintptr_t gram) {
  const EbftCudaFeatures x = features(sizes, rollouts, rollout_strides, targets, target_strides);
  const py::gil_scoped_release unlocked;
  raise_error(ebft_cuda_feature_matching(dtype, &x, groups, whitening, alignment_coef, diversity_coef, estimator,
                                         static_cast<double*>(pointer(gram)), pointer(loss), pointer(alignment),
                                         pointer(diversity), pointer(reward), pointer(advantage), pointer(stream)));
}

void mean_embedding_forward(uintptr_t stream, int dtype, const Sizes& sizes, uintptr_t rollouts,
                            const Sizes& rollout_strides, uintptr_t targets, const Sizes& target_strides,
                            bool unbiased, uintptr_t loss, uintptr_t difference) {
  const EbftCudaFeatures x = features(sizes, rollouts, rollout_strides, targets, target_strides);
  const py::gil_scoped_release unlocked;
  raise_error(ebft_cuda_mean_embedding_forward(dtype, &x, unbiased, pointer(loss), pointer(difference),
                                               pointer(stream)));
}

void mean_embedding_backward(uintptr_t stream, int dtype, const Sizes& sizes, uintptr_t rollouts,
                             const Sizes& rollout_strides, uintptr_t grad, uintptr_t difference, bool unbiased,
                             uintptr_t grad_rollouts, uintptr_t grad_targets) {
  const Sizes unread(sizes.size() < 2 ? 0 : sizes.size() - 2);
  const EbftCudaFeatures x = features(sizes, rollouts, rollout_strides, 0, unread);
  const py::gil_scoped_release unlocked;
  raise_error(ebft_cuda_mean_embedding_backward(dtype, &x, unbiased, pointer(grad), pointer(difference),
                                                pointer(grad_rollouts), pointer(grad_targets), pointer(stream)));
}

// `sizes`: B, S, C, A, n, K.
EbftCudaTokens tokens(const Sizes& sizes, const Layers& layers, uintptr_t rollout_rows, uintptr_t target_rows,
                      uintptr_t counted, int pooling, int normalization) {
  require(sizes.size() == 6, "sizes: expected 6");
  require(layers.size() >= 1 && layers.size() <= ebft_cuda_most_layers,
          "layers: on CUDA pooling takes 1 to 64 layers");
  EbftCudaTokens x = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], numbers(rollout_rows),
                      numbers(target_rows), static_cast<const uint8_t*>(pointer(counted)), pooling, normalization,
                      int32_t(layers.size()), {}};
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto& [address, batch, row] = layers[l];
    x.layer[l] = {pointer(address), batch, row};
  }
  return x;
}

void pool_features(uintptr_t stream, int dtype, const Sizes& sizes, const Layers& layers, uintptr_t rollout_rows,
                   uintptr_t target_rows, uintptr_t counted, int pooling, int normalization, uintptr_t rollouts,
                   uintptr_t targets) {
  const EbftCudaTokens x = tokens(sizes, layers, rollout_rows, target_rows, counted, pooling, normalization);
  const py::gil_scoped_release unlocked;
  raise_error(ebft_cuda_pool_features(dtype, &x, pointer(rollouts), pointer(targets), pointer(stream)));
}

// `begin` and `uses`: see api.h.
void pool_features_backward(uintptr_t stream, int dtype, const Sizes& sizes, const Layers& layers,
                            uintptr_t rollout_rows, uintptr_t target_rows, uintptr_t counted, int pooling,
                            int normalization, uintptr_t grad_rollouts, uintptr_t grad_targets, const Layers& grads,
                            uintptr_t begin, uintptr_t uses) {
  const EbftCudaTokens x = tokens(sizes, layers, rollout_rows, target_rows, counted, pooling, normalization);
  require(layers.size() == grads.size(), "grads: expected one for each layer");
  void* out[ebft_cuda_most_layers] = {};
  for (size_t l = 0; l < grads.size(); ++l) {
    const auto& [address, batch, row] = grads[l];
    require(batch == row * x.packed, "grads: expected contiguous ones");
    out[l] = pointer(address);
  }
  const py::gil_scoped_release unlocked;
  raise_error(ebft_cuda_pool_features_backward(dtype, &x, numbers(begin), numbers(uses), pointer(grad_rollouts),
                                               pointer(grad_targets), out, pointer(stream)));
}

// `sizes`: B, P, A, n, G.
EbftCudaLayout layout(const Sizes& sizes) {
  require(sizes.size() == 5, "sizes: expected 5");
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

int64_t packed_rows(const EbftCudaLayout& x) { return x.prompt + x.anchors * x.samples * x.horizon; }

void layout_geometry(uintptr_t stream, const Sizes& sizes, const LayoutTensor& anchors,
                     const LayoutTensor& prompt_start, uintptr_t positions, const LayoutTensor& prefix_start,
                     const LayoutTensor& prefix_end, const LayoutTensor& own_start) {
  const EbftCudaLayout x = layout(sizes);
  const Sizes rows = {x.batch, packed_rows(x)};
  const int32_t* from = int32_array("anchors", anchors, {x.batch, x.anchors});
  const int32_t* starts = int32_array("prompt_start", prompt_start, {x.batch, x.prompt});
  int32_t* ranges[] = {int32_array("prefix_start", prefix_start, rows), int32_array("prefix_end", prefix_end, rows),
                       int32_array("own_start", own_start, rows)};
  const py::gil_scoped_release unlocked;
  raise_error(ebft_cuda_layout_geometry(&x, from, starts, static_cast<int64_t*>(pointer(positions)), ranges[0],
                                        ranges[1], ranges[2], pointer(stream)));
}

void layout_mask(uintptr_t stream, const Sizes& sizes, const LayoutTensor& prefix_start,
                 const LayoutTensor& prefix_end, const LayoutTensor& own_start, bool full, uintptr_t mask) {
  const EbftCudaLayout x = layout(sizes);
  const Sizes rows = {x.batch, packed_rows(x)};
  const int32_t* ranges[] = {int32_array("prefix_start", prefix_start, rows),
                             int32_array("prefix_end", prefix_end, rows), int32_array("own_start", own_start, rows)};
  const py::gil_scoped_release unlocked;
  raise_error(ebft_cuda_layout_mask(&x, ranges[0], ranges[1], ranges[2], full, static_cast<uint8_t*>(pointer(mask)),
                                    pointer(stream)));
}

// The newest version of CUDA that the driver serves, as 1000 * major + 10 * minor; 0 where there is no driver.
int driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of ebft_kernels. Not a public interface: addresses are believed.";
  // 800 for sm_80, ..., from nvcc; setup.py has it add PTX of the last.
  m.attr("targets") = Sizes{__CUDA_ARCH_LIST__};
  m.attr("runtime") = CUDART_VERSION;
  m.def("driver", &driver);
  m.def("feature_matching", &feature_matching);
  m.def("mean_embedding_forward", &mean_embedding_forward);
  m.def("mean_embedding_backward", &mean_embedding_backward);
  m.def("pool_features", &pool_features);
  m.def("pool_features_backward", &pool_features_backward);
  m.def("layout_geometry", &layout_geometry);
  m.def("layout_mask", &layout_mask);
}
