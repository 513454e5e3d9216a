// The kernels compiled for the instruction set every processor of the architecture has.
// GCC 12 moves 8-byte vectors through an MMX register where it runs short of others, and leaves the x87
// stack marked full: long doubles, NumPy's among them, are NaN from then on.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("no-mmx")
#endif

#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#define CHILDTUNE_CAPABILITY baseline
#define CHILDTUNE_VECTOR_BYTES 16
#include "../all_kernels.inc"
