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

// Where weight and gradient lie: in memory that is walked through, or where no prefetch can help,
// in a buffer or a short stretch.
enum Source { kStream, kNear };

// The vector of a block that begins at its element `at`. `child` says which elements of the block may
// change, `keep` (within child) whose gradient counts. `kWhole` promises that every bit of `child` is
// set, which spares the reads of selected stores.
template <bool kWhole, Source kSource = kStream, class Weight, class Grad, class Real>
CHILDTUNE_INLINE void update_vector(const Block<Weight, Grad>& block, int at, uint64_t child, uint64_t keep,
                                    const AdamWScalars<Real>& scalars) {
  typedef typename VecOf<Real>::type Vec;
  Real* const master = block.master_at(at);
  if constexpr (kSource == kStream) {
    prefetch_ahead<true>(block.weight + at);
    prefetch_ahead<false>(block.grad + at);
  }
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

// The 64 mask bits from local element `local` on, a multiple of 64; past the end they are zero.
CHILDTUNE_INLINE uint64_t child_bits(const uint32_t* words, int64_t local, int64_t numel) {
  if (words == nullptr) return ~uint64_t(0);
  const int64_t word = local / 32;
  uint64_t bits = words[word];
  if (local + 32 < numel) bits |= uint64_t(words[word + 1]) << 32;
  return bits;
}
