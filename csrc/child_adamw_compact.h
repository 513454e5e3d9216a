// Op child_adamw for rows with compact state: moments and masters hold the child's elements alone, one
// after the other. Here is what the layouts share: a child's elements are gathered into buffers, stepped
// there by the code of dense rows, and put back. What has no child is not read. A layout has its own way
// (child_adamw_words.h, _indices.h, _runs.h) where the tensor is contiguous and no Bernoulli mask lies on top.

// Elements looked at, and child elements gathered, at a time. Small enough that tensor, buffers and state stay
// in the first-level cache between reading and writing, and that one stretch's writing overlaps the next
// one's reading: measured on Zen 4 at p = 0.3, 2048 elements take a third longer than 512 or 1024.
constexpr int kGatherWords = 1024;
constexpr int kGatherPlaces = 512;
constexpr int kGatherLimit = kGatherWords + kBlock;  // whole vectors are stored behind the last element

template <class T>
struct Gathered {
  alignas(64) typename T::Weight weight[kGatherLimit];
  alignas(64) typename T::Grad grad[kGatherLimit];
};

// Child elements of a stretch of the tensor.
struct Chunk {
  int64_t base;             // the local index from which places count
  const uint16_t* places;   // null: one after the other
  int count;
  int64_t rank;             // of the first
  int64_t following;        // places that may be read behind the last
};

CHILDTUNE_INLINE int64_t local_of(const Chunk& chunk, int at) {
  return chunk.base + (chunk.places == nullptr ? at : chunk.places[at]);
}

// Steps `count` neighbouring elements, whose state begins at `rank`. `keep` holds their keep bits.
template <class T>
void update_span(const PlanRow& row, const RowStep<typename T::Real>& step, typename T::Weight* weight,
                 const typename T::Grad* grad, int count, int64_t rank, const uint64_t* keep, RoundingWords words) {
  constexpr int kLanes = T::kLanes;
  constexpr uint64_t kAll = ~uint64_t(0);
  const Block<T> state = block_at<T>(row, rank, words);
  const Block<T> span = {weight, grad, state.exp_avg, state.exp_avg_sq, state.master, words};
  const AdamWScalars<typename T::Real> scalars = step.scalars;
  int at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    const uint64_t kept = keep == nullptr ? kAll : keep[at / kBlock] >> (at % kBlock);
    update_vector<true>(span, at, kAll, kept, scalars);
  }
  if (at == count) return;
  typename T::Weight last_weight[kLanes] = {};
  typename T::Grad last_grad[kLanes] = {};
  typename T::Moment last_exp_avg[kLanes] = {}, last_exp_avg_sq[kLanes] = {};
  typename T::Master last_master[kLanes] = {};
  const int rest = count - at;
  for (int lane = 0; lane < rest; ++lane) {
    last_weight[lane] = weight[at + lane];
    last_grad[lane] = grad[at + lane];
    last_exp_avg[lane] = span.exp_avg[at + lane];
    last_exp_avg_sq[lane] = span.exp_avg_sq[at + lane];
    if (span.master != nullptr) last_master[lane] = span.master[at + lane];
  }
  const Block<T> block = {last_weight, last_grad, last_exp_avg, last_exp_avg_sq, span.master ? last_master : nullptr,
                          {words.weight + at, words.exp_avg + at, words.exp_avg_sq + at}};
  const uint64_t kept = keep == nullptr ? kAll : keep[at / kBlock] >> (at % kBlock);
  update_vector<true>(block, 0, kAll, kept, scalars);
  for (int lane = 0; lane < rest; ++lane) {
    weight[at + lane] = last_weight[lane];
    span.exp_avg[at + lane] = last_exp_avg[lane];
    span.exp_avg_sq[at + lane] = last_exp_avg_sq[lane];
    if (span.master != nullptr) span.master[at + lane] = last_master[lane];
  }
}

