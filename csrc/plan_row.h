// The table that one step reads: a row a tensor, a row a parameter group (SPEC.md, "The plan").
// Columns are 8 bytes each. Python fills them by name from childtune_kernels/plan_row.py, which
// compares its own lists with the ones printed here, so that a stale build is found out.
#pragma once

#include <cstdint>

namespace childtune {

constexpr int kMapLevels = 4;

// A local index to an element index or a storage offset: base + up to four (size, stride) levels,
// outermost first (SPEC.md, eq. 5).
struct IndexMap {
  int64_t base;
  struct Level {
    int64_t size;
    int64_t stride;
  } level[kMapLevels];
};

struct PlanRow {
  int64_t active;
  int64_t group;
  int64_t numel;
  int64_t weight_dtype;
  int64_t grad_dtype;
  int64_t moment_dtype;
  int64_t master_kind;
  int64_t weight;
  int64_t grad;
  int64_t exp_avg;
  int64_t exp_avg_sq;
  int64_t master;
  int64_t mask_words;
  int64_t child_layout;
  int64_t child_count;
  int64_t run_count;
  int64_t child_ranks;
  int64_t child_places;
  int64_t step;
  int64_t philox_key;
  int64_t element_contiguous;
  int64_t storage_contiguous;
  IndexMap element_map;
  IndexMap storage_map;
};

struct PlanGroup {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double reserve_p;
  double threshold;
  double freeze_non_child;
  double original_convention;
  double correct_bias;
  double maximize;
  double stochastic_rounding;
  double max_grad_norm;  // 0: no clipping
  double skip_nonfinite;
  // Of tensors from which kernels on GPUs read the option; 0 here.
  double lr_address;
  double lr_is_double;
  double weight_decay_address;
  double weight_decay_is_double;
};

constexpr int kRowColumns = sizeof(PlanRow) / 8;
constexpr int kGroupColumns = sizeof(PlanGroup) / 8;

constexpr const char* kRowFields =
    "active,group,numel,weight_dtype,grad_dtype,moment_dtype,master_kind,weight,grad,exp_avg,"
    "exp_avg_sq,master,mask_words,child_layout,child_count,run_count,child_ranks,child_places,step,"
    "philox_key,element_contiguous,storage_contiguous,element_map:9,storage_map:9";
constexpr const char* kGroupFields =
    "lr,beta1,beta2,eps,weight_decay,reserve_p,threshold,freeze_non_child,original_convention,"
    "correct_bias,maximize,stochastic_rounding,max_grad_norm,skip_nonfinite,lr_address,"
    "lr_is_double,weight_decay_address,weight_decay_is_double";

enum DtypeCode : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// What stands beside a weight: nothing, an fp32 master (SPEC.md, eq. 12) or an int16 remainder (eq. 17).
enum MasterKind : int64_t { kNoMaster = 0, kFp32Master = 1, kSplitMaster = 2 };

// How the child of a row with compact state is written down (SPEC.md, "Child layouts").
enum ChildLayout : int64_t { kDense = 0, kWords = 1, kIndices = 2, kRuns = 3 };
constexpr int64_t kWordsUnit = 1 << 12;
constexpr int64_t kIndicesUnit = 1 << 16;

struct ChildRun {
  int64_t start;
  int64_t rank;
};

// A row is cut into units, which threads share: stretches of elements or, of runs, of child elements.
constexpr int64_t kDenseUnit = 1 << 12;
constexpr int64_t kRunsUnit = 1 << 12;

inline int64_t units_of(const PlanRow& row) {
  switch (row.child_layout) {
    case kWords: return (row.numel + kWordsUnit - 1) / kWordsUnit;
    case kIndices: return (row.numel + kIndicesUnit - 1) / kIndicesUnit;
    // One unit where there is no child, for the decay of what lies outside it.
    case kRuns: return row.child_count ? (row.child_count + kRunsUnit - 1) / kRunsUnit : 1;
    default: return (row.numel + kDenseUnit - 1) / kDenseUnit;
  }
}

static_assert(sizeof(IndexMap) == 9 * 8 && sizeof(PlanRow) == (22 + 18) * 8, "8-byte columns");
static_assert(kGroupColumns == 18, "kGroupFields names every column");

}  // namespace childtune
