// Op child_adamw: one AdamW step of child networks (SPEC.md, eq. 1 to 12), for a share of the rows
// of a plan. A block of 64 elements is the unit: its keep bits are one 64-bit word, and tails and
// strided tensors are copied through a padded block of their own, so that every element meets the
// same vector code wherever it lies.

template <class Weight>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};

template <class Weight, class Grad>
struct Block {
  typedef typename ComputeOf<Weight>::type Real;
  Weight* weight;
  const Grad* grad;
  Real* exp_avg;
  Real* exp_avg_sq;
  Real* master;  // null where the weight itself is the master

  // Only a 16-bit weight can have a master; the test vanishes from the code of the others.
  CHILDTUNE_INLINE Real* master_at(int at) const {
    if constexpr (sizeof(Weight) == sizeof(Real)) return nullptr;
    return master == nullptr ? nullptr : master + at;
  }
};

// What the elements of one row share within one step.
template <class Real>
struct RowStep {
  AdamWScalars<Real> scalars;
  PhiloxStream stream;
  uint32_t threshold;
  bool bernoulli;
  bool freeze;
};

// Eq. 12: the master weight, or the stored weight where somebody else has written it since.
template <class Half>
CHILDTUNE_INLINE VecF32 current_weight(const Half* weight, const float* master) {
  const VecF32 stored = load_as(weight, VecF32());
  if (master == nullptr) return stored;
  const VecF32 exact = load<VecF32>(master);
  const VecU32 shown = __builtin_convertvector(rounded(exact, Half()), VecU32);
  const VecU32 found = __builtin_convertvector(load<HalfU16>(weight), VecU32);
  const VecU32 same = (VecU32)(shown == found);
  return (VecF32)(((VecU32)exact & same) | ((VecU32)stored & ~same));
}
CHILDTUNE_INLINE VecF32 current_weight(const float* weight, const float*) { return load<VecF32>(weight); }
CHILDTUNE_INLINE VecF64 current_weight(const double* weight, const double*) { return load<VecF64>(weight); }

// The vector of a block that begins at its element `at`. `child` says which elements of the block may
// change, `keep` (within child) whose gradient counts. `kWhole` promises that every bit of `child` is
// set, which spares the reads of selected stores.
template <bool kWhole, class Weight, class Grad, class Real>
CHILDTUNE_INLINE void update_vector(const Block<Weight, Grad>& block, int at, uint64_t child, uint64_t keep,
                                    const AdamWScalars<Real>& scalars) {
  typedef typename VecOf<Real>::type Vec;
  Real* const master = block.master_at(at);
  prefetch_ahead<true>(block.weight + at);
  prefetch_ahead<false>(block.grad + at);
  prefetch_ahead<true>(block.exp_avg + at);
  prefetch_ahead<true>(block.exp_avg_sq + at);
  if (master != nullptr) prefetch_ahead<true>(master);
  Vec weight = current_weight(block.weight + at, master);
  Vec exp_avg = load<Vec>(block.exp_avg + at);
  Vec exp_avg_sq = load<Vec>(block.exp_avg_sq + at);
  adamw_vector(weight, load_as(block.grad + at, Vec()), exp_avg, exp_avg_sq, keep >> at, scalars);
  if constexpr (kWhole && sizeof(Weight) == sizeof(Real)) {
    store(block.weight + at, weight);
  } else {
    store_selected(block.weight + at, weight, child >> at);
  }
  if constexpr (kWhole) {
    store(block.exp_avg + at, exp_avg);
    store(block.exp_avg_sq + at, exp_avg_sq);
    if (master != nullptr) store(master, weight);
  } else {
    store_selected(block.exp_avg + at, exp_avg, child >> at);
    store_selected(block.exp_avg_sq + at, exp_avg_sq, child >> at);
    if (master != nullptr) store_selected(master, weight, child >> at);
  }
}

template <bool kWhole, class Weight, class Grad, class Real>
CHILDTUNE_INLINE void update_block(const Block<Weight, Grad>& block, uint64_t child, uint64_t keep,
                                   const AdamWScalars<Real>& scalars) {
#pragma GCC unroll 1
  for (int at = 0; at < kBlock; at += kVectorBytes / int(sizeof(Real)))
    update_vector<kWhole>(block, at, child, keep, scalars);
}

// One block of the child of all elements, and the keep bits of the 64 elements from `next` on. Philox
// multiplies while square roots and divisions, of which a processor starts one in many cycles, are
// under way: two rounds, then a quarter of the vectors that a draw covers, four times. Measured in cache on
// Zen 4, one thread: a block takes 77 ns where update and draw, one after the other, take 58 + 64. With
// 16 registers there is nothing to gain: the draw's eight are spilled (AVX2: 148 against 63 + 76).
template <class Weight, class Grad, class Real>
CHILDTUNE_INLINE uint64_t update_block_and_draw(const Block<Weight, Grad>& block, uint64_t keep,
                                                const RowStep<Real>& step, uint64_t next) {
  constexpr int kLanes = kVectorBytes / int(sizeof(Real));
  constexpr int kQuarter = kDrawElements / 4;
  static_assert(kQuarter % kLanes == 0 && kPhiloxRounds == 2 + 4 * 2, "a draw spans four quarters");
  constexpr uint64_t kAll = ~uint64_t(0);
  uint64_t next_bits = 0;
  for (int start = 0; start < kBlock; start += kDrawElements) {
    PhiloxDraw draw = draw_begin(step.stream, next + uint64_t(start));
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
      draw_rounds(step.stream, 2 + 2 * quarter, 4 + 2 * quarter, draw);
      for (int at = 0; at < kQuarter; at += kLanes)
        update_vector<true>(block, start + quarter * kQuarter + at, kAll, keep, step.scalars);
    }
    next_bits |= compare_words(draw.even, draw.odd, step.threshold) << start;
  }
  return next_bits;
}

