// Philox4x32-10 (Salmon et al., SC'11) and the keep bits made of it (SPEC.md, eq. 1 to 4).

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
// What the words of an element are for (eq. 2).
constexpr uint32_t kPurposeKeep = 0, kPurposeWeight = 1;
constexpr uint64_t kKeepAll = uint64_t(1) << 32;

// What every draw of one tensor in one step shares: the round keys, the step and the purpose.
struct PhiloxStream {
  // 64 bits wide, so that vector code broadcasts them straight from memory.
  uint64_t key0[kPhiloxRounds];
  uint64_t key1[kPhiloxRounds];
  uint64_t step;
  uint64_t purpose;
};

CHILDTUNE_INLINE PhiloxStream philox_stream(uint64_t key, uint64_t step, uint32_t purpose) {
  PhiloxStream stream;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    stream.key0[round] = uint32_t(key) + uint32_t(round) * kPhiloxW0;
    stream.key1[round] = uint32_t(key >> 32) + uint32_t(round) * kPhiloxW1;
  }
  stream.step = step & 0xFFFFFFFFu;
  stream.purpose = purpose;
  return stream;
}

// Eq. 1 for one counter.
inline void philox_words(const PhiloxStream& stream, uint64_t counter, uint32_t words[4]) {
  uint32_t x0 = uint32_t(counter), x1 = uint32_t(counter >> 32);
  uint32_t x2 = uint32_t(stream.step), x3 = uint32_t(stream.purpose);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t(kPhiloxM0) * x0;
    const uint64_t product1 = uint64_t(kPhiloxM1) * x2;
    x0 = uint32_t(product1 >> 32) ^ x1 ^ uint32_t(stream.key0[round]);
    x2 = uint32_t(product0 >> 32) ^ x3 ^ uint32_t(stream.key1[round]);
    x1 = uint32_t(product1);
    x3 = uint32_t(product0);
  }
  words[0] = x0, words[1] = x1, words[2] = x2, words[3] = x3;
}

// Eq. 1 for kLanes64 counters, one a 64-bit lane. Only the low 32 bits of a lane count: the high
// ones hold remnants that the multiply ignores, which spares the masks and blends of 32-bit lanes.
struct PhiloxLanes {
  VecU64 x[4];
};

// Rounds 0 and 1 of counters that share their upper word. Every lane then meets the same x2, later
// the same x0, so that half of the products are scalars (a tenth of all the work).
CHILDTUNE_INLINE PhiloxLanes philox_begin(const PhiloxStream& stream, VecU64 counter, uint32_t counter_high) {
  const uint64_t same1 = uint64_t(kPhiloxM1) * stream.step;
  const uint64_t same0 = uint64_t(kPhiloxM0) * uint32_t((same1 >> 32) ^ counter_high ^ stream.key0[0]);
  const VecU64 first0 = multiply_low32(VecU64{} + kPhiloxM0, counter);
  const VecU64 second2 = upper_half(first0) ^ (VecU64{} + (stream.purpose ^ stream.key1[0]));
  const VecU64 first1 = multiply_low32(VecU64{} + kPhiloxM1, second2);
  return {{upper_half(first1) ^ (VecU64{} + (same1 ^ stream.key0[1])), first1,
           first0 ^ (VecU64{} + ((same0 >> 32) ^ stream.key1[1])), VecU64{} + same0}};
}

CHILDTUNE_INLINE void philox_round(const PhiloxStream& stream, int round, PhiloxLanes& lanes) {
  VecU64* const x = lanes.x;
  const VecU64 product0 = multiply_low32(VecU64{} + kPhiloxM0, x[0]);
  const VecU64 product1 = multiply_low32(VecU64{} + kPhiloxM1, x[2]);
  VecU64 keyed1 = x[1] ^ (VecU64{} + stream.key0[round]), keyed3 = x[3] ^ (VecU64{} + stream.key1[round]);
#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES < 64
  // While the products are under way. GCC puts the keys last, where a round waits for them: on Zen 3 a draw
  // takes 2.2 cycles an element so, 2.0 in this order. (AVX-512 has one instruction for both.)
  __asm__("" : "+x"(keyed1), "+x"(keyed3));
#endif
  x[0] = upper_half(product1) ^ keyed1;
  x[2] = upper_half(product0) ^ keyed3;
  x[1] = product1;
  x[3] = product0;
}

