// Op topk_select: the passes of an exact selection (SPEC.md, eq. 15 and 16). Each works on a stretch
// of one tensor; -0 has the key of +0 since a key leaves the sign out.

constexpr uint32_t kKeyBits = 0x7FFFFFFFu, kSignBit = 0x80000000u, kInfinityBits = 0x7F800000u;
constexpr int kFewMatches = 16;  // of a block of 64, above which all lanes go through the tables

CHILDTUNE_INLINE VecU32 load_keys(const uint32_t* scores) { return load<VecU32>(scores) & kKeyBits; }

// Lanes that are NaN, infinite or negative, but for -0.
CHILDTUNE_INLINE VecI32 refused_lanes(VecU32 bits) {
  return (VecI32)(bits >= kInfinityBits) & (VecI32)(bits != kSignBit);
}
inline int64_t count_refused(const uint32_t* scores, int64_t count) {
  int64_t refused = 0;
  for (int64_t at = 0; at < count; ++at) refused += scores[at] >= kInfinityBits && scores[at] != kSignBit;
  return refused;
}

// Which keys of a block have the prefix above their lowest `high` bits.
CHILDTUNE_INLINE uint64_t matching(const uint32_t* block, int high, uint32_t prefix) {
  uint64_t matches = 0;
  for (int at = 0; at < kBlock; at += kLanes32)
    matches |= lane_bits((VecI32)((load_keys(block + at) >> high) == prefix)) << at;
  return matches;
}

// Neighbours go to tables of their own: values crowd in few bins, and a bin just written is slow to
// read again.
CHILDTUNE_INLINE void count_digits(const uint32_t* digits, int64_t stride, uint32_t* tables) {
#pragma GCC unroll 64
  for (int at = 0; at < kBlock; ++at) ++tables[at % kHistogramTables * stride + digits[at]];
}

int64_t digit_histogram(const uint32_t* scores, int64_t count, int shift, int bits, uint32_t prefix,
                        uint32_t* tables) {
  const int high = shift + bits;
  const bool first_pass = high == 31;
  const uint32_t bins = uint32_t(1) << bits, digit_mask = bins - 1;
  const int64_t stride = histogram_stride(bits);
  alignas(64) uint32_t digits[kBlock];
  VecI32 refused{};
  int64_t at = 0;
  for (; at + kBlock <= count; at += kBlock) {
    const uint32_t* const block = scores + at;
    if (first_pass) {
      for (int part = 0; part < kBlock; part += kLanes32) {
        const VecU32 bits_of = load<VecU32>(block + part);
        refused |= refused_lanes(bits_of);
        store(digits + part, (bits_of & kKeyBits) >> shift);
      }
      count_digits(digits, stride, tables);
      continue;
    }
    uint64_t matches = matching(block, high, prefix);
    if (matches == 0) continue;
    if (__builtin_popcountll(matches) <= kFewMatches) {
      for (; matches; matches &= matches - 1) {
        const int element = __builtin_ctzll(matches);
        ++tables[element % kHistogramTables * stride + ((block[element] >> shift) & digit_mask)];
      }
      continue;
    }
    // What does not match goes to the bin behind the last.
    for (int part = 0; part < kBlock; part += kLanes32) {
      const VecU32 keys = load_keys(block + part);
      const VecU32 match = (VecU32)((keys >> high) == prefix);
      store(digits + part, (((keys >> shift) & digit_mask) & match) | (~match & bins));
    }
    count_digits(digits, stride, tables);
  }
  for (int64_t rest = at; rest < count; ++rest) {
    const uint32_t key = scores[rest] & kKeyBits;
    if (key >> high == prefix) ++tables[(key >> shift) & digit_mask];
  }
  if (!first_pass) return 0;
  const int64_t of_rest = count_refused(scores + at, count - at);
  return lane_bits(refused) ? count_refused(scores, at) + of_rest : of_rest;
}

