// Schemas and bindings; no maths. Arguments are checked in childtune_kernels/ops/.
#include "observe.h"  // Python's header comes first

#include <string>

#include "launch.h"

namespace childtune {

bool has_capability(int64_t capability) { return kernels_of(capability) != nullptr; }
std::string row_fields() { return kRowFields; }
std::string group_fields() { return kGroupFields; }

}  // namespace childtune

STABLE_TORCH_LIBRARY(childtune_kernels, m) {
  m.def(
      "child_adamw_(Tensor rows, Tensor groups, Tensor? sums, Tensor? grad_scale, Tensor? found_inf, "
      "Tensor(a!)? outcome, int capability) -> ()");
  m.def(
      "keep_words_(Tensor(a!) words, int numel, Tensor element_map, bool contiguous, int key, int step, int purpose, "
      "int threshold, int capability) -> ()");
  m.def("pack_mask_(Tensor mask, Tensor(a!) words, int capability) -> ()");
  m.def("unpack_mask_(Tensor words, Tensor(a!) mask, int capability) -> ()");
  m.def("count_mask(Tensor words, int capability) -> int");
  m.def("mask_ranks_(Tensor words, int unit, Tensor(a!) ranks, int capability) -> ()");
  m.def(
      "mask_indices_(Tensor words, Tensor ranks, int unit, Tensor(a!) indices, int size, int capability) -> ()");
  m.def(
      "move_masked_(Tensor words, Tensor ranks, int unit, Tensor(a!) values, Tensor(b!) child, int size, bool gather, "
      "int capability) -> ()");
  m.def("fisher_accumulate_(Tensor(a!)[] sums, Tensor[] gradients, float scale, int capability) -> ()");
  m.def(
      "digit_histogram_(Tensor[] scores, int shift, int bits, int prefix, Tensor(a!) counts, Tensor(b!) refused, "
      "int capability) -> ()");
  m.def(
      "bracket_histogram_(Tensor[] scores, int low, int high, int shift, Tensor(a!) counts, Tensor(b!) above, "
      "Tensor(c!) refused, int capability) -> ()");
  m.def(
      "select_words_(Tensor[] scores, int threshold, bool largest, int unit, Tensor(a!)[] words, Tensor(b!) ties, "
      "int capability) -> ()");
  m.def(
      "take_ties_(Tensor[] scores, int threshold, Tensor quotas, int unit, Tensor(a!)[] words, int capability) -> ()");
  m.def(
      "run_scores_(Tensor[] scores, int granularity, Tensor(a!)[] runs, Tensor(b!) refused, int capability) -> ()");
  m.def(
      "gradient_norm_(Tensor rows, Tensor groups, Tensor words, bool after_mask, Tensor(a!) sums, int capability) -> ()");
  m.def("watch_handles(Tensor[] tensors) -> int");
  m.def("has_capability(int capability) -> bool");
  m.def("row_fields() -> str");
  m.def("group_fields() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(childtune_kernels, CPU, m) {
  m.impl("child_adamw_", TORCH_BOX(&childtune::child_adamw_));
  m.impl("keep_words_", TORCH_BOX(&childtune::keep_words_));
  m.impl("pack_mask_", TORCH_BOX(&childtune::pack_mask_));
  m.impl("unpack_mask_", TORCH_BOX(&childtune::unpack_mask_));
  m.impl("count_mask", TORCH_BOX(&childtune::count_mask));
  m.impl("mask_ranks_", TORCH_BOX(&childtune::mask_ranks_));
  m.impl("mask_indices_", TORCH_BOX(&childtune::mask_indices_));
  m.impl("move_masked_", TORCH_BOX(&childtune::move_masked_));
  m.impl("fisher_accumulate_", TORCH_BOX(&childtune::fisher_accumulate_));
  m.impl("digit_histogram_", TORCH_BOX(&childtune::digit_histogram_));
  m.impl("bracket_histogram_", TORCH_BOX(&childtune::bracket_histogram_));
  m.impl("select_words_", TORCH_BOX(&childtune::select_words_));
  m.impl("take_ties_", TORCH_BOX(&childtune::take_ties_));
  m.impl("run_scores_", TORCH_BOX(&childtune::run_scores_));
  m.impl("gradient_norm_", TORCH_BOX(&childtune::gradient_norm_));
}

STABLE_TORCH_LIBRARY_IMPL(childtune_kernels, CompositeExplicitAutograd, m) {
  m.impl("watch_handles", TORCH_BOX(&childtune::watch_handles));
  m.impl("has_capability", TORCH_BOX(&childtune::has_capability));
  m.impl("row_fields", TORCH_BOX(&childtune::row_fields));
  m.impl("group_fields", TORCH_BOX(&childtune::group_fields));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, childtune::observe_methods};
  return childtune::prepare_observe() ? PyModule_Create(&definition) : nullptr;
}
