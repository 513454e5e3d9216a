// Op child_adamw: one AdamW step of child networks (SPEC.md, eq. 1 to 12, 17 and 18), for a share of one row of a
// plan. With dense state a block of 64 elements is the unit: its keep bits are one 64-bit word, and
// tails and strided tensors are copied through a padded block of their own, so that every element
// meets the same vector code wherever it lies. Compact state: child_adamw_compact.h and its layouts.

template <class T>
CHILDTUNE_INLINE void run_block(const Block<T>& block, uint64_t child, uint64_t keep,
                                const RowStep<typename T::Real>& step) {
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

// The words of a block, by which bf16 weights and moments are rounded (eq. 18).
template <class T>
struct DrawnWords {
  alignas(64) uint32_t of[3][T::kDraws ? kBlock : 1];

  CHILDTUNE_INLINE void draw(const PlanRow& row, const RowStep<typename T::Real>& step, int64_t local, int count) {
    if constexpr (T::kDrawsWeight) draw_for(0, row, step, local, count);
    if constexpr (T::kDrawsMoments) {
      draw_for(1, row, step, local, count);
      draw_for(2, row, step, local, count);
    }
  }
  CHILDTUNE_INLINE RoundingWords words() const { return {of[0], of[1], of[2]}; }

 private:
  inline void draw_for(int what, const PlanRow& row, const RowStep<typename T::Real>& step, int64_t local, int count) {
    const uint64_t first = uint64_t(row.element_map.base + local);
    if (row.element_contiguous && first % kBlock == 0) return element_words_aligned(step.rounding[what], first, of[what]);
    ElementWords drawn{step.rounding[what]};
    for (int at = 0; at < kBlock; ++at) of[what][at] = at < count ? drawn.of(element_at(row, local + at)) : 0;
  }
};

// A tail or strided block: gathered into padded arrays, updated there, written back.
template <class T>
__attribute__((noinline)) void run_gathered_block(const PlanRow& row, const RowStep<typename T::Real>& step, int64_t local,
                                                  int count, uint64_t child, uint64_t keep, RoundingWords words) {
  typename T::Weight weight[kBlock] = {};
  typename T::Grad grad[kBlock] = {};
  typename T::Moment exp_avg[kBlock] = {}, exp_avg_sq[kBlock] = {};
  typename T::Master master[kBlock] = {};
  int64_t place[kBlock];
  const Block<T> tensor = block_at<T>(row, 0, words);
  const Block<T> state = block_at<T>(row, local, words);
  const size_t moment_bytes = size_t(count) * sizeof(exp_avg[0]), master_bytes = size_t(count) * sizeof(master[0]);
  for (int at = 0; at < count; ++at) {
    int64_t run;
    place[at] = row.storage_contiguous ? local + at : map_index(row.storage_map, local + at, &run);
    weight[at] = tensor.weight[place[at]];
    grad[at] = tensor.grad[place[at]];
  }
  __builtin_memcpy(exp_avg, state.exp_avg, moment_bytes);
  __builtin_memcpy(exp_avg_sq, state.exp_avg_sq, moment_bytes);
  if (state.master != nullptr) __builtin_memcpy(master, state.master, master_bytes);
  const Block<T> block = {weight, grad, exp_avg, exp_avg_sq, state.master ? master : nullptr, words};
  run_block(block, child, keep, step);
  for (int at = 0; at < count; ++at) tensor.weight[place[at]] = weight[at];
  __builtin_memcpy(state.exp_avg, exp_avg, moment_bytes);
  __builtin_memcpy(state.exp_avg_sq, exp_avg_sq, moment_bytes);
  if (state.master != nullptr) __builtin_memcpy(state.master, master, master_bytes);
}

// Whole blocks of a contiguous tensor without a fixed mask whose elements begin at a block's start: with many
// registers two at a time, else by draws. Returns the first block that is left.
// Not inlined, with a step of its own: the scalars stay in registers (35 to 31 cycles for 16 elements), and
// the compiler does not derive its flags anew for every vector.
template <class T>
__attribute__((noinline)) int64_t run_bernoulli_blocks(const PlanRow& row, const RowStep<typename T::Real>& shared,
                                                       int64_t first_block, int64_t last_block) {
  const RowStep<typename T::Real> step = shared;
  uint64_t element = uint64_t(row.element_map.base + first_block * kBlock);
  if constexpr (!kManyRegisters) {
    uint64_t kept = keep_bits_aligned(step.stream, element, step.threshold);
    for (int64_t local = first_block * kBlock; local < last_block * kBlock; local += kDrawElements) {
      element += kDrawElements;
      kept = update_and_draw(block_at<T>(row, local, {}), kept, step, element);
    }
    return last_block;
  } else {
    uint64_t keep[kStretchBlocks];
    for (int block = 0; block < kStretchBlocks; ++block)
      keep[block] = keep_bits_aligned(step.stream, element + uint64_t(block * kBlock), step.threshold);
    int64_t at = first_block;
    for (; at + kStretchBlocks <= last_block; at += kStretchBlocks) {
      element += kStretchBlocks * kBlock;
      update_stretch_and_draw(block_at<T>(row, at * kBlock, {}), keep, step, element);
    }
    return at;
  }
}

template <class T>
__attribute__((noinline)) void run_blocks(const PlanRow& row, const RowStep<typename T::Real>& shared, int64_t first_block,
                                          int64_t last_block) {
  const RowStep<typename T::Real> step = shared;
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(row.mask_words);
  const bool idle_outside = step.freeze || !step.scalars.decays();
  DrawnWords<T> drawn;
  for (int64_t at = first_block; at < last_block; ++at) {
    const int64_t local = at * kBlock;
    const int count = row.numel - local < kBlock ? int(row.numel - local) : kBlock;
    const uint64_t child = child_bits(words, local, row.numel);
    if (child == 0 && idle_outside) continue;
    const uint64_t keep = child == 0 ? 0 : keep_bits(row, step, local, count);
    drawn.draw(row, step, local, count);
    if (count < kBlock || !row.storage_contiguous) {
      run_gathered_block<T>(row, step, local, count, child, keep, drawn.words());
    } else {
      run_block(block_at<T>(row, local, drawn.words()), child, keep, step);
    }
  }
}

template <class T>
void run_dense_units(const PlanRow& row, const RowStep<typename T::Real>& step, int64_t first_unit, int64_t last_unit) {
  const int64_t blocks = (row.numel + kBlock - 1) / kBlock, whole_blocks = row.numel / kBlock;
  constexpr int64_t kUnitBlocks = kDenseUnit / kBlock;
  int64_t first_block = first_unit * kUnitBlocks;
  const int64_t last_block = last_unit * kUnitBlocks < blocks ? last_unit * kUnitBlocks : blocks;
  const bool aligned = row.element_contiguous && row.storage_contiguous && row.element_map.base % kBlock == 0;
  if constexpr (!T::kDraws) {
    if (step.bernoulli && aligned && row.mask_words == 0) {
      const int64_t end = last_block < whole_blocks ? last_block : whole_blocks;
      if (first_block + kStretchBlocks <= end) first_block = run_bernoulli_blocks<T>(row, step, first_block, end);
    }
  }
  run_blocks<T>(row, step, first_block, last_block);
}

template <class T>
void run_compact_units(const PlanRow& row, const RowStep<typename T::Real>& step, int64_t first_unit, int64_t last_unit) {
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    switch (row.child_layout) {
      case kWords: run_words_unit<T>(row, step, unit); break;
      case kIndices: run_indices_unit<T>(row, step, unit); break;
      case kRuns: run_runs_unit<T>(row, step, unit); break;
    }
  }
}

