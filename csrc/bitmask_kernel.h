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

// Calls visit(element) for every bit that is set in words first_word .. last_word - 1, ascending.
template <class Visit>
CHILDTUNE_INLINE void each_set_bit(const uint32_t* words, int64_t first_word, int64_t last_word, const Visit& visit) {
  for (int64_t word = first_word; word < last_word; ++word)
    for (uint32_t bits = words[word]; bits; bits &= bits - 1) visit(word * 32 + __builtin_ctz(bits));
}

template <class Value>
void move_values(const uint32_t* words, int64_t first_word, int64_t last_word, Value* values, Value* child,
                 bool gather) {
  if (gather) {
    each_set_bit(words, first_word, last_word, [&](int64_t element) { *child++ = values[element]; });
  } else {
    each_set_bit(words, first_word, last_word, [&](int64_t element) { values[element] = *child++; });
  }
}

// Between the places of set bits in `values` and `child`, which begins at the rank of the first; of elements
// of `size` bytes.
void move_masked(const uint32_t* words, int64_t first_word, int64_t last_word, void* values, void* child, int size,
                 bool gather) {
  switch (size) {
    case 1: return move_values(words, first_word, last_word, (uint8_t*)values, (uint8_t*)child, gather);
    case 2: return move_values(words, first_word, last_word, (uint16_t*)values, (uint16_t*)child, gather);
    case 4: return move_values(words, first_word, last_word, (uint32_t*)values, (uint32_t*)child, gather);
    default: return move_values(words, first_word, last_word, (uint64_t*)values, (uint64_t*)child, gather);
  }
}

void mask_indices(const uint32_t* words, int64_t first_word, int64_t last_word, void* indices, int size) {
  if (size == 2) {
    uint16_t* low = (uint16_t*)indices;
    each_set_bit(words, first_word, last_word, [&](int64_t element) { *low++ = uint16_t(element); });
  } else {
    int64_t* whole = (int64_t*)indices;
    each_set_bit(words, first_word, last_word, [&](int64_t element) { *whole++ = element; });
  }
}