// Counts keys low .. high, of which there are few, by their distance from low; `above` grows by how many lie
// beyond. Blocks that hold such keys are noted without a branch, which would be guessed wrongly too often, and
// looked at afterwards.
int64_t bracket_histogram(const uint32_t* scores, int64_t count, uint32_t low, uint32_t high, int shift,
                          uint32_t* table, int64_t* above) {
  constexpr int kNotes = 256;
  const uint32_t width = high - low;
  const bool one_bin = width >> shift == 0;
  uint64_t inside_of[kNotes + 1];
  uint32_t block_of[kNotes + 1];
  VecU32 greatest{};
  VecI32 beyond{};
  int64_t at = 0, all_beyond = 0;
  while (at + kBlock <= count) {
    const uint32_t* const first = scores + at;
    const int blocks = int(count - at < kNotes * kBlock ? (count - at) / kBlock : kNotes);
    int notes = 0;
    for (int block = 0; block < blocks; ++block) {
      uint64_t inside = 0;
      for (int part = 0; part < kBlock; part += kLanes32) {
        const VecU32 bits_of = load<VecU32>(first + block * kBlock + part);
        const VecU32 keys = bits_of & kKeyBits;
        greatest = bits_of > greatest ? bits_of : greatest;
        beyond -= (VecI32)keys > int32_t(high);
        inside |= lane_bits((VecI32)(keys - low <= width)) << part;
      }
      inside_of[notes] = inside;
      block_of[notes] = uint32_t(block * kBlock);
      notes += inside != 0;
    }
    for (int note = 0; note < notes; ++note) {
      uint64_t inside = inside_of[note];
      if (one_bin) {
        table[0] += uint32_t(__builtin_popcountll(inside));
        continue;
      }
      for (; inside != 0; inside &= inside - 1) {
        const uint32_t key = first[block_of[note] + __builtin_ctzll(inside)] & kKeyBits;
        ++table[(key - low) >> shift];
      }
    }
    at += blocks * kBlock;
  }
  bool suspect = false;
  for (int lane = 0; lane < kLanes32; ++lane) {
    all_beyond += beyond[lane];
    suspect |= greatest[lane] >= kInfinityBits;
  }
  for (int64_t rest = at; rest < count; ++rest) {
    const uint32_t key = scores[rest] & kKeyBits;
    all_beyond += key > high;
    if (key - low <= width) ++table[(key - low) >> shift];
  }
  *above += all_beyond;
  return suspect ? count_refused(scores, count) : count_refused(scores + at, count - at);
}

int64_t select_words(const uint32_t* scores, int64_t count, int32_t threshold, bool largest, uint32_t* words) {
  int64_t ties = 0, at = 0;
  for (; at + kBlock <= count; at += kBlock) {
    uint64_t beyond = 0, equal = 0;
    for (int part = 0; part < kBlock; part += kLanes32) {
      const VecI32 keys = (VecI32)load_keys(scores + at + part);
      beyond |= lane_bits(largest ? keys > threshold : keys < threshold) << part;
      equal |= lane_bits(keys == threshold) << part;
    }
    words[at / 32] = uint32_t(beyond);
    words[at / 32 + 1] = uint32_t(beyond >> 32);
    ties += __builtin_popcountll(equal);
  }
  for (int64_t rest = at; rest < count; ++rest) {
    const int32_t key = int32_t(scores[rest] & kKeyBits);
    if (rest % 32 == 0) words[rest / 32] = 0;
    words[rest / 32] |= uint32_t(largest ? key > threshold : key < threshold) << (rest % 32);
    ties += key == threshold;
  }
  return ties;
}

void take_ties(const uint32_t* scores, int64_t count, int32_t threshold, int64_t quota, uint32_t* words) {
  int64_t at = 0;
  for (; quota > 0 && at + kBlock <= count; at += kBlock) {
    uint64_t equal = matching(scores + at, 0, uint32_t(threshold));
    const int found = __builtin_popcountll(equal);
    // The last ones go first, until no more than the quota are left.
    for (int64_t excess = found - quota; excess > 0; --excess) equal &= ~(uint64_t(1) << (63 - __builtin_clzll(equal)));
    words[at / 32] |= uint32_t(equal);
    words[at / 32 + 1] |= uint32_t(equal >> 32);
    quota -= found;
  }
  for (; quota > 0 && at < count; ++at) {
    if (int32_t(scores[at] & kKeyBits) != threshold) continue;
    words[at / 32] |= uint32_t(1) << (at % 32);
    --quota;
  }
}

// Eq. 16: the tree over 32 elements.
CHILDTUNE_INLINE float block_sum(const uint32_t* block) {
  alignas(64) float sums[16];
  for (int part = 0; part < 16; part += kLanes32)
    store(sums + part, (VecF32)load_keys(block + part) + (VecF32)load_keys(block + 16 + part));
  for (int width = 8; width > 0; width /= 2)
    for (int at = 0; at < width; ++at) sums[at] += sums[at + width];
  return sums[0];
}

int64_t run_scores(const uint32_t* scores, int64_t count, int64_t granularity, float* runs) {
  VecI32 refused{};
  for (int64_t start = 0; start < count; start += granularity) {
    const int64_t end = start + granularity < count ? start + granularity : count;
    float total = 0.0f;
    for (int64_t at = start; at < end; at += 32) {
      alignas(64) uint32_t padded[32] = {};
      const uint32_t* block = scores + at;
      if (end - at < 32) {
        __builtin_memcpy(padded, block, size_t(end - at) * 4);
        block = padded;
      }
      for (int part = 0; part < 32; part += kLanes32) refused |= refused_lanes(load<VecU32>(block + part));
      const float sum = block_sum(block);
      total = at == start ? sum : total + sum;
    }
    runs[start / granularity] = total;
  }
  return lane_bits(refused) ? count_refused(scores, count) : 0;
}
