// The features of one anchor: its n rollouts and its target.
#pragma once

#include "device.h"
#include "dispatch.h"

namespace ebft::cuda {

struct Anchor {
  const char* rollouts;
  int64_t stride;  // from one rollout to the next
  const char* target;
};

inline __device__ Anchor find_anchor(const EbftCudaFeatures& features, int64_t anchor) {
  Anchor found = {static_cast<const char*>(features.rollouts), features.rollout_strides[3],
                  static_cast<const char*>(features.targets)};
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) {
    const int64_t index = anchor % features.anchors[axis];
    found.rollouts += index * features.rollout_strides[axis];
    found.target += index * features.target_strides[axis];
    anchor /= features.anchors[axis];
  }
  return found;
}

inline int64_t count_anchors(const EbftCudaFeatures& x) { return x.anchors[0] * x.anchors[1] * x.anchors[2]; }

// Whether every rollout, and every target, starts at a multiple of 16 bytes.
inline bool rollouts_are_aligned(const EbftCudaFeatures& x) {
  bool aligned = is_aligned(x.rollouts);
  for (int64_t stride : x.rollout_strides) aligned = aligned && stride % 16 == 0;
  return aligned;
}

inline bool targets_are_aligned(const EbftCudaFeatures& x) {
  bool aligned = is_aligned(x.targets);
  for (int64_t stride : x.target_strides) aligned = aligned && stride % 16 == 0;
  return aligned;
}

// An error unless the sizes make sense and the addresses are there.
inline EbftCudaStatus check_features(int dtype, const EbftCudaFeatures* x) {
  if (!x) return null_address("features");
  if (dtype < 0 || dtype > 3) return bad_argument("dtype: expected a number from 0 to 3", dtype);
  for (int64_t size : x->anchors) {
    if (size < 0) return bad_argument("anchors: expected no negative size", size);
  }
  if (x->rollouts_per_anchor < 1 || x->rollouts_per_anchor > 0x7fff) {
    return bad_argument("n: expected 1 to 32767 rollouts per anchor", x->rollouts_per_anchor);
  }
  if (x->features < 1) return bad_argument("F: expected at least one feature", x->features);
  if (count_anchors(*x) > 0 && !x->rollouts) return null_address("rollouts");
  return {};
}

}  // namespace ebft::cuda
