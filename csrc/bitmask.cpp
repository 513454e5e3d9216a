// Op bitmask: the launches.
#include <algorithm>
#include <atomic>

#include "launch.h"

namespace childtune {
namespace {

constexpr int64_t kGrain = 512;  // 64-bit words a thread
constexpr int64_t kUnitGrain = 8;  // units of ranks a thread

// Calls work(first_word, last_word, rank) for every unit of words; ranks has one number more than there are units.
template <class Work>
void each_unit(const Tensor& words, const Tensor& ranks, int64_t unit, const Work& work) {
  const int64_t* const rank = static_cast<const int64_t*>(ranks.data_ptr());
  const int64_t word_count = words.numel(), unit_words = unit / 32;
  torch::stable::parallel_for(0, ranks.numel() - 1, kUnitGrain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at)
      if (rank[at + 1] > rank[at])
        work(at * unit_words, std::min(word_count, (at + 1) * unit_words), rank[at]);
  });
}

}  // namespace

void pack_mask_(Tensor mask, Tensor words, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const uint8_t* const source = static_cast<const uint8_t*>(mask.data_ptr());
  uint32_t* const target = static_cast<uint32_t*>(words.data_ptr());
  const int64_t numel = mask.numel();
  torch::stable::parallel_for(0, (numel + 63) / 64, kGrain, [&](int64_t begin, int64_t end) {
    kernels.pack_mask(source, numel, target, begin, end);
  });
}

void unpack_mask_(Tensor words, Tensor mask, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const uint32_t* const source = static_cast<const uint32_t*>(words.data_ptr());
  uint8_t* const target = static_cast<uint8_t*>(mask.data_ptr());
  const int64_t numel = mask.numel();
  torch::stable::parallel_for(0, (numel + 63) / 64, kGrain, [&](int64_t begin, int64_t end) {
    kernels.unpack_mask(source, numel, target, begin, end);
  });
}

int64_t count_mask(Tensor words, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const uint32_t* const source = static_cast<const uint32_t*>(words.data_ptr());
  const int64_t word_count = words.numel();
  std::atomic<int64_t> total{0};
  torch::stable::parallel_for(0, (word_count + 1) / 2, kGrain, [&](int64_t begin, int64_t end) {
    total += kernels.count_mask(source, word_count, begin, end);
  });
  return total;
}

void mask_ranks_(Tensor words, int64_t unit, Tensor ranks, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const uint32_t* const source = static_cast<const uint32_t*>(words.data_ptr());
  int64_t* const rank = static_cast<int64_t*>(ranks.data_ptr());
  const int64_t units = ranks.numel() - 1, unit_words = unit / 32;
  torch::stable::parallel_for(0, units, kUnitGrain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t count = std::min(unit_words, words.numel() - at * unit_words);
      rank[at + 1] = kernels.count_mask(source + at * unit_words, count, 0, (count + 1) / 2);
    }
  });
  rank[0] = 0;
  for (int64_t at = 0; at < units; ++at) rank[at + 1] += rank[at];
}

void mask_indices_(Tensor words, Tensor ranks, int64_t unit, Tensor indices, int64_t size, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const uint32_t* const source = static_cast<const uint32_t*>(words.data_ptr());
  char* const target = static_cast<char*>(indices.data_ptr());
  each_unit(words, ranks, unit, [&](int64_t first, int64_t last, int64_t rank) {
    kernels.mask_indices(source, first, last, target + rank * size, int(size));
  });
}

void move_masked_(Tensor words, Tensor ranks, int64_t unit, Tensor values, Tensor child, int64_t size, bool gather,
                  int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const uint32_t* const source = static_cast<const uint32_t*>(words.data_ptr());
  void* const whole = values.data_ptr();
  char* const part = static_cast<char*>(child.data_ptr());
  each_unit(words, ranks, unit, [&](int64_t first, int64_t last, int64_t rank) {
    kernels.move_masked(source, first, last, whole, part + rank * size, int(size), gather);
  });
}

}  // namespace childtune
