// Op gradient_norm: the launch. One call serves every row; their units are shared by torch's own threads, and
// the sums of all units, one in 4096 elements, are summed again by one of them.
#include "launch.h"
#include "units.h"

namespace childtune {
namespace {

constexpr int64_t kGrain = 8;  // units below which a second thread costs more than it brings
constexpr int64_t kUnit = kBlock * kUnitBlocks;

// Eq. 19: the sums of units are a sequence again, until one number is left.
double total_of(std::vector<double> sums, const Kernels& kernels) {
  while (sums.size() > 1) {
    const int64_t count = int64_t(sums.size());
    std::vector<double> again;
    again.reserve(size_t(units_of(count)));
    for (int64_t at = 0; at < count; at += kUnit)
      again.push_back(kernels.unit_sum(sums.data() + at, count - at < kUnit ? count - at : kUnit));
    sums.swap(again);
  }
  return sums.empty() ? 0.0 : sums[0];
}

}  // namespace

void gradient_norm_(Tensor rows, Tensor groups, Tensor words, bool after_mask, Tensor sums, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == kRowColumns && groups.dim() == 2 &&
                      groups.size(1) == kGroupColumns,
                  "gradient_norm_: a plan of another layout; rebuild the extension");
  STD_TORCH_CHECK((!after_mask || words.numel() == rows.size(0)) && sums.numel() == 2,
                  "gradient_norm_: an address of mask words for every row, and room for two sums");
  const PlanRow* const row = static_cast<const PlanRow*>(rows.data_ptr());
  const PlanGroup* const group = static_cast<const PlanGroup*>(groups.data_ptr());
  const int64_t* const masks = after_mask ? static_cast<const int64_t*>(words.data_ptr()) : nullptr;

  // Rows without a gradient have units as well, whose sums stay +0.
  struct Part {
    int64_t row;
    int64_t place;  // of its first unit's sum
  };
  std::vector<Part> active;
  std::vector<int64_t> first_unit{0};
  int64_t count = 0;
  for (int64_t index = 0; index < rows.size(0); ++index) {
    const int64_t units = units_of(row[index].numel);
    if (row[index].active && units != 0) {
      active.push_back({index, count});
      first_unit.push_back(first_unit.back() + units);
    }
    count += units;
  }
  std::vector<double> every(size_t(count), 0.0), counting(after_mask ? size_t(count) : 0, 0.0);
  for_units(first_unit, kGrain, [&](size_t at, int64_t first, int64_t last) {
    const Part part = active[at];
    const PlanRow& current = row[part.row];
    kernels.gradient_norm_row(current, group[current.group],
                              reinterpret_cast<const uint32_t*>(after_mask ? masks[part.row] : 0), first, last,
                              every.data() + part.place, after_mask ? counting.data() + part.place : nullptr);
  });

  double* const result = static_cast<double*>(sums.data_ptr());
  result[1] = total_of(std::move(every), kernels);
  result[0] = after_mask ? total_of(std::move(counting), kernels) : result[1];
}

}  // namespace childtune