template <class T>
void run_row(const PlanRow& row, const PlanGroup& group, double factor, int64_t first_unit, int64_t last_unit) {
  typedef typename T::Real Real;
  const uint64_t step_count = uint64_t(*reinterpret_cast<const int64_t*>(row.step));
  RowStep<Real> step;
  step.scalars = adamw_scalars<Real>(group, step_count, factor);
  step.bernoulli = group.threshold < double(kKeepAll);
  step.threshold = step.bernoulli ? uint32_t(group.threshold) : 0;
  step.freeze = group.freeze_non_child != 0;
  if (step.bernoulli) step.stream = philox_stream(uint64_t(row.philox_key), step_count, kPurposeKeep);
  if constexpr (T::kDraws) {
    for (uint32_t what = 0; what < 3; ++what)
      step.rounding[what] = philox_stream(uint64_t(row.philox_key), step_count, kPurposeWeight + what);
  }
  if (row.child_layout == kDense) return run_dense_units<T>(row, step, first_unit, last_unit);
  run_compact_units<T>(row, step, first_unit, last_unit);
}

// A row whose weights and gradients are of these types: how its moments are kept decides the rest.
template <class Weight, class Grad>
void run_row_of(const PlanRow& row, const PlanGroup& group, double factor, int64_t first_unit, int64_t last_unit) {
  if (row.moment_dtype == kBFloat16) {
    if constexpr (sizeof(typename KeptAs<Weight>::Real) == sizeof(float))
      return run_row<Types<Weight, Grad, BFloat16>>(row, group, factor, first_unit, last_unit);
  }
  run_row<Types<Weight, Grad, typename KeptAs<Weight>::Real>>(row, group, factor, first_unit, last_unit);
}

template <class Weight>
void run_half_row(const PlanRow& row, const PlanGroup& group, double factor, int64_t first_unit, int64_t last_unit) {
  if (row.grad_dtype == kFloat32) return run_row_of<Weight, float>(row, group, factor, first_unit, last_unit);
  if (row.weight_dtype == kFloat16) return run_row_of<Weight, Float16>(row, group, factor, first_unit, last_unit);
  run_row_of<Weight, BFloat16>(row, group, factor, first_unit, last_unit);
}

// The entry of this capability: units first_unit .. last_unit-1 of one row (plan_row.h, units_of).
void child_adamw_row(const PlanRow& row, const PlanGroup& group, double factor, int64_t first_unit, int64_t last_unit) {
  switch (row.weight_dtype) {
    case kFloat32: return run_row_of<float, float>(row, group, factor, first_unit, last_unit);
    case kFloat64: return run_row_of<double, double>(row, group, factor, first_unit, last_unit);
    case kFloat16: return run_half_row<Float16>(row, group, factor, first_unit, last_unit);
    case kBFloat16:
      if (row.master_kind == kSplitMaster) return run_half_row<SplitBFloat16>(row, group, factor, first_unit, last_unit);
      if (group.stochastic_rounding != 0) return run_half_row<StochasticBFloat16>(row, group, factor, first_unit, last_unit);
      return run_half_row<BFloat16>(row, group, factor, first_unit, last_unit);
  }
}