// Eq. 8 and 10 for a vector of child elements, or its first `count`. Returns their updates (eq. 11).
template <bool kWhole, class Vec, class Real>
CHILDTUNE_INLINE Vec step_moments(Vec grad, Real* exp_avgs, Real* exp_avg_sqs, int count,
                                  const AdamWScalars<Real>& scalars) {
  constexpr uint64_t kAll = ~uint64_t(0);
  Vec exp_avg = kWhole ? load<Vec>(exp_avgs) : load_part(exp_avgs, count);
  Vec exp_avg_sq = kWhole ? load<Vec>(exp_avg_sqs) : load_part(exp_avg_sqs, count);
  const Vec update = quotient(moments_and_fraction(grad, exp_avg, exp_avg_sq, kAll, scalars), scalars);
  if constexpr (kWhole) {
    store(exp_avgs, exp_avg);
    store(exp_avg_sqs, exp_avg_sq);
  } else {
    store_part(exp_avgs, exp_avg, count);
    store_part(exp_avg_sqs, exp_avg_sq, count);
  }
  return update;
}

// The same for `count` child elements from rank `rank` on, from a buffer of gradients to one of updates.
template <class Grad, class Real>
void update_moments(const PlanRow& row, const AdamWScalars<Real>& scalars, const Grad* grad, int count, int64_t rank,
                    Real* update) {
  typedef typename VecOf<Real>::type Vec;
  constexpr int kLanes = kVectorBytes / int(sizeof(Real));
  Real* const exp_avg = reinterpret_cast<Real*>(row.exp_avg) + rank;
  Real* const exp_avg_sq = reinterpret_cast<Real*>(row.exp_avg_sq) + rank;
  int at = 0;
  for (; at + kLanes <= count; at += kLanes)
    store(update + at, step_moments<true>(load_as(grad + at, Vec()), exp_avg + at, exp_avg_sq + at, kLanes, scalars));
  if (at == count) return;
  store(update + at,
        step_moments<false>(load_as(grad + at, Vec()), exp_avg + at, exp_avg_sq + at, count - at, scalars));
}

// Eq. 9 alone for local elements begin .. end-1.
template <class T>
void decay_range(const PlanRow& row, const RowStep<typename T::Real>& step, int64_t begin, int64_t end) {
  if constexpr (T::kDrawsWeight) return;  // compact state refuses it (state_tensors.check_options)
  if (step.freeze || !step.scalars.decays()) return;
  constexpr uint64_t kAll = ~uint64_t(0);
  typedef typename T::Weight Weight;
  Weight* const weights = reinterpret_cast<Weight*>(row.weight);
  for (int64_t local = begin; local < end; local += kBlock) {
    const int count = end - local < kBlock ? int(end - local) : kBlock;
    if (count == kBlock && row.storage_contiguous) {
      decay_block(Block<T>{weights + local, nullptr, nullptr, nullptr, nullptr, {}}, kAll, step.scalars);
      continue;
    }
    Weight near[kBlock] = {};
    int64_t place[kBlock];
    for (int at = 0; at < count; ++at) {
      int64_t run;
      place[at] = row.storage_contiguous ? local + at : map_index(row.storage_map, local + at, &run);
      near[at] = weights[place[at]];
    }
    decay_block(Block<T>{near, nullptr, nullptr, nullptr, nullptr, {}}, kAll, step.scalars);
    for (int at = 0; at < count; ++at) weights[place[at]] = near[at];
  }
}

CHILDTUNE_INLINE uint64_t element_of(const PlanRow& row, const Chunk& chunk, int at) {
  return element_at(row, local_of(chunk, at));
}

// Eq. 2 for the elements of a chunk.
inline void keep_bits_of(const PlanRow& row, const PhiloxStream& stream, uint32_t threshold, const Chunk& chunk,
                         uint64_t* keep) {
  ElementWords words{stream};
  for (int at = 0; at < chunk.count; ++at) {
    if (at % kBlock == 0) keep[at / kBlock] = 0;
    keep[at / kBlock] |= uint64_t(words.of(element_of(row, chunk, at)) < threshold) << (at % kBlock);
  }
}

// The words by which a chunk's bf16 weights and moments are rounded (eq. 18).
template <class T>
struct ChunkWords {
  alignas(64) uint32_t of[3][T::kDraws ? kGatherLimit : 1];

