// Op bitmask: bool tensors to mask words and back, and their population (SPEC.md, "Bit layout").

void pack_mask(const uint8_t* mask, int64_t numel, uint32_t* words, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; ++at) {
    const int64_t local = at * kBlock;
    const int count = numel - local < kBlock ? int(numel - local) : kBlock;
    uint64_t bits = 0;
    int byte = 0;
    for (; byte + 8 <= count; byte += 8) {
      uint64_t eight;
      __builtin_memcpy(&eight, mask + local + byte, 8);
      // A bool seen through another type may hold any byte; the top bit of each says "not zero".
      eight |= (eight & 0x7F7F7F7F7F7F7F7Fu) + 0x7F7F7F7F7F7F7F7Fu;
      // Gathers a bit of eight bytes: each partial product lands in a bit of its own.
      bits |= ((eight >> 7 & 0x0101010101010101u) * 0x0102040810204080u >> 56) << byte;
    }
    for (; byte < count; ++byte) bits |= uint64_t(mask[local + byte] != 0) << byte;
    words[local / 32] = uint32_t(bits);
    if (count > 32) words[local / 32 + 1] = uint32_t(bits >> 32);
  }
}

void unpack_mask(const uint32_t* words, int64_t numel, uint8_t* mask, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; ++at) {
    const int64_t local = at * kBlock;
    const int count = numel - local < kBlock ? int(numel - local) : kBlock;
    for (int element = 0; element < count; ++element)
      mask[local + element] = uint8_t(words[(local + element) / 32] >> (element % 32) & 1u);
  }
}

int64_t count_mask(const uint32_t* words, int64_t word_count, int64_t first, int64_t last) {
  int64_t count = 0;
  const int64_t end = 2 * last < word_count ? 2 * last : word_count;
  for (int64_t word = 2 * first; word < end; ++word) count += __builtin_popcount(words[word]);
  return count;
}
