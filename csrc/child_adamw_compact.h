// Op child_adamw for rows with compact state: moments and masters hold the child's elements alone, one
// after the other. Weights and gradients of the child are gathered into buffers, stepped there by the
// code of dense rows, and the weights put back; runs are stepped where they lie. What has no child is
// not read.

// Child elements gathered at a time. Buffers of fp32 and what is read for them stay in the first-level cache.
constexpr int kGatherWords = 2048;
constexpr int kGatherPlaces = 1024;
constexpr int kGatherLimit = kGatherWords + kBlock;  // whole vectors are stored behind the last element

template <class Weight, class Grad>
struct Gathered {
  alignas(64) Weight weight[kGatherLimit];
  alignas(64) Grad grad[kGatherLimit];
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
template <Source kSource, class Weight, class Grad, class Real>
void update_span(const PlanRow& row, const RowStep<Real>& step, Weight* weight, const Grad* grad, int count,
                 int64_t rank, const uint64_t* keep) {
  constexpr int kLanes = kVectorBytes / int(sizeof(Real));
  constexpr uint64_t kAll = ~uint64_t(0);
  Real* const exp_avg = reinterpret_cast<Real*>(row.exp_avg) + rank;
  Real* const exp_avg_sq = reinterpret_cast<Real*>(row.exp_avg_sq) + rank;
  Real* const masters = row.master_weight ? reinterpret_cast<Real*>(row.master_weight) + rank : nullptr;
  int at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    const Block<Weight, Grad> block = {weight + at, grad + at, exp_avg + at, exp_avg_sq + at,
                                       masters ? masters + at : nullptr};
    const uint64_t kept = keep == nullptr ? kAll : keep[at / kBlock] >> (at % kBlock);
    update_vector<true, kSource>(block, 0, kAll, kept, step.scalars);
  }
  if (at == count) return;
  Weight last_weight[kLanes] = {};
  Grad last_grad[kLanes] = {};
  Real last_exp_avg[kLanes] = {}, last_exp_avg_sq[kLanes] = {}, last_master[kLanes] = {};
  const int rest = count - at;
  for (int lane = 0; lane < rest; ++lane) {
    last_weight[lane] = weight[at + lane];
    last_grad[lane] = grad[at + lane];
    last_exp_avg[lane] = exp_avg[at + lane];
    last_exp_avg_sq[lane] = exp_avg_sq[at + lane];
    if (masters != nullptr) last_master[lane] = masters[at + lane];
  }
  const Block<Weight, Grad> block = {last_weight, last_grad, last_exp_avg, last_exp_avg_sq,
                                     masters ? last_master : nullptr};
  const uint64_t kept = keep == nullptr ? kAll : keep[at / kBlock] >> (at % kBlock);
  update_vector<true, kNear>(block, 0, kAll, kept, step.scalars);
  for (int lane = 0; lane < rest; ++lane) {
    weight[at + lane] = last_weight[lane];
    exp_avg[at + lane] = last_exp_avg[lane];
    exp_avg_sq[at + lane] = last_exp_avg_sq[lane];
    if (masters != nullptr) masters[at + lane] = last_master[lane];
  }
}

// Eq. 9 alone for local elements begin .. end-1.
template <class Weight, class Grad, class Real>
void decay_range(const PlanRow& row, const RowStep<Real>& step, int64_t begin, int64_t end) {
  if (step.freeze || !step.scalars.decays) return;
  constexpr uint64_t kAll = ~uint64_t(0);
  Weight* const weights = reinterpret_cast<Weight*>(row.weight);
  for (int64_t local = begin; local < end; local += kBlock) {
    const int count = end - local < kBlock ? int(end - local) : kBlock;
    if (count == kBlock && row.storage_contiguous) {
      decay_block(Block<Weight, Grad>{weights + local, nullptr, nullptr, nullptr, nullptr}, kAll, step.scalars);
      continue;
    }
    Weight near[kBlock] = {};
    int64_t place[kBlock];
    for (int at = 0; at < count; ++at) {
      int64_t run;
      place[at] = row.storage_contiguous ? local + at : map_index(row.storage_map, local + at, &run);
      near[at] = weights[place[at]];
    }
    decay_block(Block<Weight, Grad>{near, nullptr, nullptr, nullptr, nullptr}, kAll, step.scalars);
    for (int at = 0; at < count; ++at) weights[place[at]] = near[at];
  }
}

// Eq. 2 for the elements of a chunk.
template <class Real>
void keep_bits_of(const PlanRow& row, const RowStep<Real>& step, const Chunk& chunk, uint64_t* keep) {
  uint64_t counter = 0;
  uint32_t words[4];
  for (int at = 0; at < chunk.count; ++at) {
    int64_t run;
    const int64_t local = local_of(chunk, at);
    const uint64_t element =
        uint64_t(row.element_contiguous ? row.element_map.base + local : map_index(row.element_map, local, &run));
    if (at == 0 || element / 4 != counter) {
      counter = element / 4;
      philox_words(step.stream, counter, words);
    }
    if (at % kBlock == 0) keep[at / kBlock] = 0;
    keep[at / kBlock] |= uint64_t(words[element % 4] < step.threshold) << (at % kBlock);
  }
}

