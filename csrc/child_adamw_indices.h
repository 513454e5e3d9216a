// Layout "indices": a 16-bit place an element of the child. Needs child_adamw_compact.h.

// A vector of child elements, or its first `count`: moments are updated, and the weights that will stand at
// `places` go to `stepped`. `places` are a whole vector's.
template <bool kWhole, class Weight, class Grad, class Real>
CHILDTUNE_INLINE void step_places(const Weight* weight, const Grad* grad, const uint16_t* places, Real* exp_avgs,
                                  Real* exp_avg_sqs, Real* stepped, int count, const AdamWScalars<Real>& scalars) {
  const auto update = step_moments<kWhole>(gather_vector(grad, places), exp_avgs, exp_avg_sqs, count, scalars);
  store(stepped, updated(gather_vector(weight, places), update, scalars));
}

// A chunk of a contiguous tensor without a Bernoulli mask, where the weight is its own master.
template <class T>
void run_places(const PlanRow& row, const RowStep<typename T::Real>& step, const Chunk& chunk, int64_t decay_begin,
                int64_t decay_end) {
  typedef typename T::Weight Weight;
  typedef typename T::Grad Grad;
  typedef typename T::Real Real;
  constexpr int kLanes = kVectorBytes / int(sizeof(Real));
  Weight* const weight = reinterpret_cast<Weight*>(row.weight) + chunk.base;
  const Grad* const grad = reinterpret_cast<const Grad*>(row.grad) + chunk.base;
  Real* const exp_avg = reinterpret_cast<Real*>(row.exp_avg) + chunk.rank;
  Real* const exp_avg_sq = reinterpret_cast<Real*>(row.exp_avg_sq) + chunk.rank;
  const AdamWScalars<Real> scalars = step.scalars;
  const int asking = places_asking(chunk);
  alignas(64) Real stepped[kGatherPlaces + kLanes];
  int at = 0;
  for (; at + kLanes <= chunk.count; at += kLanes) {
    if (at + kLanes <= asking) {
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) prefetch_place(weight, grad, chunk.places[at + lane + kPlacesAhead]);
    }
    step_places<true>(weight, grad, chunk.places + at, exp_avg + at, exp_avg_sq + at, stepped + at, kLanes, scalars);
  }
  if (at < chunk.count) {
    uint16_t last[kLanes] = {};
    __builtin_memcpy(last, chunk.places + at, size_t(chunk.count - at) * sizeof(uint16_t));
    step_places<false>(weight, grad, last, exp_avg + at, exp_avg_sq + at, stepped + at, chunk.count - at, scalars);
  }
  decay_range<T>(row, step, decay_begin, decay_end);
  for (at = 0; at < chunk.count; ++at) weight[chunk.places[at]] = stepped[at];
}

template <class T>
void run_indices_chunk(const PlanRow& row, const RowStep<typename T::Real>& step, const Chunk& chunk, int64_t decay_begin,
                       int64_t decay_end) {
  if constexpr (T::kPlain) {
    if (row.storage_contiguous && !step.bernoulli)
      return run_places<T>(row, step, chunk, decay_begin, decay_end);
  }
  run_chunk<T>(row, step, chunk, decay_begin, decay_end);
}

template <class T>
void run_indices_unit(const PlanRow& row, const RowStep<typename T::Real>& step, int64_t unit) {
  const int64_t* const ranks = reinterpret_cast<const int64_t*>(row.child_ranks) + unit;
  const uint16_t* const places = reinterpret_cast<const uint16_t*>(row.child_places);
  const int64_t base = unit * kIndicesUnit;
  const int64_t stop = base + kIndicesUnit < row.numel ? base + kIndicesUnit : row.numel;
  int64_t rank = ranks[0], decay_begin = base;
  do {
    const int64_t left = ranks[1] - rank;
    const int count = left < kGatherPlaces ? int(left) : kGatherPlaces;
    const int64_t decay_end = count == left ? stop : base + places[rank + count];
    const Chunk chunk = {base, places + rank, count, rank, left - count};
    run_indices_chunk<T>(row, step, chunk, decay_begin, decay_end);
    decay_begin = decay_end;
    rank += count;
  } while (rank < ranks[1]);
}
