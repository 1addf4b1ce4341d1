// Which instruction sets there are, and the choice among them at run time.
#include "kernels.h"

namespace ebft::cpu {

namespace baseline {
extern const Kernels table[4];
}

#if defined(EBFT_X86)
namespace avx2 {
extern const Kernels table[4];
}
namespace avx512 {
extern const Kernels table[4];
}
#endif

int isa_count() {
#if defined(EBFT_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 1;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return avx512 ? 3 : 2;
#else
  return 1;
#endif
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[int(isa)];
}

const Kernels& kernels_for(Isa isa, Dtype dtype) {
#if defined(EBFT_X86)
  if (isa == Isa::avx512) return avx512::table[int(dtype)];
  if (isa == Isa::avx2) return avx2::table[int(dtype)];
#endif
  return baseline::table[int(dtype)];
}

}  // namespace ebft::cpu
