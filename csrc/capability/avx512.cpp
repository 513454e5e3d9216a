// The kernels compiled for AVX-512 (F, DQ, BW, VL).
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,bmi,bmi2,popcnt,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,bmi,bmi2,popcnt,f16c")
#endif

#define CHILDTUNE_CAPABILITY avx512
#define CHILDTUNE_VECTOR_BYTES 64
#include "../all_kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
