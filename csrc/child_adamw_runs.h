// Layout "runs": stretches of neighbouring child elements. Needs child_adamw_compact.h.

// A stretch of a run from local element `local` on.
template <class T>
void run_piece(const PlanRow& row, const RowStep<typename T::Real>& step, int64_t local, int64_t count, int64_t rank) {
  typedef typename T::Weight Weight;
  typedef typename T::Grad Grad;
  if (!T::kDraws && row.storage_contiguous && !step.bernoulli) {
    Weight* const weight = reinterpret_cast<Weight*>(row.weight) + local;
    const Grad* const grad = reinterpret_cast<const Grad*>(row.grad) + local;
    return update_span<T>(row, step, weight, grad, int(count), rank, nullptr, {});
  }
  for (int64_t done = 0; done < count; done += kGatherPlaces) {
    const int part = count - done < kGatherPlaces ? int(count - done) : kGatherPlaces;
    run_chunk<T>(row, step, {local + done, nullptr, part, rank + done, 0}, 0, 0);
  }
}

template <bool kForWriting, class Element>
CHILDTUNE_INLINE void prefetch_run(const Element* first, int64_t count) {
  constexpr int64_t kMost = 4096 / int64_t(sizeof(Element));
  const Element* const end = first + (count < kMost ? count : kMost);
  for (; first < end; first += 64 / sizeof(Element)) __builtin_prefetch(first, kForWriting, 1);
}

template <class T>
void run_runs_unit(const PlanRow& row, const RowStep<typename T::Real>& step, int64_t unit) {
  const ChildRun* run = reinterpret_cast<const ChildRun*>(row.child_places);
  if (row.child_count == 0) return decay_range<T>(row, step, 0, row.numel);
  int64_t rank = unit * kRunsUnit;
  const int64_t stop = rank + kRunsUnit < row.child_count ? rank + kRunsUnit : row.child_count;
  if (rank == 0) decay_range<T>(row, step, 0, run->start);
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
      prefetch_run<true>(reinterpret_cast<const typename T::Weight*>(row.weight) + run[1].start, length);
      prefetch_run<false>(reinterpret_cast<const typename T::Grad*>(row.grad) + run[1].start, length);
    }
    run_piece<T>(row, step, run->start + rank - run->rank, end - rank, rank);
    if (end == run[1].rank) decay_range<T>(row, step, run->start + end - run->rank, run[1].start);
    rank = end;
  }
}
