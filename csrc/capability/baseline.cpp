// The kernels compiled for the instruction set every processor of the architecture has.
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#define CHILDTUNE_CAPABILITY baseline
#define CHILDTUNE_VECTOR_BYTES 16
#include "../all_kernels.inc"