// How far ahead the lines of scattered elements are asked for.
constexpr int kPlacesAhead = 64;

template <class Weight, class Grad>
CHILDTUNE_INLINE void gather_places(const PlanRow& row, const Chunk& chunk, Gathered<Weight, Grad>& near) {
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
  const int64_t known = chunk.count + chunk.following - kPlacesAhead;
  const int asking = known < chunk.count ? (known > 0 ? int(known) : 0) : chunk.count;
  int at = 0;
  for (; at < asking; ++at) {
    const uint16_t ahead = chunk.places[at + kPlacesAhead];
    __builtin_prefetch(weight + ahead, 1, 1);
    __builtin_prefetch(grad + ahead, 0, 1);
    near.weight[at] = weight[chunk.places[at]];
    near.grad[at] = grad[chunk.places[at]];
  }
  for (; at < chunk.count; ++at) {
    near.weight[at] = weight[chunk.places[at]];
    near.grad[at] = grad[chunk.places[at]];
  }
}

template <class Weight, class Grad>
CHILDTUNE_INLINE void scatter_places(const PlanRow& row, const Chunk& chunk, const Gathered<Weight, Grad>& near) {
  Weight* const weights = reinterpret_cast<Weight*>(row.weight);
  for (int at = 0; at < chunk.count; ++at) {
    int64_t run;
    const int64_t local = local_of(chunk, at);
    weights[row.storage_contiguous ? local : map_index(row.storage_map, local, &run)] = near.weight[at];
  }
}

// Steps a chunk and decays what else lies in decay_begin .. decay_end-1.
template <class Weight, class Grad, class Real>
void run_chunk(const PlanRow& row, const RowStep<Real>& step, const Chunk& chunk, int64_t decay_begin,
               int64_t decay_end) {
  Gathered<Weight, Grad> near;
  uint64_t keep[kGatherLimit / kBlock];
  gather_places(row, chunk, near);
  if (step.bernoulli) keep_bits_of(row, step, chunk, keep);
  update_span<kNear>(row, step, near.weight, near.grad, chunk.count, chunk.rank, step.bernoulli ? keep : nullptr);
  decay_range<Weight, Grad>(row, step, decay_begin, decay_end);
  scatter_places(row, chunk, near);
}

constexpr int kAhead = 512;  // elements: 2 KiB of fp32, as in child_adamw_block.h

template <bool kForWriting, class Element>
CHILDTUNE_INLINE void prefetch_block(const Element* first) {
  for (int at = 0; at < kBlock; at += 64 / int(sizeof(Element))) __builtin_prefetch(first + at, kForWriting, 1);
}

// Layout "words", elements begin .. end-1 of a contiguous tensor without a Bernoulli mask.
template <class Weight, class Grad, class Real>
int64_t run_compressed(const PlanRow& row, const RowStep<Real>& step, int64_t begin, int64_t end, int64_t rank) {
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(row.mask_words);
  Weight* const weight = reinterpret_cast<Weight*>(row.weight);
  const Grad* const grad = reinterpret_cast<const Grad*>(row.grad);
  Gathered<Weight, Grad> near;
  int count = 0;
  for (int64_t local = begin; local < end; local += kBlock) {
    if (local + kAhead < row.numel && child_bits(words, local + kAhead, row.numel) != 0) {
      prefetch_block<true>(weight + local + kAhead);
      prefetch_block<false>(grad + local + kAhead);
    }
    const uint64_t bits = child_bits(words, local, row.numel);
    if (bits == 0) continue;
    if (local + kBlock <= row.numel) {
      compress_block(weight + local, bits, near.weight + count);
      count += compress_block(grad + local, bits, near.grad + count);
    } else {
      compress_elements(weight + local, bits, near.weight + count);
      count += compress_elements(grad + local, bits, near.grad + count);
    }
  }
  update_span<kNear>(row, step, near.weight, near.grad, count, rank, nullptr);
  decay_range<Weight, Grad>(row, step, begin, end);
  int done = 0;
  for (int64_t local = begin; local < end; local += kBlock) {
    const uint64_t bits = child_bits(words, local, row.numel);
    if (bits == 0) continue;
    done += local + kBlock <= row.numel ? expand_block(near.weight + done, bits, weight + local)
                                        : expand_elements(near.weight + done, bits, weight + local);
  }
  return rank + count;
}

// Layout "words" by places: strided tensors, and Bernoulli inside the child.
template <class Weight, class Grad, class Real>
int64_t run_decoded(const PlanRow& row, const RowStep<Real>& step, int64_t begin, int64_t end, int64_t rank) {
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(row.mask_words);
  uint16_t places[kGatherWords];
  int count = 0;
  for (int64_t local = begin; local < end; local += kBlock) {
    for (uint64_t bits = child_bits(words, local, row.numel); bits != 0; bits &= bits - 1)
      places[count++] = uint16_t(local - begin + __builtin_ctzll(bits));
  }
  run_chunk<Weight, Grad>(row, step, {begin, places, count, rank, 0}, begin, end);
  return rank + count;
}

