// Op child_adamw: one AdamW step (SPEC.md, eq. 8 to 12) of neighbouring elements, wherever they lie: in
// the tensors themselves, or in buffers to which a child's elements were gathered.

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

// The vector of a block that begins at its element `at`. `child` says which of its lanes may change,
// `keep` (within child) whose gradient counts. `kWhole` promises that every bit of `child` is set,
// which spares the reads of selected stores. No line is asked for ahead: measured on Zen 4, two cores and
// 32M fp32, prefetches 2 KiB ahead take a step from 8.8 to 11.3 ms, because the processor's own prefetch
// is then misled (256 bytes ahead: 9.6 ms).
template <bool kWhole, class Weight, class Grad, class Real>
CHILDTUNE_INLINE void update_vector(const Block<Weight, Grad>& block, int at, uint64_t child, uint64_t keep,
                                    const AdamWScalars<Real>& scalars) {
  typedef typename VecOf<Real>::type Vec;
  Real* const master = block.master_at(at);
  Vec exp_avg = load<Vec>(block.exp_avg + at);
  Vec exp_avg_sq = load<Vec>(block.exp_avg_sq + at);
  const Vec update = moments_and_update(load_as(block.grad + at, Vec()), exp_avg, exp_avg_sq, keep, scalars);
  const Vec weight = updated(current_weight(block.weight + at, master), update, scalars);
  if constexpr (kWhole) {
    store_as(block.weight + at, weight);
    store(block.exp_avg + at, exp_avg);
    store(block.exp_avg_sq + at, exp_avg_sq);
    if (master != nullptr) store(master, weight);
  } else {
    store_selected(block.weight + at, weight, child);
    store_selected(block.exp_avg + at, exp_avg, child);
    store_selected(block.exp_avg_sq + at, exp_avg_sq, child);
    if (master != nullptr) store_selected(master, weight, child);
  }
}

template <bool kWhole, class Weight, class Grad, class Real>
CHILDTUNE_INLINE void update_block(const Block<Weight, Grad>& block, uint64_t child, uint64_t keep,
                                   const AdamWScalars<Real>& scalars) {
#pragma GCC unroll 1
  for (int at = 0; at < kBlock; at += kVectorBytes / int(sizeof(Real)))
    update_vector<kWhole>(block, at, child >> at, keep >> at, scalars);
}

constexpr int kStretchBlocks = 2;

// Two blocks of the child of all elements, and the keep bits of the two blocks from element `next` on, in
// place of theirs. Philox multiplies and shuffles while square roots and divisions, of which a
// processor starts one in many cycles, are under way. Measured in cache on Zen 4, cycles for 16 elements: 17
// without Philox; with it 35 if blocks are drawn one by one, 31 if two draws go side by side, where the four
// pipes together could do it in 23. With 16 registers there is nothing to gain: the draws' are spilled.
template <class Weight, class Grad, class Real>
CHILDTUNE_INLINE void update_stretch_and_draw(const Block<Weight, Grad>& stretch, uint64_t keep[kStretchBlocks],
                                              const RowStep<Real>& step, uint64_t next) {
  constexpr int kLanes = kVectorBytes / int(sizeof(Real));
  constexpr int kDrawn = 2 * kDrawElements, kVectors = kDrawn / kLanes;
  constexpr uint64_t kAll = ~uint64_t(0);
  uint64_t next_bits[kStretchBlocks] = {};
  for (int start = 0; start < kStretchBlocks * kBlock; start += kDrawn) {
    const int second = start + kDrawElements;
    PhiloxDraw draw = draw_begin(step.stream, next + uint64_t(start));
    PhiloxDraw other = draw_begin(step.stream, next + uint64_t(second));
#pragma GCC unroll 16
    for (int vector = 0; vector < kVectors; ++vector) {
      constexpr int kRounds = kPhiloxRounds - 2;
      const int first_round = 2 + kRounds * vector / kVectors, last_round = 2 + kRounds * (vector + 1) / kVectors;
      draw_rounds(step.stream, first_round, last_round, draw);
      draw_rounds(step.stream, first_round, last_round, other);
      const int at = start + vector * kLanes;
      update_vector<true>(stretch, at, kAll, keep[at / kBlock] >> (at % kBlock), step.scalars);
    }
    next_bits[start / kBlock] |= draw_end(draw, step.threshold) << (start % kBlock);
    next_bits[second / kBlock] |= draw_end(other, step.threshold) << (second % kBlock);
  }
  for (int block = 0; block < kStretchBlocks; ++block) keep[block] = next_bits[block];
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

// The 64 mask bits from local element `local` on, a multiple of 64; past the end they are zero.
CHILDTUNE_INLINE uint64_t child_bits(const uint32_t* words, int64_t local, int64_t numel) {
  if (words == nullptr) return ~uint64_t(0);
  const int64_t word = local / 32;
  uint64_t bits = words[word];
  if (local + 32 < numel) bits |= uint64_t(words[word + 1]) << 32;
  return bits;
}
