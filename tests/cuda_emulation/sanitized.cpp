// Runs every kernel on buffers that begin and end where their data does, for AddressSanitizer and UBSan: all types, all
// ways in which rows are taken together, rows that are aligned and rows that are not, one warp and several.
#include "../../csrc/core/half.h"
#include "../../csrc/core/layout.h"
#include "../../csrc/cuda/api.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

void check(const EbftCudaStatus& status, const char* what, int64_t a, int64_t b) {
  if (!status.error) return;
  std::printf("failed: %s %lld %lld: %s\n", what, static_cast<long long>(a), static_cast<long long>(b), status.message);
  std::exit(1);
}

constexpr int64_t bytes_of[] = {8, 4, 2, 2};

// `count` elements of the type with code `dtype` that start `shift` elements behind an aligned address, all 0.5.
class Buffer {
 public:
  Buffer(int dtype, int64_t count, int64_t shift) : memory_(new char[(count + shift) * bytes_of[dtype]]) {
    data_ = memory_.get() + shift * bytes_of[dtype];
    for (int64_t i = 0; i < count; ++i) {
      const double d = 0.5;
      const float f = 0.5f;
      const uint16_t bits = dtype == 2 ? ebft::to_bfloat16(f).bits : ebft::to_float16(f).bits;
      const void* value = dtype == 0 ? static_cast<const void*>(&d) : dtype == 1 ? static_cast<const void*>(&f) : &bits;
      std::copy_n(static_cast<const char*>(value), bytes_of[dtype], data_ + i * bytes_of[dtype]);
    }
  }
  void* data() { return data_; }

 private:
  std::unique_ptr<char[]> memory_;
  char* data_;
};

int sum_type(int dtype) { return dtype == 0 ? 0 : 1; }

void match(int dtype, int64_t n, int64_t width, int64_t shift) {
  const int64_t anchors = 2, size = bytes_of[dtype], row = width + shift;
  Buffer x(dtype, anchors * n * row - shift, shift), y(dtype, anchors * row - shift, shift);
  EbftCudaFeatures features = {{1, anchors, 1}, n, width, x.data(), {0, n * row * size, 0, row * size},
                               y.data(), {0, row * size, 0}};
  const int sums = sum_type(dtype);
  Buffer loss(sums, anchors, 0), difference(sums, anchors * width, 0), gx(dtype, anchors * n * width, shift),
      gy(dtype, anchors * width, shift);
  for (int unbiased = 0; unbiased < (n > 1 ? 2 : 1); ++unbiased) {
    check(ebft_cuda_mean_embedding_forward(dtype, &features, unbiased, loss.data(), difference.data(), nullptr),
          "forward", n, width);
    check(ebft_cuda_mean_embedding_backward(dtype, &features, unbiased, loss.data(), difference.data(), gx.data(),
                                            gy.data(), nullptr),
          "backward", n, width);
  }
  if (n > ebft_cuda_most_rollouts) return;
  const int64_t groups = width % 2 ? 1 : 2;
  std::vector<double> gram(anchors * groups * (n + 1) * (n + 1));
  Buffer a(sums, anchors * n, 0), d(sums, anchors * n, 0), r(sums, anchors * n, 0), v(sums, anchors * n, 0);
  for (int whitening = 0; whitening < 3; ++whitening) {
    check(ebft_cuda_feature_matching(dtype, &features, groups, whitening, 1, 1, whitening, gram.data(), loss.data(),
                                     a.data(), d.data(), r.data(), v.data(), nullptr),
          "matching", n, width);
  }
}

