// How the work on many tensors is shared by threads: each tensor is cut into units of whole blocks, and
// the units of all tensors stand in one line.
#pragma once

#include <vector>

#include "launch.h"

namespace childtune {

constexpr int64_t kBlock = 64;
constexpr int64_t kUnitBlocks = 64;  // 4096 elements

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t units_of(int64_t numel) { return ceil_div(numel, kBlock * kUnitBlocks); }

// Calls run(at, first, last) on torch's own threads, so that units first .. last-1 of every tensor `at` are
// run once. `first_unit` holds where each tensor's units begin in the line, and then the line's length.
template <class Run>
void for_units(const std::vector<int64_t>& first_unit, int64_t grain, const Run& run) {
  torch::stable::parallel_for(0, first_unit.back(), grain, [&](int64_t begin, int64_t end) {
    size_t at = 0;
    for (size_t low = 0, high = first_unit.size() - 1; low < high;) {
      const size_t middle = (low + high) / 2;
      if (first_unit[middle + 1] <= begin) {
        low = at = middle + 1;
      } else {
        high = middle;
      }
    }
    for (int64_t unit = begin; unit < end; ++at) {
      const int64_t stop = end < first_unit[at + 1] ? end : first_unit[at + 1];
      if (unit < stop) run(at, unit - first_unit[at], stop - first_unit[at]);
      unit = stop;
    }
  });
}

}  // namespace childtune
