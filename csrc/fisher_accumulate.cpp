// Op fisher_accumulate: the launch. One call serves every tensor, whatever the strides of its gradient.
#include "launch.h"
#include "units.h"

namespace childtune {
namespace {

constexpr int64_t kGrain = 8;  // units below which a second thread costs more than it brings

int64_t dtype_code(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return kFloat32;
    case torch::headeronly::ScalarType::Double: return kFloat64;
    case torch::headeronly::ScalarType::BFloat16: return kBFloat16;
    case torch::headeronly::ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, "fisher_accumulate_: a gradient of another type");
  }
}

// Dimensions that follow one another in memory are joined.
std::vector<IndexMap::Level> levels_of(const Tensor& tensor) {
  std::vector<IndexMap::Level> levels;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (sizes[dim] == 1) continue;
    if (!levels.empty() && levels.back().stride == sizes[dim] * strides[dim]) {
      levels.back() = {levels.back().size * sizes[dim], strides[dim]};
    } else {
      levels.push_back({sizes[dim], strides[dim]});
    }
  }
  if (levels.empty()) levels.push_back({1, 1});
  return levels;
}

}  // namespace

void fisher_accumulate_(std::vector<Tensor> sums, std::vector<Tensor> gradients, double scale, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  STD_TORCH_CHECK(sums.size() == gradients.size(), "fisher_accumulate_: as many sums as gradients");
  std::vector<FisherRow> rows;
  std::vector<std::vector<IndexMap::Level>> levels;
  std::vector<int64_t> first_unit{0};
  rows.reserve(sums.size());
  levels.reserve(sums.size());
  for (size_t at = 0; at < sums.size(); ++at) {
    const int64_t numel = sums[at].numel();
    STD_TORCH_CHECK(gradients[at].numel() == numel, "fisher_accumulate_: a gradient of another size");
    if (numel == 0) continue;
    levels.push_back(levels_of(gradients[at]));
    const auto& own = levels.back();
    rows.push_back({static_cast<float*>(sums[at].data_ptr()), gradients[at].data_ptr(), numel, dtype_code(gradients[at]),
                    own.size() == 1 && own[0].stride == 1, own.data(), int(own.size())});
    first_unit.push_back(first_unit.back() + units_of(numel));
  }
  for_units(first_unit, kGrain, [&](size_t at, int64_t first, int64_t last) {
    const int64_t blocks = ceil_div(rows[at].numel, kBlock), stop = last * kUnitBlocks;
    kernels.fisher_accumulate_row(rows[at], float(scale), first * kUnitBlocks, stop < blocks ? stop : blocks);
  });
}

}  // namespace childtune