void pool(int dtype, int64_t channels, int64_t shift, int pooling, int normalization) {
  const int64_t batch = 2, packed = 9, anchors = 2, samples = 2, steps = pooling == 0 ? 1 : 2, layers = 3;
  const int64_t size = bytes_of[dtype], row = channels + shift, kept = pooling < 2 ? 1 : steps;
  const int64_t width = layers * channels * kept, items = batch * anchors * (samples + 1);
  std::vector<int64_t> rows(items * steps), begin(batch * packed + 1), uses;
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = int64_t(i * 5 % packed);
  const int64_t targets_at = batch * anchors * samples * steps;
  std::vector<uint8_t> counted(batch * anchors * steps, 1);
  counted[0] = 0;
  EbftCudaTokens tokens = {batch, packed, channels, anchors, samples, steps, rows.data(), rows.data() + targets_at,
                           counted.data(), pooling, normalization, int32_t(layers), {}};
  std::vector<Buffer> hidden, grads;
  std::vector<void*> outputs;
  for (int64_t l = 0; l < layers; ++l) {
    hidden.emplace_back(dtype, batch * packed * row - shift, shift);
    grads.emplace_back(dtype, batch * packed * channels, shift);
    tokens.layer[l] = {hidden.back().data(), packed * row * size, row * size};
    outputs.push_back(grads.back().data());
  }
  for (int64_t r = 0; r < batch * packed; ++r) {
    begin[r] = int64_t(uses.size());
    for (int64_t use = 0; use < items * steps; ++use) {
      const int64_t item = use / steps, rollouts = batch * anchors * samples;
      const int64_t b = (item < rollouts ? item / samples : item - rollouts) / anchors;
      if (b * packed + rows[use] == r) uses.push_back(use);
    }
  }
  begin.back() = int64_t(uses.size());
  const int sums = sum_type(dtype);
  Buffer x(sums, batch * anchors * samples * width, 0), y(sums, batch * anchors * width, 0);
  check(ebft_cuda_pool_features(dtype, &tokens, x.data(), y.data(), nullptr), "pooling", channels, pooling);
  check(ebft_cuda_pool_features_backward(dtype, &tokens, begin.data(), uses.data(), x.data(), y.data(), outputs.data(),
                                         nullptr),
        "pooling backward", channels, pooling);
}

void write_layout(int64_t prompt, int64_t shift) {
  const EbftCudaLayout layout = {2, prompt, 2, 2, 3};
  const int64_t packed = prompt + 2 * 2 * 3, rows = 2 * packed;
  std::vector<int32_t> anchors = {1, int32_t(prompt), 2, -1}, prompt_start(2 * prompt), ranges[3];
  std::vector<int64_t> positions(rows);
  for (auto& range : ranges) range.resize(rows);
  check(ebft_cuda_layout_geometry(&layout, anchors.data(), prompt_start.data(), positions.data(), ranges[0].data(),
                                  ranges[1].data(), ranges[2].data(), nullptr),
        "geometry", prompt, shift);
  std::unique_ptr<uint8_t[]> mask(new uint8_t[rows * packed + shift]);
  for (int full = 0; full < 2; ++full) {
    check(ebft_cuda_layout_mask(&layout, ranges[0].data(), ranges[1].data(), ranges[2].data(), full, mask.get() + shift,
                                nullptr),
          "mask", prompt, shift);
  }
}

}  // namespace

int main() {
  for (int dtype = 0; dtype < 4; ++dtype) {
    for (int64_t shift = 0; shift < 2; ++shift) {
      for (int64_t n : {1, 2, 4, 7}) match(dtype, n, n % 2 ? 24 : 37, shift);
      match(dtype, 4, 24, shift);
      match(dtype, 17, 5, shift);
      for (int pooling = 0; pooling < 4; ++pooling) pool(dtype, 9 + 7 * shift, shift, pooling, pooling % 3);
      for (int pooling = 0; pooling < 4; ++pooling) pool(dtype, 16, 0, pooling, (pooling + 1) % 3);
    }
  }
  match(1, 3, 700, 0);
  match(2, 16, 37, 1);
  for (int64_t prompt : {2, 5, 90}) write_layout(prompt, prompt % 2);
  std::printf("passed\n");
}
