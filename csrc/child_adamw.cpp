// Op child_adamw: the launch, and the factor that all elements of a step share (SPEC.md, eq. 20). One call serves
// every row; the work is cut into units and shared by torch's own threads.
#include <cmath>

#include "launch.h"
#include "units.h"

namespace childtune {
namespace {

constexpr int64_t kGrain = 4;  // units below which a second thread costs more than it brings

// Eq. 20.
struct Verdict {
  double factor = 1.0;  // q * kappa
  double norm = 0.0;
  bool skipped = false;
};

Verdict verdict_of(const PlanGroup& group, const double* sums, const float* grad_scale, const float* found_inf) {
  Verdict verdict;
  const double inverse = 1.0 / (grad_scale == nullptr ? 1.0 : double(*grad_scale));
  verdict.norm = std::sqrt(sums == nullptr ? 0.0 : sums[0]) * inverse;
  double clipped = 1.0;
  if (group.max_grad_norm != 0.0) {
    const double share = group.max_grad_norm / (verdict.norm + 1e-6);
    clipped = share >= 1.0 ? 1.0 : share;  // a NaN stays one
  }
  verdict.factor = inverse * clipped;
  const bool nonfinite = group.skip_nonfinite != 0.0 && sums != nullptr && !std::isfinite(sums[1]);
  verdict.skipped = nonfinite || (found_inf != nullptr && *found_inf != 0.0f);
  return verdict;
}

template <class Number>
const Number* numbers_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const Number*>(tensor->data_ptr()) : nullptr;
}

}  // namespace

void child_adamw_(Tensor rows, Tensor groups, std::optional<Tensor> sums, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf, std::optional<Tensor> outcome, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == kRowColumns && groups.dim() == 2 &&
                      groups.size(1) == kGroupColumns,
                  "child_adamw_: a plan of another layout; rebuild the extension");
  const PlanRow* const row = static_cast<const PlanRow*>(rows.data_ptr());
  const PlanGroup* const group = static_cast<const PlanGroup*>(groups.data_ptr());

  Verdict verdict;
  if (outcome.has_value() && groups.size(0) > 0) {
    verdict = verdict_of(group[0], numbers_of<double>(sums), numbers_of<float>(grad_scale), numbers_of<float>(found_inf));
    double* const written = static_cast<double*>(outcome->data_ptr());
    written[0] = verdict.norm;
    written[1] = verdict.skipped;
    if (verdict.skipped) return;
  }

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
    kernels.child_adamw_row(current, group[current.group], verdict.factor, first, last);
  });
}

}  // namespace childtune
