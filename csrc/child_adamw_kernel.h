// Op child_adamw: one AdamW step of child networks (SPEC.md, eq. 1 to 12), for a share of one row of a
// plan. With dense state a block of 64 elements is the unit: its keep bits are one 64-bit word, and
// tails and strided tensors are copied through a padded block of their own, so that every element
// meets the same vector code wherever it lies. Compact state: child_adamw_compact.h and its layouts.

template <class Weight, class Grad, class Real>
CHILDTUNE_INLINE void run_block(const Block<Weight, Grad>& block, uint64_t child, uint64_t keep,
                                const RowStep<Real>& step) {
  constexpr uint64_t kAll = ~uint64_t(0);
  if (child == kAll) {
    update_block<true>(block, child, keep, step.scalars);
    return;
  }
  if (child != 0) update_block<false>(block, child, keep, step.scalars);
  if (!step.freeze && step.scalars.decays()) decay_block(block, ~child, step.scalars);
}

template <class Real>
CHILDTUNE_INLINE uint64_t keep_bits(const PlanRow& row, const RowStep<Real>& step, int64_t local, int count) {
  if (!step.bernoulli) return ~uint64_t(0);
  if (row.element_contiguous)
    return keep_bits_from(step.stream, uint64_t(row.element_map.base + local), step.threshold);
  return keep_bits_mapped(step.stream, row.element_map, local, count, step.threshold);
}

// A tail or strided block: gathered into padded arrays, updated there, written back.
template <class Weight, class Grad, class Real>
__attribute__((noinline)) void run_gathered_block(const PlanRow& row, const RowStep<Real>& step, int64_t local,
                                                  int count, uint64_t child, uint64_t keep) {
  Weight weight[kBlock] = {};
  Grad grad[kBlock] = {};
  Real exp_avg[kBlock] = {}, exp_avg_sq[kBlock] = {}, master[kBlock] = {};
  int64_t place[kBlock];
  Weight* const weights = reinterpret_cast<Weight*>(row.weight);
  const Grad* const grads = reinterpret_cast<const Grad*>(row.grad);
  Real* const state1 = reinterpret_cast<Real*>(row.exp_avg) + local;
  Real* const state2 = reinterpret_cast<Real*>(row.exp_avg_sq) + local;
  Real* const masters = row.master_weight ? reinterpret_cast<Real*>(row.master_weight) + local : nullptr;
  const size_t bytes = size_t(count) * sizeof(Real);
  for (int at = 0; at < count; ++at) {
    int64_t run;
    place[at] = row.storage_contiguous ? local + at : map_index(row.storage_map, local + at, &run);
    weight[at] = weights[place[at]];
    grad[at] = grads[place[at]];
  }
  __builtin_memcpy(exp_avg, state1, bytes);
  __builtin_memcpy(exp_avg_sq, state2, bytes);
  if (masters != nullptr) __builtin_memcpy(master, masters, bytes);
  const Block<Weight, Grad> block = {weight, grad, exp_avg, exp_avg_sq, masters ? master : nullptr};
  run_block(block, child, keep, step);
  for (int at = 0; at < count; ++at) weights[place[at]] = weight[at];
  __builtin_memcpy(state1, exp_avg, bytes);
  __builtin_memcpy(state2, exp_avg_sq, bytes);
  if (masters != nullptr) __builtin_memcpy(masters, master, bytes);
}

template <class Weight, class Grad, class Real>
CHILDTUNE_INLINE Block<Weight, Grad> block_at(const PlanRow& row, const RowStep<Real>&, int64_t local) {
  return {
      reinterpret_cast<Weight*>(row.weight) + local,
      reinterpret_cast<const Grad*>(row.grad) + local,
      reinterpret_cast<Real*>(row.exp_avg) + local,
      reinterpret_cast<Real*>(row.exp_avg_sq) + local,
      row.master_weight ? reinterpret_cast<Real*>(row.master_weight) + local : nullptr,
  };
}

// Whole blocks, two at a time, of a contiguous tensor without a fixed mask whose elements begin at a block's
// start. Returns the first block that is left.
// Not inlined, with a step of its own: the scalars stay in registers (35 to 31 cycles for 16 elements), and
// the compiler does not derive its flags anew for every vector.
template <class Weight, class Grad, class Real>
__attribute__((noinline)) int64_t run_bernoulli_blocks(const PlanRow& row, const RowStep<Real>& shared,
                                                       int64_t first_block, int64_t last_block) {
  const RowStep<Real> step = shared;
  uint64_t element = uint64_t(row.element_map.base + first_block * kBlock);
  uint64_t keep[kStretchBlocks];
  for (int block = 0; block < kStretchBlocks; ++block)
    keep[block] = keep_bits_aligned(step.stream, element + uint64_t(block * kBlock), step.threshold);
  int64_t at = first_block;
  for (; at + kStretchBlocks <= last_block; at += kStretchBlocks) {
    element += kStretchBlocks * kBlock;
    update_stretch_and_draw(block_at<Weight, Grad>(row, step, at * kBlock), keep, step, element);
  }
  return at;
}

