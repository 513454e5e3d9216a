// Elements whose bit is set, moved together, and back. Types of one size share their code: bits move.

#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES == 64
constexpr bool kCompresses = true;

// The 64 elements from `source` on whose bit is set go to `target`, one after the other; up to 15 more
// places behind them are overwritten. Where no bit is set nothing is read. Returns how many they are.
// Measured on Zen 4: compressing in a register and storing whole vectors takes a few cycles where
// the compressing store takes more than a hundred.
CHILDTUNE_INLINE int compress_block(const float* source, uint64_t bits, float* target) {
  int count = 0;
#pragma GCC unroll 4
  for (int at = 0; at < kBlock; at += 16) {
    const __mmask16 lanes = __mmask16(bits >> at);
    _mm512_storeu_ps(target + count, _mm512_maskz_compress_ps(lanes, _mm512_maskz_loadu_ps(lanes, source + at)));
    count += __builtin_popcount(lanes);
  }
  return count;
}
CHILDTUNE_INLINE int compress_block(const double* source, uint64_t bits, double* target) {
  int count = 0;
  for (int at = 0; at < kBlock; at += 8) {
    const __mmask8 lanes = __mmask8(bits >> at);
    _mm512_storeu_pd(target + count, _mm512_maskz_compress_pd(lanes, _mm512_maskz_loadu_pd(lanes, source + at)));
    count += __builtin_popcount(lanes);
  }
  return count;
}
template <class Half>
CHILDTUNE_INLINE int compress_block(const Half* source, uint64_t bits, Half* target) {
  int count = 0;
  for (int at = 0; at < kBlock; at += 16) {
    const __mmask16 lanes = __mmask16(bits >> at);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, source + at));
    const __m256i near = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(lanes, wide));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + count), near);
    count += __builtin_popcount(lanes);
  }
  return count;
}

// The reverse: elements from `source` on go to the places of the 64 from `target` on whose bit is set.
// Up to 15 elements behind the last one are read.
CHILDTUNE_INLINE int expand_block(const float* source, uint64_t bits, float* target) {
  int count = 0;
#pragma GCC unroll 4
  for (int at = 0; at < kBlock; at += 16) {
    const __mmask16 lanes = __mmask16(bits >> at);
    _mm512_mask_storeu_ps(target + at, lanes, _mm512_maskz_expand_ps(lanes, _mm512_loadu_ps(source + count)));
    count += __builtin_popcount(lanes);
  }
  return count;
}
CHILDTUNE_INLINE int expand_block(const double* source, uint64_t bits, double* target) {
  int count = 0;
  for (int at = 0; at < kBlock; at += 8) {
    const __mmask8 lanes = __mmask8(bits >> at);
    _mm512_mask_storeu_pd(target + at, lanes, _mm512_maskz_expand_pd(lanes, _mm512_loadu_pd(source + count)));
    count += __builtin_popcount(lanes);
  }
  return count;
}
template <class Half>
CHILDTUNE_INLINE int expand_block(const Half* source, uint64_t bits, Half* target) {
  int count = 0;
  for (int at = 0; at < kBlock; at += 16) {
    const __mmask16 lanes = __mmask16(bits >> at);
    const __m256i near = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + count));
    const __m512i wide = _mm512_maskz_expand_epi32(lanes, _mm512_cvtepu16_epi32(near));
    _mm256_mask_storeu_epi16(target + at, lanes, _mm512_cvtepi32_epi16(wide));
    count += __builtin_popcount(lanes);
  }
  return count;
}

#else
constexpr bool kCompresses = false;

template <class Element>
CHILDTUNE_INLINE int compress_block(const Element* source, uint64_t bits, Element* target) {
  int count = 0;
  for (; bits != 0; bits &= bits - 1) target[count++] = source[__builtin_ctzll(bits)];
  return count;
}
template <class Element>
CHILDTUNE_INLINE int expand_block(const Element* source, uint64_t bits, Element* target) {
  int count = 0;
  for (; bits != 0; bits &= bits - 1) target[__builtin_ctzll(bits)] = source[count++];
  return count;
}
#endif
