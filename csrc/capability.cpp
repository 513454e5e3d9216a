// Which of the compiled instruction sets this processor can run.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace childtune {
namespace {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows "f16c" (clang 14 does not).
bool has_half_conversion() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && has_half_conversion();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const Kernels* kernels_of(int64_t capability) {
  switch (capability) {
    case kBaseline:
      return &baseline::kernels;
#if defined(__x86_64__)
    case kAvx2:
      return has_avx2() ? &avx2::kernels : nullptr;
    case kAvx512:
      return has_avx512() ? &avx512::kernels : nullptr;
#endif
    default:
      return nullptr;
  }
}

}  // namespace childtune
