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

// The tables of a histogram pass: several, so that neighbours do not meet in a bin, and each with a
// bin for what does not count and a distance that keeps equal bins out of one cache set.
constexpr int kHistogramTables = 4;
inline int64_t histogram_stride(int bits) { return (int64_t(1) << bits) + 16; }

// The kernels of one instruction set. `first`..`last` count units of one row (plan_row.h), or 64-bit
// words of one mask, so that any split over threads leaves the same bits.
struct Kernels {
  void (*child_adamw_row)(const PlanRow& row, const PlanGroup& group, double factor, int64_t first, int64_t last);
  void (*keep_words)(uint64_t key, uint64_t step, uint32_t purpose, uint64_t threshold, const IndexMap& map,
                     bool contiguous, int64_t numel, uint32_t* words, int64_t first, int64_t last);
  void (*pack_mask)(const uint8_t* mask, int64_t numel, uint32_t* words, int64_t first, int64_t last);
  void (*unpack_mask)(const uint32_t* words, int64_t numel, uint8_t* mask, int64_t first, int64_t last);
  int64_t (*count_mask)(const uint32_t* words, int64_t word_count, int64_t first, int64_t last);
  // Of set bits in words first_word .. last_word - 1; `size`: bytes of an element.
  void (*mask_indices)(const uint32_t* words, int64_t first_word, int64_t last_word, void* indices, int size);
  void (*move_masked)(const uint32_t* words, int64_t first_word, int64_t last_word, void* values, void* child,
                      int size, bool gather);
  void (*fisher_accumulate_row)(const FisherRow& row, float scale, int64_t first, int64_t last);
  // Op topk_select takes fp32 scores as their bits: a stretch of one tensor that starts at a multiple of
  // 64 (run_scores: of the granularity). Histograms and run_scores return how many scores are NaN,
  // infinite or negative, select_words how many have the threshold's key.
  int64_t (*digit_histogram)(const uint32_t* scores, int64_t count, int shift, int bits, uint32_t prefix,
                             uint32_t* tables);
  int64_t (*bracket_histogram)(const uint32_t* scores, int64_t count, uint32_t low, uint32_t high, int shift,
                               uint32_t* table, int64_t* above);
  int64_t (*select_words)(const uint32_t* scores, int64_t count, int32_t threshold, bool largest, uint32_t* words);
  void (*take_ties)(const uint32_t* scores, int64_t count, int32_t threshold, int64_t quota, uint32_t* words);
  int64_t (*run_scores)(const uint32_t* scores, int64_t count, int64_t granularity, float* runs);
  // Sums of units of 4096 elements, each written in the unit's own place: of all squared gradients, and of
  // those that count after the masks where there is room for them (`after_mask`, else null). `words`: the
  // fixed mask, or null.
  void (*gradient_norm_row)(const PlanRow& row, const PlanGroup& group, const uint32_t* words, int64_t first,
                            int64_t last, double* every, double* after_mask);
  double (*unit_sum)(const double* values, int64_t count);  // of 4096 values at most
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
