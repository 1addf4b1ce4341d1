// The table of kernels of one instruction set. Each kernels_<isa>.cpp includes this once, after it has switched that
// instruction set on, with
//
//   EBFT_ISA    the namespace and the name of the table
//   EBFT_LANES  doubles per vector
//   EBFT_WHOLE  most rows whose products all stay in registers
//   EBFT_BLOCK  rows per block beyond that
//   EBFT_ROWS   queries of a block of scores that stays in registers
//   EBFT_COLS   and vectors of keys

#define EBFT_INLINE static inline __attribute__((always_inline))
#define EBFT_UNROLL _Pragma("GCC unroll 8")

namespace ebft::cpu {
namespace EBFT_ISA {
namespace {

#include "vector.h"

#include "gram.h"

#include "mean_embedding.h"

#include "rows.h"

#include "attend.h"

template <class T>
constexpr Kernels kernels_of = {gram<T>,   mean_difference<T>, mean_embedding_gradients<T>,
                                square<T>, weighted_sum<T>,    products<T>, gradient<T>,
                                attend<T>, attention_memory<T>};

}  // namespace

extern const Kernels table[4];
const Kernels table[4] = {kernels_of<double>, kernels_of<float>, kernels_of<BFloat16>, kernels_of<Float16>};

}  // namespace EBFT_ISA
}  // namespace ebft::cpu