  void draw(const PlanRow& row, const RowStep<typename T::Real>& step, const Chunk& chunk) {
    for (int what = T::kDrawsWeight ? 0 : 1; what < (T::kDrawsMoments ? 3 : 1); ++what) {
      ElementWords words{step.rounding[what]};
      for (int at = 0; at < chunk.count; ++at) of[what][at] = words.of(element_of(row, chunk, at));
    }
  }
};

// How far ahead the lines of scattered elements are asked for, into the second-level cache; into the first it
// takes twice as long.
constexpr int kPlacesAhead = 64;

template <class Weight, class Grad>
CHILDTUNE_INLINE void prefetch_place(const Weight* weight, const Grad* grad, uint16_t place) {
  __builtin_prefetch(weight + place, 1, 1);
  __builtin_prefetch(grad + place, 0, 1);
}

// How many of a chunk's elements have one kPlacesAhead behind them.
CHILDTUNE_INLINE int places_asking(const Chunk& chunk) {
  const int64_t known = chunk.count + chunk.following - kPlacesAhead;
  return known < chunk.count ? (known > 0 ? int(known) : 0) : chunk.count;
}

template <class T>
CHILDTUNE_INLINE void gather_places(const PlanRow& row, const Chunk& chunk, Gathered<T>& near) {
  typedef typename T::Weight Weight;
  typedef typename T::Grad Grad;
  const Weight* const weights = reinterpret_cast<const Weight*>(row.weight);
  const Grad* const grads = reinterpret_cast<const Grad*>(row.grad);
  if (!row.storage_contiguous) {
    for (int at = 0; at < chunk.count; ++at) {
      int64_t run;
      const int64_t place = map_index(row.storage_map, local_of(chunk, at), &run);
      near.weight[at] = weights[place];
      near.grad[at] = grads[place];
    }
    return;
  }
  const Weight* const weight = weights + chunk.base;
  const Grad* const grad = grads + chunk.base;
  if (chunk.places == nullptr) {
    __builtin_memcpy(near.weight, weight, size_t(chunk.count) * sizeof(Weight));
    __builtin_memcpy(near.grad, grad, size_t(chunk.count) * sizeof(Grad));
    return;
  }
  const int asking = places_asking(chunk);
  int at = 0;
  for (; at < asking; ++at) {
    prefetch_place(weight, grad, chunk.places[at + kPlacesAhead]);
    near.weight[at] = weight[chunk.places[at]];
    near.grad[at] = grad[chunk.places[at]];
  }
  for (; at < chunk.count; ++at) {
    near.weight[at] = weight[chunk.places[at]];
    near.grad[at] = grad[chunk.places[at]];
  }
}

template <class T>
CHILDTUNE_INLINE void scatter_places(const PlanRow& row, const Chunk& chunk, const Gathered<T>& near) {
  typename T::Weight* const weights = reinterpret_cast<typename T::Weight*>(row.weight);
  for (int at = 0; at < chunk.count; ++at) {
    int64_t run;
    const int64_t local = local_of(chunk, at);
    weights[row.storage_contiguous ? local : map_index(row.storage_map, local, &run)] = near.weight[at];
  }
}

// Steps a chunk and decays what else lies in decay_begin .. decay_end-1.
template <class T>
void run_chunk(const PlanRow& row, const RowStep<typename T::Real>& step, const Chunk& chunk, int64_t decay_begin,
               int64_t decay_end) {
  Gathered<T> near;
  ChunkWords<T> words;
  uint64_t keep[kGatherLimit / kBlock];
  gather_places(row, chunk, near);
  if (step.bernoulli) keep_bits_of(row, step.stream, step.threshold, chunk, keep);
  if constexpr (T::kDraws) words.draw(row, step, chunk);
  update_span<T>(row, step, near.weight, near.grad, chunk.count, chunk.rank, step.bernoulli ? keep : nullptr,
                 {words.of[0], words.of[1], words.of[2]});
  decay_range<T>(row, step, decay_begin, decay_end);
  scatter_places(row, chunk, near);
}
