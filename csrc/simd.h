// Vectors of one instruction set, written with the compilers' vector extensions. A file under
// capability/ defines CHILDTUNE_CAPABILITY and CHILDTUNE_VECTOR_BYTES, opens the namespace of that
// capability and the target pragma, and includes this header, so that nothing compiled for one
// instruction set can be merged by the linker with the code of another.
// Only what the extensions cannot say (square root, 32x32->64 multiply, selection by bits, bits of a
// comparison, half precision) is spelled in intrinsics; each has a portable fallback.

#define CHILDTUNE_INLINE inline __attribute__((always_inline))

constexpr int kVectorBytes = CHILDTUNE_VECTOR_BYTES;
#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES < 64
constexpr bool kManyRegisters = false;  // 16 vectors
#else
constexpr bool kManyRegisters = true;  // 32 vectors
#endif
constexpr int kBlock = 64;  // elements that share one 64-bit word of keep bits

typedef float VecF32 __attribute__((vector_size(kVectorBytes)));
typedef double VecF64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfU16 __attribute__((vector_size(kVectorBytes / 2)));

constexpr int kLanes32 = kVectorBytes / 4;
constexpr int kLanes64 = kVectorBytes / 8;

template <class Vec>
CHILDTUNE_INLINE Vec load(const void* source) {
  Vec vector;
  __builtin_memcpy(&vector, source, sizeof(Vec));
  return vector;
}

template <class Vec>
CHILDTUNE_INLINE void store(void* target, Vec vector) {
  __builtin_memcpy(target, &vector, sizeof(Vec));
}

// Asks the second-level cache for what comes 1 KiB later. Only streams with little arithmetic gain by it (op
// fisher_accumulate on 148 tensors: from 0.80 to 0.90 of torch.add's rate; 2 KiB lose that again on
// large tensors). Measured on Zen 4.
constexpr uintptr_t kPrefetchBytes = 1024;

template <bool kForWriting>
CHILDTUNE_INLINE void prefetch_ahead(const void* address) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(address) + kPrefetchBytes;
  __builtin_prefetch(reinterpret_cast<const void*>(ahead), kForWriting, 1);
}

template <class Vec, class Lane>
CHILDTUNE_INLINE Vec iota_times(Lane factor) {
  Vec vector{};
  for (int lane = 0; lane < int(sizeof(Vec) / sizeof(Lane)); ++lane) vector[lane] = Lane(lane) * factor;
  return vector;
}

#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES == 64

// The first `count` lanes (fewer than all) from memory, the others zero, and back; no other lane's place is touched.
CHILDTUNE_INLINE VecF32 load_part(const float* source, int count) {
  return (VecF32)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), source);
}
CHILDTUNE_INLINE VecF64 load_part(const double* source, int count) {
  return (VecF64)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), source);
}
CHILDTUNE_INLINE void store_part(float* target, VecF32 vector, int count) {
  _mm512_mask_storeu_ps(target, __mmask16((1u << count) - 1), (__m512)vector);
}
CHILDTUNE_INLINE void store_part(double* target, VecF64 vector, int count) {
  _mm512_mask_storeu_pd(target, __mmask8((1u << count) - 1), (__m512d)vector);
}

CHILDTUNE_INLINE VecF32 square_root(VecF32 x) { return (VecF32)_mm512_sqrt_ps((__m512)x); }
CHILDTUNE_INLINE VecF64 square_root(VecF64 x) { return (VecF64)_mm512_sqrt_pd((__m512d)x); }

// The low 32 bits of every 64-bit lane, multiplied to 64 bits.
CHILDTUNE_INLINE VecU64 multiply_low32(VecU64 a, VecU64 b) {
  return (VecU64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}

// The upper half of every 64-bit lane, in its lower half; what then stands above does not count. Zen 4
// shuffles on three pipes and shifts on two, which it adds floats on as well.
CHILDTUNE_INLINE VecU64 upper_half(VecU64 x) {
  return (VecU64)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_ENUM(0xF5));
}

// Lane k of the result is a's where bit k of `bits` is set, else b's.
CHILDTUNE_INLINE VecF32 select(uint64_t bits, VecF32 a, VecF32 b) {
  return (VecF32)_mm512_mask_blend_ps((__mmask16)bits, (__m512)b, (__m512)a);
}
CHILDTUNE_INLINE VecF64 select(uint64_t bits, VecF64 a, VecF64 b) {
  return (VecF64)_mm512_mask_blend_pd((__mmask8)bits, (__m512d)b, (__m512d)a);
}
CHILDTUNE_INLINE VecU32 select(uint64_t bits, VecU32 a, VecU32 b) {
  return (VecU32)_mm512_mask_blend_epi32((__mmask16)bits, (__m512i)b, (__m512i)a);
}

