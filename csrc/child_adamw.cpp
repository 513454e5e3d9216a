// Op child_adamw: the launch. One call serves every row; the work is cut into units and shared by torch's
// own threads.
#include "launch.h"
#include "units.h"

namespace childtune {
namespace {

constexpr int64_t kGrain = 4;  // units below which a second thread costs more than it brings

}  // namespace

void child_adamw_(Tensor rows, Tensor groups, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == kRowColumns && groups.dim() == 2 &&
                      groups.size(1) == kGroupColumns,
                  "child_adamw_: a plan of another layout; rebuild the extension");
  const PlanRow* const row = static_cast<const PlanRow*>(rows.data_ptr());
  const PlanGroup* const group = static_cast<const PlanGroup*>(groups.data_ptr());

  // first_unit[k] .. first_unit[k+1]-1 are the units of the k-th active row.
  std::vector<int64_t> active, first_unit{0};
  for (int64_t index = 0; index < rows.size(0); ++index) {
    if (!row[index].active) continue;
    ++*reinterpret_cast<int64_t*>(row[index].step);
    if (row[index].numel == 0) continue;
    active.push_back(index);
    first_unit.push_back(first_unit.back() + units_of(row[index]));
  }

  for_units(first_unit, kGrain, [&](size_t at, int64_t first, int64_t last) {
    const PlanRow& current = row[active[at]];
    kernels.child_adamw_row(current, group[current.group], first, last);
  });
}

}  // namespace childtune
