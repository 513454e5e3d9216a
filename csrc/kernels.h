// What every capability offers, and the one that runs (SPEC.md changes with none of them).
#pragma once

#include "plan_row.h"

namespace childtune {

// One gradient and the fp32 sums it is added to, which are contiguous (SPEC.md, eq. 13). `levels` are the
// gradient's (size, stride) pairs, outermost first, without dimensions of size 1; local index i has its digits.
struct FisherRow {
  float* sums;
  const void* grad;
  int64_t numel;
  int64_t grad_dtype;
  bool contiguous;
  const IndexMap::Level* levels;
  int level_count;
};

// The kernels of one instruction set. `first`..`last` count blocks of 64 elements of one row, or
// 64-bit words of one mask, so that any split over threads leaves the same bits.
struct Kernels {
  void (*child_adamw_row)(const PlanRow& row, const PlanGroup& group, int64_t first, int64_t last);
  void (*keep_words)(uint64_t key, uint64_t step, uint32_t purpose, uint64_t threshold, const IndexMap& map,
                     bool contiguous, int64_t numel, uint32_t* words, int64_t first, int64_t last);
  void (*pack_mask)(const uint8_t* mask, int64_t numel, uint32_t* words, int64_t first, int64_t last);
  void (*unpack_mask)(const uint32_t* words, int64_t numel, uint8_t* mask, int64_t first, int64_t last);
  int64_t (*count_mask)(const uint32_t* words, int64_t word_count, int64_t first, int64_t last);
  void (*fisher_accumulate_row)(const FisherRow& row, float scale, int64_t first, int64_t last);
};

enum Capability : int64_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// Null where this build or this processor lacks it.
const Kernels* kernels_of(int64_t capability);

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace childtune
