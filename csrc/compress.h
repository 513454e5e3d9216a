// Elements whose bit is set, moved together, and back; elements at places of a list.

// The elements from `source` on whose bit is set go to `target`, one after the other. Returns how many
// they are.
template <class Element>
CHILDTUNE_INLINE int compress_elements(const Element* source, uint64_t bits, Element* target) {
  int count = 0;
  for (; bits != 0; bits &= bits - 1) target[count++] = source[__builtin_ctzll(bits)];
  return count;
}

// The reverse: elements from `source` on go to the places from `target` on whose bit is set.
template <class Element>
CHILDTUNE_INLINE int expand_elements(const Element* source, uint64_t bits, Element* target) {
  int count = 0;
  for (; bits != 0; bits &= bits - 1) target[__builtin_ctzll(bits)] = source[count++];
  return count;
}

// The same for a block of 64 elements that all lie in the tensor: whole vectors are read and written, so
// that up to 15 more places behind the last compressed element are overwritten and read.
#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES == 64
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

// Lanes whose bit is set, from neighbouring elements, of which a whole vector is read. What the other
// lanes hold does not count.
CHILDTUNE_INLINE VecF32 expand_vector(const float* source, uint64_t lanes) {
  return (VecF32)_mm512_maskz_expand_ps((__mmask16)lanes, _mm512_loadu_ps(source));
}
CHILDTUNE_INLINE VecF64 expand_vector(const double* source, uint64_t lanes) {
  return (VecF64)_mm512_maskz_expand_pd((__mmask8)lanes, _mm512_loadu_pd(source));
}

// The elements at a vector's number of places. Measured on Zen 4: a step of 2 % of 32M elements takes
// 2.4 ms with gathers and 4.3 where lanes are read one by one and put together.
CHILDTUNE_INLINE VecF32 gather_vector(const float* source, const uint16_t* places) {
  const __m256i found = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
  return (VecF32)_mm512_i32gather_ps(_mm512_cvtepu16_epi32(found), source, 4);
}
CHILDTUNE_INLINE VecF64 gather_vector(const double* source, const uint16_t* places) {
  const __m128i found = _mm_loadu_si128(reinterpret_cast<const __m128i*>(places));
  return (VecF64)_mm512_i32gather_pd(_mm256_cvtepu16_epi32(found), source, 8);
}

#else

template <class Element>
CHILDTUNE_INLINE int compress_block(const Element* source, uint64_t bits, Element* target) {
  return compress_elements(source, bits, target);
}
template <class Element>
CHILDTUNE_INLINE int expand_block(const Element* source, uint64_t bits, Element* target) {
  return expand_elements(source, bits, target);
}

template <class Vec, class Element>
CHILDTUNE_INLINE Vec expand_lanes(const Element* source, uint64_t lanes) {
  Vec vector{};
  expand_elements(source, lanes & ((uint64_t(1) << (sizeof(Vec) / sizeof(Element))) - 1),
                  reinterpret_cast<Element*>(&vector));
  return vector;
}
CHILDTUNE_INLINE VecF64 expand_vector(const double* source, uint64_t lanes) {
  return expand_lanes<VecF64>(source, lanes);
}

template <class Vec, class Element>
CHILDTUNE_INLINE Vec gather_lanes(const Element* source, const uint16_t* places) {
  Vec vector{};
  for (int lane = 0; lane < int(sizeof(Vec) / sizeof(Element)); ++lane) vector[lane] = source[places[lane]];
  return vector;
}
CHILDTUNE_INLINE VecF64 gather_vector(const double* source, const uint16_t* places) {
  return gather_lanes<VecF64>(source, places);
}

#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES == 32
// Where the lanes of a vector go, for each of the 256 sets of eight: three bits a lane.
struct LaneOrders {
  uint32_t together[256];
  uint32_t apart[256];
};
constexpr LaneOrders lane_orders() {
  LaneOrders orders{};
  for (uint32_t set = 0; set < 256; ++set) {
    uint32_t count = 0;
    for (uint32_t lane = 0; lane < 8; ++lane) {
      if (!(set >> lane & 1)) continue;
      orders.together[set] |= lane << (3 * count);
      orders.apart[set] |= count << (3 * lane);
      ++count;
    }
  }
  return orders;
}
constexpr LaneOrders kLaneOrders = lane_orders();

// A permutation looks at the low three bits of each lane alone.
CHILDTUNE_INLINE __m256i lane_order(uint32_t order) {
  return _mm256_srlv_epi32(_mm256_set1_epi32(int(order)), _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21));
}

CHILDTUNE_INLINE int compress_block(const float* source, uint64_t bits, float* target) {
  int count = 0;
  for (int at = 0; at < kBlock; at += 8) {
    const uint32_t lanes = uint32_t(bits >> at) & 0xFFu;
    const __m256 found = _mm256_loadu_ps(source + at);
    _mm256_storeu_ps(target + count, _mm256_permutevar8x32_ps(found, lane_order(kLaneOrders.together[lanes])));
    count += __builtin_popcount(lanes);
  }
  return count;
}
CHILDTUNE_INLINE VecF32 expand_vector(const float* source, uint64_t lanes) {
  const __m256i order = lane_order(kLaneOrders.apart[lanes & 0xFFu]);
  return (VecF32)_mm256_permutevar8x32_ps(_mm256_loadu_ps(source), order);
}
CHILDTUNE_INLINE VecF32 gather_vector(const float* source, const uint16_t* places) {
  const __m128i found = _mm_loadu_si128(reinterpret_cast<const __m128i*>(places));
  return (VecF32)_mm256_i32gather_ps(source, _mm256_cvtepu16_epi32(found), 4);
}
#else
CHILDTUNE_INLINE VecF32 expand_vector(const float* source, uint64_t lanes) {
  return expand_lanes<VecF32>(source, lanes);
}
CHILDTUNE_INLINE VecF32 gather_vector(const float* source, const uint16_t* places) {
  return gather_lanes<VecF32>(source, places);
}
#endif
#endif
