// What the launches share: torch's stable interface and the choice of kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "kernels.h"

namespace childtune {

using torch::stable::Tensor;

inline const Kernels& require_kernels(int64_t capability) {
  const Kernels* const kernels = kernels_of(capability);
  STD_TORCH_CHECK(kernels != nullptr, "this processor or build lacks CPU capability ", capability);
  return *kernels;
}

void child_adamw_(Tensor rows, Tensor groups, std::optional<Tensor> sums, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf, std::optional<Tensor> outcome, int64_t capability);
void keep_words_(Tensor words, int64_t numel, Tensor element_map, bool contiguous, int64_t key, int64_t step,
                 int64_t purpose, int64_t threshold, int64_t capability);
void pack_mask_(Tensor mask, Tensor words, int64_t capability);
void unpack_mask_(Tensor words, Tensor mask, int64_t capability);
int64_t count_mask(Tensor words, int64_t capability);
void mask_ranks_(Tensor words, int64_t unit, Tensor ranks, int64_t capability);
void mask_indices_(Tensor words, Tensor ranks, int64_t unit, Tensor indices, int64_t size, int64_t capability);
void move_masked_(Tensor words, Tensor ranks, int64_t unit, Tensor values, Tensor child, int64_t size, bool gather,
                  int64_t capability);
void fisher_accumulate_(std::vector<Tensor> sums, std::vector<Tensor> gradients, double scale, int64_t capability);
void digit_histogram_(std::vector<Tensor> scores, int64_t shift, int64_t bits, int64_t prefix, Tensor counts,
                      Tensor refused, int64_t capability);
void bracket_histogram_(std::vector<Tensor> scores, int64_t low, int64_t high, int64_t shift, Tensor counts,
                        Tensor above, Tensor refused, int64_t capability);
void select_words_(std::vector<Tensor> scores, int64_t threshold, bool largest, int64_t unit,
                   std::vector<Tensor> words, Tensor ties, int64_t capability);
void take_ties_(std::vector<Tensor> scores, int64_t threshold, Tensor quotas, int64_t unit, std::vector<Tensor> words,
                int64_t capability);
void run_scores_(std::vector<Tensor> scores, int64_t granularity, std::vector<Tensor> runs, Tensor refused,
                 int64_t capability);
void gradient_norm_(Tensor rows, Tensor groups, Tensor words, bool after_mask, Tensor sums, int64_t capability);
int64_t watch_handles(std::vector<Tensor> tensors);

}  // namespace childtune