// word < threshold for 2*kLanes64 counters (even and odd ones apart), as bits in element order.
CHILDTUNE_INLINE uint64_t compare_words(const PhiloxLanes& evens, const PhiloxLanes& odds, uint32_t threshold) {
  const VecU64 *const even = evens.x, *const odd = odds.x;
#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES == 64
  const __m512i limit = _mm512_set1_epi32(int(threshold));
  constexpr uint64_t kEvery4th = 0x1111111111111111u;
  uint64_t bits = 0;
  for (int word = 0; word < 4; ++word) {
    const __m512i in_order =
        _mm512_mask_shuffle_epi32((__m512i)even[word], 0xAAAA, (__m512i)odd[word], _MM_PERM_ENUM(0xA0));
    const __mmask16 kept = _mm512_cmplt_epu32_mask(in_order, limit);
    bits |= _pdep_u64(kept, kEvery4th << word);
  }
  return bits;
#elif defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES == 32
  // Two words of a counter make a 64-bit lane; packing leaves the bytes of neighbouring counters apart.
  const __m256i sign = _mm256_set1_epi32(int(0x80000000u));
  const __m256i limit = _mm256_set1_epi32(int(threshold ^ 0x80000000u));
  const auto below = [&](VecU64 first, VecU64 second) {
    const __m256i words = _mm256_blend_epi32((__m256i)first, _mm256_slli_epi64((__m256i)second, 32), 0xAA);
    return _mm256_cmpgt_epi32(limit, _mm256_xor_si256(words, sign));
  };
  const __m256i of_even = _mm256_packs_epi32(below(even[0], even[1]), below(even[2], even[3]));
  const __m256i of_odd = _mm256_packs_epi32(below(odd[0], odd[1]), below(odd[2], odd[3]));
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i packed = _mm256_packs_epi16(of_even, of_odd);
  return uint32_t(_mm256_movemask_epi8(_mm256_shuffle_epi8(packed, _mm256_broadcastsi128_si256(order))));
#else
  // A lane's four verdicts become the four bytes of a 32-bit lane: then bytes are in element order.
  const VecU32 limit = VecU32{} + threshold;
  VecU32 bytes{};
  for (int word = 0; word < 4; ++word) {
    const VecU32 in_order = (VecU32)((even[word] & 0xFFFFFFFFu) | (odd[word] << 32));
    bytes |= (VecU32)(in_order < limit) & (0xFFu << (8 * word));
  }
#if defined(__x86_64__)
  return uint32_t(_mm_movemask_epi8((__m128i)bytes));
#else
  uint64_t halves[2];
  store(halves, bytes);
  // Gathers the top bit of eight bytes: each partial product lands in a bit of its own.
  const uint64_t low = ((halves[0] >> 7 & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
  const uint64_t high = ((halves[1] >> 7 & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
  return low | high << 8;
#endif
#endif
}

// The draw of 2*kLanes64 neighbouring counters, which may be carried out a few rounds at a time.
constexpr int kDrawElements = 8 * kLanes64;

struct PhiloxDraw {
  PhiloxLanes even, odd;
};

// Rounds 0 and 1 for elements first .. first+kDrawElements-1, first a multiple of that.
CHILDTUNE_INLINE PhiloxDraw draw_begin(const PhiloxStream& stream, uint64_t first) {
  const VecU64 counter = iota_times<VecU64, uint64_t>(2) + first / 4;
  const uint32_t high = uint32_t(first >> 34);
  return {philox_begin(stream, counter, high), philox_begin(stream, counter + 1, high)};
}

CHILDTUNE_INLINE void draw_rounds(const PhiloxStream& stream, int first_round, int last_round, PhiloxDraw& draw) {
#pragma GCC unroll 10
  for (int round = first_round; round < last_round; ++round) {
    philox_round(stream, round, draw.even);
    philox_round(stream, round, draw.odd);
  }
}

// Eq. 2 for the elements of a draw, as bits.
CHILDTUNE_INLINE uint64_t draw_end(const PhiloxDraw& draw, uint32_t threshold) {
  return compare_words(draw.even, draw.odd, threshold);
}

// Eq. 2 for elements first .. first+63, first a multiple of 64; bit j is element first+j.
CHILDTUNE_INLINE uint64_t keep_bits_aligned(const PhiloxStream& stream, uint64_t first, uint32_t threshold) {
  uint64_t bits = 0;
  for (int done = 0; done < kBlock; done += kDrawElements) {
    PhiloxDraw draw = draw_begin(stream, first + uint64_t(done));
    draw_rounds(stream, 2, kPhiloxRounds, draw);
    bits |= draw_end(draw, threshold) << done;
  }
  return bits;
}

// Eq. 2 for 64 consecutive elements from any first one.
CHILDTUNE_INLINE uint64_t keep_bits_from(const PhiloxStream& stream, uint64_t first, uint32_t threshold) {
  const int shift = int(first % kBlock);
  const uint64_t low = keep_bits_aligned(stream, first - shift, threshold);
  if (shift == 0) return low;
  const uint64_t high = keep_bits_aligned(stream, first - shift + kBlock, threshold);
  return low >> shift | high << (kBlock - shift);
}

// The words (eq. 2) of elements first .. first+63, first a multiple of 64, in their order.
inline void element_words_aligned(const PhiloxStream& stream, uint64_t first, uint32_t* words) {
  constexpr int kCounters = kDrawElements / 4;
  for (int done = 0; done < kBlock; done += kDrawElements) {
    PhiloxDraw draw = draw_begin(stream, first + uint64_t(done));
    draw_rounds(stream, 2, kPhiloxRounds, draw);
    // Two words of a counter make a 64-bit lane.
    uint64_t pairs[2][2][kLanes64];
    for (int odd = 0; odd < 2; ++odd) {
      const VecU64* const x = odd ? draw.odd.x : draw.even.x;
      store(pairs[odd][0], (x[0] & 0xFFFFFFFFu) | x[1] << 32);
      store(pairs[odd][1], (x[2] & 0xFFFFFFFFu) | x[3] << 32);
    }
    for (int counter = 0; counter < kCounters; ++counter) {
      __builtin_memcpy(words + done + 4 * counter, &pairs[counter % 2][0][counter / 2], 8);
      __builtin_memcpy(words + done + 4 * counter + 2, &pairs[counter % 2][1][counter / 2], 8);
    }
  }
}

// The same one element at a time, for neighbours a Philox block once.
struct ElementWords {
  const PhiloxStream& stream;
  uint64_t counter = ~uint64_t(0);
  uint32_t words[4];

  CHILDTUNE_INLINE uint32_t of(uint64_t element) {
    if (element / 4 != counter) {
      counter = element / 4;
      philox_words(stream, counter, words);
    }
    return words[element % 4];
  }
};

// Eq. 5: the index that a map gives local element `local`, and how many of the following local
// elements lie behind it one by one.
inline int64_t map_index(const IndexMap& map, int64_t local, int64_t* run) {
  int64_t index = map.base;
  const IndexMap::Level& inner = map.level[kMapLevels - 1];
  *run = inner.stride == 1 ? inner.size - local % inner.size : 1;
  for (int level = kMapLevels - 1; level > 0; --level) {
    const IndexMap::Level& at = map.level[level];
    index += local % at.size * at.stride;
    local /= at.size;
  }
  return index + local * map.level[0].stride;
}

// The element index of a local index of a row.
CHILDTUNE_INLINE uint64_t element_at(const PlanRow& row, int64_t local) {
  int64_t run;
  return uint64_t(row.element_contiguous ? row.element_map.base + local : map_index(row.element_map, local, &run));
}

// Eq. 2 for local elements local .. local+count-1 (count <= 64) of a general element map.
inline uint64_t keep_bits_mapped(const PhiloxStream& stream, const IndexMap& map, int64_t local, int count,
                                 uint32_t threshold) {
  constexpr int64_t kWorthVectors = 8;
  uint64_t bits = 0;
  for (int done = 0; done < count;) {
    int64_t run;
    const uint64_t element = uint64_t(map_index(map, local + done, &run));
    if (run >= kWorthVectors) {
      bits |= keep_bits_from(stream, element, threshold) << done;
      if (run < kBlock && done + run < kBlock) bits &= (uint64_t(1) << (done + run)) - 1;
    } else {
      uint32_t words[4];
      philox_words(stream, element / 4, words);
      bits |= uint64_t(words[element % 4] < threshold) << done;
      run = 1;
    }
    done += run < kBlock ? int(run) : kBlock;
  }
  return bits;
}
