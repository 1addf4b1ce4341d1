// The large tensors of a layout of packed rows: positions, key ranges and the dense mask, each number written once.
#include "../core/layout.h"

#include "device.h"

namespace ebft::cuda {
namespace {

__host__ __device__ PackedSizes sizes_of(const EbftCudaLayout& x) {
  return {x.prompt, x.anchors, x.samples, x.horizon};
}

// Thread: one packed row.
__global__ void __launch_bounds__(most_threads)
    geometry_kernel(const __grid_constant__ EbftCudaLayout layout, const int32_t* anchors, const int32_t* prompt_start,
                    int64_t* positions, int32_t* prefix_start, int32_t* prefix_end, int32_t* own_start) {
  const PackedSizes sizes = sizes_of(layout);
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, packed = sizes.packed();
  if (index >= layout.batch * packed) return;
  const int64_t batch = index / packed;
  const RowGeometry row = row_geometry(sizes, index % packed, anchors + batch * sizes.anchors,
                                       prompt_start + batch * sizes.prompt);
  positions[index] = row.position;
  prefix_start[index] = row.prefix_start;
  prefix_end[index] = row.prefix_end;
  own_start[index] = row.own_start;
}

// What one row sees.
struct Visible {
  int32_t prefix_start;
  int32_t prefix_end;
  int32_t own_start;
  int32_t own_end;

  __device__ bool operator[](int32_t key) const {
    return (key >= prefix_start && key < prefix_end) || (key >= own_start && key < own_end);
  }
};

// Each thread writes 16 bytes this many times, a block's width apart.
constexpr int stores = 4;
constexpr int64_t block_bytes = 16 * stores * most_threads;

// Block: `block_bytes` of the mask [B*S, S], taken as one array, so that stores are 16 bytes wide whatever S is.
__global__ void __launch_bounds__(most_threads)
    mask_kernel(const __grid_constant__ EbftCudaLayout layout, const int32_t* prefix_start, const int32_t* prefix_end,
                const int32_t* own_start, bool full, bool aligned, uint8_t* mask) {
  const PackedSizes sizes = sizes_of(layout);
  const int64_t packed = sizes.packed(), rows = layout.batch * packed;
  // Long divisions once for the block; what is left for its threads fits into 32 bits.
  const int64_t first = int64_t(blockIdx.x) * block_bytes, first_row = first / packed;
  const uint32_t width = uint32_t(packed), start = uint32_t(first % packed), row_start = uint32_t(first_row % packed);
  const auto look_at = [&](uint32_t down) {  // at the row so far below the first one
    const int64_t row = first_row + down < rows ? first_row + down : rows - 1;
    const int64_t end = own_end(sizes, (row_start + down) % width, full);
    return Visible{prefix_start[row], prefix_end[row], own_start[row], int32_t(end)};
  };
  for (int i = 0; i < stores; ++i) {
    const uint32_t offset = 16 * (i * most_threads + threadIdx.x);
    uint32_t down = (start + offset) / width, key = (start + offset) % width;
    Visible visible = look_at(down);
    uint8_t seen[16];
#pragma unroll
    for (int v = 0; v < 16; ++v) {
      seen[v] = visible[int32_t(key)];
      if (++key < width) continue;
      key = 0;
      visible = look_at(++down);
    }
    const int64_t left = rows * packed - first - offset;
    uint8_t* out = mask + first + offset;
    if (aligned && left >= 16) {
      uint4 words;
      memcpy(&words, seen, sizeof words);
      *reinterpret_cast<uint4*>(out) = words;
      continue;
    }
#pragma unroll
    for (int v = 0; v < 16; ++v) {
      if (v < left) out[v] = seen[v];
    }
  }
}

EbftCudaStatus check(const EbftCudaLayout* x) {
  if (!x) return null_address("layout");
  for (int64_t size : {x->batch, x->prompt, x->anchors, x->horizon}) {
    if (size < 0) return bad_argument("sizes: expected no negative one", size);
  }
  if (x->samples < 1) return bad_argument("n: expected at least one rollout", x->samples);
  const int64_t most = int64_t(1) << 30;
  for (int64_t size : {x->prompt, x->anchors, x->samples, x->horizon}) {
    if (size > most) return bad_argument("sizes: expected at most 2^30", size);
  }
  if (double(x->anchors) * x->samples * x->horizon + x->prompt > most) {
    return bad_argument("S: expected at most 2^30 tokens in a packed row, sizes", x->anchors);
  }
  return {};
}

}  // namespace
}  // namespace ebft::cuda

EbftCudaStatus ebft_cuda_layout_geometry(const EbftCudaLayout* layout, const int32_t* anchors,
                                         const int32_t* prompt_start, int64_t* positions, int32_t* prefix_start,
                                         int32_t* prefix_end, int32_t* own_start, void* stream) {
  using namespace ebft::cuda;
  const EbftCudaStatus status = check(layout);
  const int64_t rows = status.error ? 0 : layout->batch * sizes_of(*layout).packed();
  if (rows == 0) return status;
  if (!anchors && layout->anchors > 0) return null_address("anchors");
  if (!prompt_start && layout->prompt > 0) return null_address("prompt_start");
  if (!positions) return null_address("positions");
  if (!prefix_start) return null_address("prefix_start");
  if (!prefix_end) return null_address("prefix_end");
  if (!own_start) return null_address("own_start");
  return launch("geometry_kernel", geometry_kernel, (rows + most_threads - 1) / most_threads, most_threads, 0, stream,
                *layout, anchors, prompt_start, positions, prefix_start, prefix_end, own_start);
}

EbftCudaStatus ebft_cuda_layout_mask(const EbftCudaLayout* layout, const int32_t* prefix_start,
                                     const int32_t* prefix_end, const int32_t* own_start, int full, uint8_t* mask,
                                     void* stream) {
  using namespace ebft::cuda;
  const EbftCudaStatus status = check(layout);
  const int64_t packed = status.error ? 0 : sizes_of(*layout).packed();
  if (packed == 0 || layout->batch == 0) return status;
  if (!prefix_start) return null_address("prefix_start");
  if (!prefix_end) return null_address("prefix_end");
  if (!own_start) return null_address("own_start");
  if (!mask) return null_address("mask");
  const int64_t bytes = layout->batch * packed * packed;
  return launch("mask_kernel", mask_kernel, (bytes + block_bytes - 1) / block_bytes, most_threads, 0, stream, *layout,
                prefix_start, prefix_end, own_start, full != 0, is_aligned(mask), mask);
}