template <class Weight, class Grad, class Real>
void run_words_unit(const PlanRow& row, const RowStep<Real>& step, int64_t unit) {
  int64_t rank = reinterpret_cast<const int64_t*>(row.child_ranks)[unit];
  const int64_t stop = (unit + 1) * kWordsUnit < row.numel ? (unit + 1) * kWordsUnit : row.numel;
  for (int64_t begin = unit * kWordsUnit; begin < stop; begin += kGatherWords) {
    const int64_t end = begin + kGatherWords < stop ? begin + kGatherWords : stop;
    rank = row.storage_contiguous && !step.bernoulli ? run_compressed<Weight, Grad>(row, step, begin, end, rank)
                                                     : run_decoded<Weight, Grad>(row, step, begin, end, rank);
  }
}

template <class Weight, class Grad, class Real>
void run_indices_unit(const PlanRow& row, const RowStep<Real>& step, int64_t unit) {
  const int64_t* const ranks = reinterpret_cast<const int64_t*>(row.child_ranks) + unit;
  const uint16_t* const places = reinterpret_cast<const uint16_t*>(row.child_places);
  const int64_t base = unit * kIndicesUnit;
  const int64_t stop = base + kIndicesUnit < row.numel ? base + kIndicesUnit : row.numel;
  int64_t rank = ranks[0], decay_begin = base;
  do {
    const int64_t left = ranks[1] - rank;
    const int count = left < kGatherPlaces ? int(left) : kGatherPlaces;
    const int64_t decay_end = count == left ? stop : base + places[rank + count];
    run_chunk<Weight, Grad>(row, step, {base, places + rank, count, rank, left - count}, decay_begin, decay_end);
    decay_begin = decay_end;
    rank += count;
  } while (rank < ranks[1]);
}

// A stretch of a run from local element `local` on.
template <class Weight, class Grad, class Real>
void run_piece(const PlanRow& row, const RowStep<Real>& step, int64_t local, int64_t count, int64_t rank) {
  if (row.storage_contiguous && !step.bernoulli) {
    Weight* const weight = reinterpret_cast<Weight*>(row.weight) + local;
    const Grad* const grad = reinterpret_cast<const Grad*>(row.grad) + local;
    constexpr int64_t kLong = 4 * int64_t(kPrefetchBytes) / int64_t(sizeof(Weight));
    if (count >= kLong) return update_span<kStream>(row, step, weight, grad, int(count), rank, nullptr);
    return update_span<kNear>(row, step, weight, grad, int(count), rank, nullptr);
  }
  for (int64_t done = 0; done < count; done += kGatherPlaces) {
    const int part = count - done < kGatherPlaces ? int(count - done) : kGatherPlaces;
    run_chunk<Weight, Grad>(row, step, {local + done, nullptr, part, rank + done, 0}, 0, 0);
  }
}

template <bool kForWriting, class Element>
CHILDTUNE_INLINE void prefetch_run(const Element* first, int64_t count) {
  constexpr int64_t kMost = 4096 / int64_t(sizeof(Element));
  const Element* const end = first + (count < kMost ? count : kMost);
  for (; first < end; first += 64 / sizeof(Element)) __builtin_prefetch(first, kForWriting, 1);
}

template <class Weight, class Grad, class Real>
void run_runs_unit(const PlanRow& row, const RowStep<Real>& step, int64_t unit) {
  const ChildRun* run = reinterpret_cast<const ChildRun*>(row.child_places);
  if (row.child_count == 0) return decay_range<Weight, Grad>(row, step, 0, row.numel);
  int64_t rank = unit * kRunsUnit;
  const int64_t stop = rank + kRunsUnit < row.child_count ? rank + kRunsUnit : row.child_count;
  if (rank == 0) decay_range<Weight, Grad>(row, step, 0, run->start);
  for (int64_t low = 0, high = row.run_count; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (run[middle + 1].rank <= rank) {
      low = middle + 1;
    } else {
      high = middle;
    }
    if (low == high) run += low;
  }
  for (; rank < stop; ++run) {
    const int64_t end = run[1].rank < stop ? run[1].rank : stop;
    if (run[1].rank < stop) {
      const int64_t length = run[2].rank - run[1].rank;
      prefetch_run<true>(reinterpret_cast<const Weight*>(row.weight) + run[1].start, length);
      prefetch_run<false>(reinterpret_cast<const Grad*>(row.grad) + run[1].start, length);
    }
    run_piece<Weight, Grad>(row, step, run->start + rank - run->rank, end - rank, rank);
    if (end == run[1].rank) decay_range<Weight, Grad>(row, step, run->start + end - run->rank, run[1].start);
    rank = end;
  }
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
