// The kernels compiled for AVX2 with F16C.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2,popcnt,f16c")
#endif

#define CHILDTUNE_CAPABILITY avx2
#define CHILDTUNE_VECTOR_BYTES 32
#include "../all_kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
