// Op keep_words: the Bernoulli keep bits of one tensor as mask words (SPEC.md, eq. 1 to 5).

void keep_words(uint64_t key, uint64_t step, uint32_t purpose, uint64_t threshold, const IndexMap& map,
                bool contiguous, int64_t numel, uint32_t* words, int64_t first, int64_t last) {
  const PhiloxStream stream = philox_stream(key, step, purpose);
  for (int64_t at = first; at < last; ++at) {
    const int64_t local = at * kBlock;
    const int count = numel - local < kBlock ? int(numel - local) : kBlock;
    uint64_t bits = ~uint64_t(0);
    if (threshold < kKeepAll) {
      bits = contiguous ? keep_bits_from(stream, uint64_t(map.base + local), uint32_t(threshold))
                        : keep_bits_mapped(stream, map, local, count, uint32_t(threshold));
    }
    if (count < kBlock) bits &= (uint64_t(1) << count) - 1;
    words[local / 32] = uint32_t(bits);
    if (count > 32) words[local / 32 + 1] = uint32_t(bits >> 32);
  }
}
