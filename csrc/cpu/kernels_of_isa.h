// The table of kernels of one instruction set. Each kernels_<isa>.cpp includes this once, after it has switched that
// instruction set on, with
//
//   EBFT_ISA    the namespace and the name of the table
//   EBFT_LANES  doubles per vector
//   EBFT_WHOLE  most rows whose products all stay in registers
//   EBFT_BLOCK  rows per block beyond that
//   EBFT_ROWS   rows of a product of small matrices whose sums, two vectors each, stay in registers

#define EBFT_INLINE static inline __attribute__((always_inline))
#define EBFT_UNROLL _Pragma("GCC unroll 8")
#define EBFT_UNROLL_ALL _Pragma("GCC unroll 16")

namespace ebft::cpu {
namespace EBFT_ISA {
namespace {

#include "vector.h"

#include "gram.h"

#include "mean_embedding.h"

#include "rows.h"

#include "product.h"

#include "attention_rows.h"

#include "softmax_rows.h"

template <class T>
constexpr Kernels kernels_of = {gram<T>,   mean_difference<T>, mean_embedding_gradients<T>,
                                square<T>, weighted_sum<T>,    products<T>, gradient<T>,
                                lay_prompt<T>, attention_forward<T>, attention_backward<T>, add_parts<T>,
                                softmax_add<T>, softmax_gradient<T>};

}  // namespace

extern const Kernels table[4];
const Kernels table[4] = {kernels_of<double>, kernels_of<float>, kernels_of<BFloat16>, kernels_of<Float16>};

}  // namespace EBFT_ISA
}  // namespace ebft::cpu