// Eq. 9 alone, for the elements outside the fixed mask when it does not freeze them.
template <class Weight, class Grad, class Real>
inline void decay_block(const Block<Weight, Grad>& block, uint64_t outside, const AdamWScalars<Real>& scalars) {
  typedef typename VecOf<Real>::type Vec;
  constexpr int kLanes = kVectorBytes / int(sizeof(Real));
  for (int at = 0; at < kBlock; at += kLanes) {
    Real* const master = block.master_at(at);
    const Vec weight = decayed(current_weight(block.weight + at, master), scalars);
    store_selected(block.weight + at, weight, outside >> at);
    if (master != nullptr) store_selected(master, weight, outside >> at);
  }
}

template <class Weight, class Grad, class Real>
CHILDTUNE_INLINE void run_block(const Block<Weight, Grad>& block, uint64_t child, uint64_t keep,
                                const RowStep<Real>& step) {
  constexpr uint64_t kAll = ~uint64_t(0);
  if (child == kAll) {
    update_block<true>(block, child, keep, step.scalars);
    return;
  }
  if (child != 0) update_block<false>(block, child, keep, step.scalars);
  if (!step.freeze && step.scalars.decays) decay_block(block, ~child, step.scalars);
}

// The 64 mask bits from local element `local` on, a multiple of 64; past the end they are zero.
CHILDTUNE_INLINE uint64_t child_bits(const uint32_t* words, int64_t local, int64_t numel) {
  if (words == nullptr) return ~uint64_t(0);
  const int64_t word = local / 32;
  uint64_t bits = words[word];
  if (local + 32 < numel) bits |= uint64_t(words[word + 1]) << 32;
  return bits;
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

// Whole blocks of a contiguous tensor without a fixed mask whose elements begin at a block's start.
template <class Weight, class Grad, class Real>
void run_bernoulli_blocks(const PlanRow& row, const RowStep<Real>& step, int64_t first_block, int64_t last_block) {
  if (first_block >= last_block) return;
  uint64_t element = uint64_t(row.element_map.base + first_block * kBlock);
  uint64_t keep = keep_bits_aligned(step.stream, element, step.threshold);
  for (int64_t at = first_block; at < last_block; ++at) {
    element += kBlock;
    keep = update_block_and_draw(block_at<Weight, Grad>(row, step, at * kBlock), keep, step, element);
  }
}

template <class Weight, class Grad, class Real>
void run_blocks(const PlanRow& row, const RowStep<Real>& step, int64_t first_block, int64_t last_block) {
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(row.mask_words);
  const bool idle_outside = step.freeze || !step.scalars.decays;
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

template <class Weight, class Grad>
void run_row(const PlanRow& row, const PlanGroup& group, int64_t first_block, int64_t last_block) {
  typedef typename ComputeOf<Weight>::type Real;
  const uint64_t step_count = uint64_t(*reinterpret_cast<const int64_t*>(row.step));
  RowStep<Real> step;
  step.scalars = adamw_scalars<Real>(group, step_count);
  step.bernoulli = group.threshold < double(kKeepAll);
  step.threshold = step.bernoulli ? uint32_t(group.threshold) : 0;
  step.freeze = group.freeze_non_child != 0;
  if (step.bernoulli) step.stream = philox_stream(uint64_t(row.philox_key), step_count, 0);

  const int64_t whole_blocks = row.numel / kBlock;
  const bool aligned = row.element_contiguous && row.storage_contiguous && row.element_map.base % kBlock == 0;
  if (kManyRegisters && step.bernoulli && aligned && row.mask_words == 0) {
    const int64_t end = last_block < whole_blocks ? last_block : whole_blocks;
    run_bernoulli_blocks<Weight, Grad>(row, step, first_block, end);
    if (first_block < end) first_block = end;
  }
  run_blocks<Weight, Grad>(row, step, first_block, last_block);
}

// The entry of this capability: blocks first_block .. last_block-1 of one row.
void child_adamw_row(const PlanRow& row, const PlanGroup& group, int64_t first_block, int64_t last_block) {
  const bool same = row.grad_dtype == row.weight_dtype;
  switch (row.weight_dtype) {
    case kFloat32: return run_row<float, float>(row, group, first_block, last_block);
    case kFloat64: return run_row<double, double>(row, group, first_block, last_block);
    case kBFloat16:
      return same ? run_row<BFloat16, BFloat16>(row, group, first_block, last_block)
                  : run_row<BFloat16, float>(row, group, first_block, last_block);
    case kFloat16:
      return same ? run_row<Float16, Float16>(row, group, first_block, last_block)
                  : run_row<Float16, float>(row, group, first_block, last_block);
  }
}