// The lower and the upper half of the lanes, widened.
CHILDTUNE_INLINE VecF64 widened_low(VecF32 x) { return (VecF64)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)); }
CHILDTUNE_INLINE VecF64 widened_high(VecF32 x) { return (VecF64)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)); }

CHILDTUNE_INLINE VecF32 half_to_float(HalfU16 x) { return (VecF32)_mm512_cvtph_ps((__m256i)x); }
CHILDTUNE_INLINE HalfU16 float_to_half(VecF32 x) {
  return (HalfU16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Bit k of the result is set where lane k of a comparison's result is.
CHILDTUNE_INLINE uint64_t lane_bits(VecI32 mask) { return _mm512_movepi32_mask((__m512i)mask); }

#else

CHILDTUNE_INLINE VecF32 load_part(const float* source, int count) {
  VecF32 vector{};
  __builtin_memcpy(&vector, source, size_t(count) * sizeof(float));
  return vector;
}
CHILDTUNE_INLINE VecF64 load_part(const double* source, int count) {
  VecF64 vector{};
  __builtin_memcpy(&vector, source, size_t(count) * sizeof(double));
  return vector;
}
CHILDTUNE_INLINE void store_part(float* target, VecF32 vector, int count) {
  __builtin_memcpy(target, &vector, size_t(count) * sizeof(float));
}
CHILDTUNE_INLINE void store_part(double* target, VecF64 vector, int count) {
  __builtin_memcpy(target, &vector, size_t(count) * sizeof(double));
}

#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES == 32

CHILDTUNE_INLINE VecF32 square_root(VecF32 x) { return (VecF32)_mm256_sqrt_ps((__m256)x); }
CHILDTUNE_INLINE VecF64 square_root(VecF64 x) { return (VecF64)_mm256_sqrt_pd((__m256d)x); }
CHILDTUNE_INLINE VecU64 multiply_low32(VecU64 a, VecU64 b) {
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
CHILDTUNE_INLINE VecU64 upper_half(VecU64 x) { return (VecU64)_mm256_shuffle_epi32((__m256i)x, 0xF5); }
CHILDTUNE_INLINE VecF64 widened_low(VecF32 x) { return (VecF64)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)); }
CHILDTUNE_INLINE VecF64 widened_high(VecF32 x) { return (VecF64)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)); }
CHILDTUNE_INLINE VecF32 half_to_float(HalfU16 x) { return (VecF32)_mm256_cvtph_ps((__m128i)x); }
CHILDTUNE_INLINE HalfU16 float_to_half(VecF32 x) {
  return (HalfU16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
CHILDTUNE_INLINE uint64_t lane_bits(VecI32 mask) { return uint32_t(_mm256_movemask_ps((__m256)mask)); }

#else

CHILDTUNE_INLINE VecF32 square_root(VecF32 x) {
#if defined(__x86_64__)
  return (VecF32)_mm_sqrt_ps((__m128)x);
#else
  for (int lane = 0; lane < kLanes32; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}
CHILDTUNE_INLINE VecF64 square_root(VecF64 x) {
#if defined(__x86_64__)
  return (VecF64)_mm_sqrt_pd((__m128d)x);
#else
  for (int lane = 0; lane < kLanes64; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
#endif
}
CHILDTUNE_INLINE VecU64 multiply_low32(VecU64 a, VecU64 b) {
#if defined(__x86_64__)
  return (VecU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}
CHILDTUNE_INLINE VecU64 upper_half(VecU64 x) { return x >> 32; }
#if defined(__x86_64__)
CHILDTUNE_INLINE VecF64 widened_low(VecF32 x) { return (VecF64)_mm_cvtps_pd((__m128)x); }
CHILDTUNE_INLINE VecF64 widened_high(VecF32 x) { return (VecF64)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x)); }
#else
CHILDTUNE_INLINE VecF64 widened_low(VecF32 x) {
  VecF64 wide{};
  for (int lane = 0; lane < kLanes64; ++lane) wide[lane] = x[lane];
  return wide;
}
CHILDTUNE_INLINE VecF64 widened_high(VecF32 x) {
  VecF64 wide{};
  for (int lane = 0; lane < kLanes64; ++lane) wide[lane] = x[kLanes64 + lane];
  return wide;
}
#endif
CHILDTUNE_INLINE uint64_t lane_bits(VecI32 mask) {
#if defined(__x86_64__)
  return uint32_t(_mm_movemask_ps((__m128)mask));
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes32; ++lane) bits |= uint64_t(mask[lane] & 1) << lane;
  return bits;
#endif
}

// IEEE binary16 by integer arithmetic, for processors without a conversion instruction.
CHILDTUNE_INLINE VecF32 half_to_float(HalfU16 half) {
  VecF32 result{};
  for (int lane = 0; lane < kLanes32; ++lane) {
    const uint32_t sign = uint32_t(half[lane] & 0x8000u) << 16;
    const uint32_t magnitude = half[lane] & 0x7FFFu;
    float value;
    uint32_t bits;
    if (magnitude >= 0x7C00u) {
      bits = 0x7F800000u | ((magnitude & 0x3FFu) << 13) | ((magnitude & 0x3FFu) ? 0x400000u : 0u);
      __builtin_memcpy(&value, &bits, 4);
    } else if (magnitude >= 0x400u) {
      bits = (magnitude << 13) + (112u << 23);
      __builtin_memcpy(&value, &bits, 4);
    } else {
      value = float(magnitude) * 0x1p-24f;  // exact: a subnormal half is an integer of 10 bits
    }
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign;
    __builtin_memcpy(&value, &bits, 4);
    result[lane] = value;
  }
  return result;
}
CHILDTUNE_INLINE HalfU16 float_to_half(VecF32 x) {
  HalfU16 result{};
  for (int lane = 0; lane < kLanes32; ++lane) {
    const float value = x[lane];
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7FFFFFFFu;
    uint32_t half;
    if (bits > 0x7F800000u) {
      half = 0x7E00u | ((bits >> 13) & 0x3FFu);
    } else if (bits >= 0x477FF000u) {
      half = 0x7C00u;  // 65520 and above round to infinity
    } else if (bits >= 0x38800000u) {
      half = (bits - (112u << 23) + 0xFFFu + ((bits >> 13) & 1u)) >> 13;
    } else {
      float magnitude;
      __builtin_memcpy(&magnitude, &bits, 4);
      // Adding 1/2 leaves the subnormal half in the low mantissa bits, rounded to nearest even.
      const float shifted = magnitude + 0.5f;
      __builtin_memcpy(&half, &shifted, 4);
      half -= 0x3F000000u;
    }
    result[lane] = uint16_t(sign | half);
  }
  return result;
}

#endif

CHILDTUNE_INLINE VecI32 lane_mask32(uint64_t bits) {
  const VecU32 lane_bit = (VecU32{} + 1u) << iota_times<VecU32, uint32_t>(1);
  return (VecI32)(((VecU32{} + uint32_t(bits)) & lane_bit) != 0u);
}
CHILDTUNE_INLINE VecI64 lane_mask64(uint64_t bits) {
  const VecU64 lane_bit = (VecU64{} + uint64_t(1)) << iota_times<VecU64, uint64_t>(1);
  return (VecI64)(((VecU64{} + bits) & lane_bit) != 0u);
}
CHILDTUNE_INLINE VecF32 select(uint64_t bits, VecF32 a, VecF32 b) {
  const VecI32 mask = lane_mask32(bits);
  return (VecF32)(((VecI32)a & mask) | ((VecI32)b & ~mask));
}
CHILDTUNE_INLINE VecF64 select(uint64_t bits, VecF64 a, VecF64 b) {
  const VecI64 mask = lane_mask64(bits);
  return (VecF64)(((VecI64)a & mask) | ((VecI64)b & ~mask));
}
CHILDTUNE_INLINE VecU32 select(uint64_t bits, VecU32 a, VecU32 b) {
  const VecI32 mask = lane_mask32(bits);
  return (VecU32)(((VecI32)a & mask) | ((VecI32)b & ~mask));
}

#endif

// 16 bits and 32. GCC 12 widens for AVX2 in two halves, and narrows with a mask and a permutation too many.
#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES == 32
CHILDTUNE_INLINE VecU32 widened16(HalfU16 x) { return (VecU32)_mm256_cvtepu16_epi32((__m128i)x); }
CHILDTUNE_INLINE VecI32 widened16_signed(HalfU16 x) { return (VecI32)_mm256_cvtepi16_epi32((__m128i)x); }
// Of values below 2^16.
CHILDTUNE_INLINE HalfU16 narrowed16(VecU32 x) {
  const __m256i wide = (__m256i)x;
  return (HalfU16)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
// a's lane where the top bit of `sign` is set, else b's.
CHILDTUNE_INLINE VecU32 select_by_sign(VecU32 sign, VecU32 a, VecU32 b) {
  return (VecU32)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)sign);
}
#else
CHILDTUNE_INLINE VecU32 widened16(HalfU16 x) { return __builtin_convertvector(x, VecU32); }
CHILDTUNE_INLINE VecI32 widened16_signed(HalfU16 x) {
  return (VecI32)((__builtin_convertvector(x, VecU32) ^ 0x8000u) - 0x8000u);
}
CHILDTUNE_INLINE HalfU16 narrowed16(VecU32 x) { return __builtin_convertvector(x, HalfU16); }
CHILDTUNE_INLINE VecU32 select_by_sign(VecU32 sign, VecU32 a, VecU32 b) {
  const VecU32 mask = (VecU32)((VecI32)sign >> 31);
  return (a & mask) | (b & ~mask);
}
#endif
