// Which of the compiled instruction sets this processor can run.
#include "kernels.h"

namespace childtune {

const Kernels* kernels_of(int64_t capability) {
  switch (capability) {
    case kBaseline:
      return &baseline::kernels;
#if defined(__x86_64__)
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")
                 ? &avx2::kernels
                 : nullptr;
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")
                 ? &avx512::kernels
                 : nullptr;
#endif
    default:
      return nullptr;
  }
}

}  // namespace childtune
