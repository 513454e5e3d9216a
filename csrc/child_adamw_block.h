// Op child_adamw: one AdamW step (SPEC.md, eq. 8 to 12, 17 and 18) of neighbouring elements, wherever they
// lie: in the tensors themselves, or in buffers to which a child's elements were gathered.

// How weights are kept: the type that computes, what a master is made of, and whether there can be one.
template <class Weight>
struct KeptAs {
  typedef float Real;
  typedef float Master;
  static constexpr bool kMayHaveMaster = true;
};
template <>
struct KeptAs<float> {
  typedef float Real;
  typedef float Master;
  static constexpr bool kMayHaveMaster = false;
};
template <>
struct KeptAs<double> {
  typedef double Real;
  typedef double Master;
  static constexpr bool kMayHaveMaster = false;
};
template <>
struct KeptAs<SplitBFloat16> {
  typedef float Real;
  typedef uint16_t Master;  // the bits of an int16
  static constexpr bool kMayHaveMaster = true;
};
template <>
struct KeptAs<StochasticBFloat16> : KeptAs<float> {};

template <class Weight>
constexpr bool kIsStochastic = false;
template <>
constexpr bool kIsStochastic<StochasticBFloat16> = true;

// The types of one row.
template <class WeightType, class GradType, class MomentType>
struct Types {
  typedef WeightType Weight;
  typedef GradType Grad;
  typedef MomentType Moment;
  typedef typename KeptAs<Weight>::Real Real;
  typedef typename KeptAs<Weight>::Master Master;
  typedef typename VecOf<Real>::type Vec;
  static constexpr bool kMayHaveMaster = KeptAs<Weight>::kMayHaveMaster;
  static constexpr int kLanes = kVectorBytes / int(sizeof(Real));
  static constexpr bool kDrawsWeight = kIsStochastic<Weight>;
  static constexpr bool kDrawsMoments = sizeof(Moment) < sizeof(Real);
  static constexpr bool kDraws = kDrawsWeight || kDrawsMoments;
  // Weights and moments of the type that computes, which need no way of their own back into memory.
  static constexpr bool kPlain = sizeof(Weight) == sizeof(Real) && !kDraws;
};

// The words by which values are rounded, one an element; of what is not rounded so, null.
struct RoundingWords {
  const uint32_t* weight;
  const uint32_t* exp_avg;
  const uint32_t* exp_avg_sq;
};

template <class T>
struct Block {
  typename T::Weight* weight;
  const typename T::Grad* grad;
  typename T::Moment* exp_avg;
  typename T::Moment* exp_avg_sq;
  typename T::Master* master;  // null where the weight itself is the master
  RoundingWords words;

  // The test vanishes from the code of types that have none.
  CHILDTUNE_INLINE typename T::Master* master_at(int at) const {
    if constexpr (!T::kMayHaveMaster) return nullptr;
    return master == nullptr ? nullptr : master + at;
  }
};

// The block of a tensor that begins at a local index.
template <class T>
CHILDTUNE_INLINE Block<T> block_at(const PlanRow& row, int64_t local, RoundingWords words) {
  return {
      reinterpret_cast<typename T::Weight*>(row.weight) + local,
      reinterpret_cast<const typename T::Grad*>(row.grad) + local,
      reinterpret_cast<typename T::Moment*>(row.exp_avg) + local,
      reinterpret_cast<typename T::Moment*>(row.exp_avg_sq) + local,
      row.master ? reinterpret_cast<typename T::Master*>(row.master) + local : nullptr,
      words,
  };
}

// What the elements of one row share within one step.
template <class Real>
struct RowStep {
  AdamWScalars<Real> scalars;
  PhiloxStream stream;
  uint32_t threshold;
  bool bernoulli;
  bool freeze;
  PhiloxStream rounding[3];  // of weight, exp_avg, exp_avg_sq; filled for types that draw
};