template <class Weight, class Grad, class Real>
__attribute__((noinline)) void run_blocks(const PlanRow& row, const RowStep<Real>& shared, int64_t first_block,
                                          int64_t last_block) {
  const RowStep<Real> step = shared;
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(row.mask_words);
  const bool idle_outside = step.freeze || !step.scalars.decays();
  for (int64_t at = first_block; at < last_block; ++at) {
    const int64_t local = at * kBlock;
    const int count = row.numel - local < kBlock ? int(row.numel - local) : kBlock;
    const uint64_t child = child_bits(words, local, row.numel);
    if (child == 0 && idle_outside) continue;
    const uint64_t keep = child == 0 ? 0 : keep_bits(row, step, local, count);
    if (count < kBlock || !row.storage_contiguous) {
      run_gathered_block<Weight, Grad>(row, step, local, count, child, keep);
    } else {
      run_block(block_at<Weight, Grad>(row, step, local), child, keep, step);
    }
  }
}

template <class Weight, class Grad, class Real>
void run_dense_units(const PlanRow& row, const RowStep<Real>& step, int64_t first_unit, int64_t last_unit) {
  const int64_t blocks = (row.numel + kBlock - 1) / kBlock, whole_blocks = row.numel / kBlock;
  constexpr int64_t kUnitBlocks = kDenseUnit / kBlock;
  int64_t first_block = first_unit * kUnitBlocks;
  const int64_t last_block = last_unit * kUnitBlocks < blocks ? last_unit * kUnitBlocks : blocks;
  const bool aligned = row.element_contiguous && row.storage_contiguous && row.element_map.base % kBlock == 0;
  if (kManyRegisters && step.bernoulli && aligned && row.mask_words == 0) {
    const int64_t end = last_block < whole_blocks ? last_block : whole_blocks;
    if (first_block + kStretchBlocks <= end)
      first_block = run_bernoulli_blocks<Weight, Grad>(row, step, first_block, end);
  }
  run_blocks<Weight, Grad>(row, step, first_block, last_block);
}

template <class Weight, class Grad, class Real>
void run_compact_units(const PlanRow& row, const RowStep<Real>& step, int64_t first_unit, int64_t last_unit) {
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    switch (row.child_layout) {
      case kWords: run_words_unit<Weight, Grad>(row, step, unit); break;
      case kIndices: run_indices_unit<Weight, Grad>(row, step, unit); break;
      case kRuns: run_runs_unit<Weight, Grad>(row, step, unit); break;
    }
  }
}

template <class Weight, class Grad>
void run_row(const PlanRow& row, const PlanGroup& group, int64_t first_unit, int64_t last_unit) {
  typedef typename ComputeOf<Weight>::type Real;
  const uint64_t step_count = uint64_t(*reinterpret_cast<const int64_t*>(row.step));
  RowStep<Real> step;
  step.scalars = adamw_scalars<Real>(group, step_count);
  step.bernoulli = group.threshold < double(kKeepAll);
  step.threshold = step.bernoulli ? uint32_t(group.threshold) : 0;
  step.freeze = group.freeze_non_child != 0;
  if (step.bernoulli) step.stream = philox_stream(uint64_t(row.philox_key), step_count, 0);
  if (row.child_layout == kDense) return run_dense_units<Weight, Grad>(row, step, first_unit, last_unit);
  run_compact_units<Weight, Grad>(row, step, first_unit, last_unit);
}

// The entry of this capability: units first_unit .. last_unit-1 of one row (plan_row.h, units_of).
void child_adamw_row(const PlanRow& row, const PlanGroup& group, int64_t first_unit, int64_t last_unit) {
  const bool same = row.grad_dtype == row.weight_dtype;
  switch (row.weight_dtype) {
    case kFloat32: return run_row<float, float>(row, group, first_unit, last_unit);
    case kFloat64: return run_row<double, double>(row, group, first_unit, last_unit);
    case kBFloat16:
      return same ? run_row<BFloat16, BFloat16>(row, group, first_unit, last_unit)
                  : run_row<BFloat16, float>(row, group, first_unit, last_unit);
    case kFloat16:
      return same ? run_row<Float16, Float16>(row, group, first_unit, last_unit)
                  : run_row<Float16, float>(row, group, first_unit, last_unit);
  }
}