// Eq. 12 and 17: the master weight, or the stored weight where somebody else has written it since.
template <class Half>
CHILDTUNE_INLINE VecF32 current_weight(const Half* weight, const float* master) {
  const VecF32 stored = load_as(weight, VecF32());
  if (master == nullptr) return stored;
  const VecF32 exact = load<VecF32>(master);
  const VecU32 same = (VecU32)(widened16(rounded(exact, Half())) == widened16(load<HalfU16>(weight)));
  return (VecF32)select_by_sign(same, (VecU32)exact, (VecU32)stored);
}
CHILDTUNE_INLINE VecF32 current_weight(const SplitBFloat16* weight, const uint16_t* remainder) {
  return joined_master(load<HalfU16>(weight), load<HalfU16>(remainder));
}
CHILDTUNE_INLINE VecF32 current_weight(const float* weight, const float*) { return load<VecF32>(weight); }
CHILDTUNE_INLINE VecF64 current_weight(const double* weight, const double*) { return load<VecF64>(weight); }

// Writes a vector of weights, and their masters, where a bit of `child` is set; `kWhole`: every bit is.
template <bool kWhole, class T>
CHILDTUNE_INLINE void store_weight(const Block<T>& block, int at, typename T::Vec value, uint64_t child) {
  typename T::Master* const master = block.master_at(at);
  if constexpr (sizeof(typename T::Master) < sizeof(typename T::Real)) {
    const VecU32 bits = canonical_bits(value);
    store_halves<kWhole>(block.weight + at, upper_of_master(bits), child);
    store_halves<kWhole>(master, lower_of_master(bits), child);
  } else if constexpr (T::kDrawsWeight) {
    store_halves<kWhole>(block.weight + at, rounded_by_words(value, block.words.weight + at), child);
  } else if constexpr (sizeof(typename T::Weight) < sizeof(typename T::Real)) {
    store_halves<kWhole>(block.weight + at, rounded(value, typename T::Weight()), child);
  } else if constexpr (kWhole) {
    store(block.weight + at, value);
  } else {
    store_selected(block.weight + at, value, child);
  }
  if constexpr (sizeof(typename T::Master) == sizeof(typename T::Real)) {
    if (master == nullptr) return;
    if constexpr (kWhole) {
      store(master, value);
    } else {
      store_selected(master, value, child);
    }
  }
}

// Writes a vector of moments in the same way; `words`: those by which bf16 ones are rounded.
template <bool kWhole, class T>
CHILDTUNE_INLINE void store_moment(typename T::Moment* target, typename T::Vec value, const uint32_t* words,
                                   uint64_t child) {
  if constexpr (T::kDrawsMoments) {
    store_halves<kWhole>(target, rounded_by_words(value, words), child);
  } else if constexpr (kWhole) {
    store(target, value);
  } else {
    store_selected(target, value, child);
  }
}

// The first half of an update, up to the square root, for the vector of a block that begins at its element `at`.
// `child` says which of its lanes may change, `keep` (within child) whose gradient counts. `kWhole` promises
// that every bit of `child` is set, which spares the reads of selected stores. No line is asked for ahead:
// measured on Zen 4, two cores and 32M fp32, prefetches 2 KiB ahead take a step from 8.8 to 11.3 ms, because the
// processor's own prefetch is then misled (256 bytes ahead: 9.6 ms).
template <bool kWhole, class T>
CHILDTUNE_INLINE Fraction<typename T::Vec> begin_vector(const Block<T>& block, int at, uint64_t child, uint64_t keep,
                                                        const AdamWScalars<typename T::Real>& scalars) {
  typedef typename T::Vec Vec;
  Vec exp_avg = load_as(block.exp_avg + at, Vec());
  Vec exp_avg_sq = load_as(block.exp_avg_sq + at, Vec());
  const Vec grad = load_as(block.grad + at, Vec());
  const Fraction<Vec> fraction = moments_and_fraction(grad, exp_avg, exp_avg_sq, keep, scalars);
  store_moment<kWhole, T>(block.exp_avg + at, exp_avg, block.words.exp_avg + at, child);
  store_moment<kWhole, T>(block.exp_avg_sq + at, exp_avg_sq, block.words.exp_avg_sq + at, child);
  return fraction;
}

// The second half: the division, and the weight.
template <bool kWhole, class T>
CHILDTUNE_INLINE void finish_vector(const Block<T>& block, int at, uint64_t child,
                                    const Fraction<typename T::Vec>& fraction,
                                    const AdamWScalars<typename T::Real>& scalars) {
  const typename T::Vec stored = current_weight(block.weight + at, block.master_at(at));
  store_weight<kWhole>(block, at, updated(stored, quotient(fraction, scalars), scalars), child);
}

template <bool kWhole, class T>
CHILDTUNE_INLINE void update_vector(const Block<T>& block, int at, uint64_t child, uint64_t keep,
                                    const AdamWScalars<typename T::Real>& scalars) {
  finish_vector<kWhole>(block, at, child, begin_vector<kWhole>(block, at, child, keep, scalars), scalars);
}

template <bool kWhole, class T>
CHILDTUNE_INLINE void update_block(const Block<T>& block, uint64_t child, uint64_t keep,
                                   const AdamWScalars<typename T::Real>& scalars) {
#pragma GCC unroll 1
  for (int at = 0; at < kBlock; at += T::kLanes) update_vector<kWhole>(block, at, child >> at, keep >> at, scalars);
}

constexpr int kStretchBlocks = 2;

// Two blocks of the child of all elements, and the keep bits of the two blocks from element `next` on, in
// place of theirs. Philox multiplies and shuffles while square roots and divisions, of which a
// processor starts one in many cycles, are under way. Measured in cache on Zen 4, cycles for 16 elements: 17
// without Philox; with it 35 if blocks are drawn one by one, 31 if two draws go side by side, where the four
// pipes together could do it in 23.
template <class T>
CHILDTUNE_INLINE void update_stretch_and_draw(const Block<T>& stretch, uint64_t keep[kStretchBlocks],
                                              const RowStep<typename T::Real>& step, uint64_t next) {
  constexpr int kLanes = T::kLanes;
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

// With 16 registers: a draw's elements, all of the child, and the keep bits of the draw from element `next` on. The
// roots of all vectors are begun before the first division, with half of the draw's rounds beside each: in one
// piece, root and division of a vector take so long that those after it, and Philox, no longer fit among the
// instructions that a processor looks ahead at. Measured in cache on Zen 3, cycles an element of fp32 (of bf16
// with split masters): 2.2 (3.2) without Philox; with it 4.6 (5.4) block by block, 4.0 (5.1) with a draw
// beside vectors in one piece, 3.6 (4.2) so.
template <class T>
CHILDTUNE_INLINE uint64_t update_and_draw(const Block<T>& block, uint64_t keep, const RowStep<typename T::Real>& step,
                                          uint64_t next) {
  constexpr int kVectors = kDrawElements / T::kLanes, kHalf = (kPhiloxRounds - 2) / 2;
  constexpr uint64_t kAll = ~uint64_t(0);
  PhiloxDraw draw = draw_begin(step.stream, next);
  Fraction<typename T::Vec> fraction[kVectors];
#pragma GCC unroll 8
  for (int vector = 0; vector < kVectors; ++vector) {
    const int at = vector * T::kLanes;
    draw_rounds(step.stream, 2 + kHalf * vector / kVectors, 2 + kHalf * (vector + 1) / kVectors, draw);
    fraction[vector] = begin_vector<true>(block, at, kAll, keep >> at, step.scalars);
  }
  constexpr int kLater = 2 + kHalf;
#pragma GCC unroll 8
  for (int vector = 0; vector < kVectors; ++vector) {
    draw_rounds(step.stream, kLater + kHalf * vector / kVectors, kLater + kHalf * (vector + 1) / kVectors, draw);
    finish_vector<true>(block, vector * T::kLanes, kAll, fraction[vector], step.scalars);
  }
  return draw_end(draw, step.threshold);
}

// Eq. 9 alone, for the elements outside the fixed mask when it does not freeze them.
template <class T>
inline void decay_block(const Block<T>& block, uint64_t outside, const AdamWScalars<typename T::Real>& scalars) {
  for (int at = 0; at < kBlock; at += T::kLanes) {
    const typename T::Vec weight = decayed(current_weight(block.weight + at, block.master_at(at)), scalars);
    store_weight<false>(block, at, weight, outside >> at);
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
