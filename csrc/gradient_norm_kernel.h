// Op gradient_norm: sums of squared gradients (SPEC.md, eq. 19), for a share of one row's units. A unit is 32
// rows of 128 elements that follow one another; a tail or a strided tensor is copied to a unit of its own,
// padded with zeros, so that every element meets the same vector code.

constexpr int kNormColumns = 128;
constexpr int kNormUnit = 32 * kNormColumns;

struct ColumnSums {
  static constexpr int kVectors = kNormColumns / kLanes64;
  VecF64 vector[kVectors];
};

// A vector of fp32's number of elements, as two of doubles.
struct WidePair {
  VecF64 low, high;
};

CHILDTUNE_INLINE WidePair load_wide(const float* source) {
  typedef float HalfF32 __attribute__((vector_size(kVectorBytes / 2)));
  return {__builtin_convertvector(load<HalfF32>(source), VecF64),
          __builtin_convertvector(load<HalfF32>(source + kLanes64), VecF64)};
}
CHILDTUNE_INLINE WidePair load_wide(const double* source) {
  return {load<VecF64>(source), load<VecF64>(source + kLanes64)};
}
template <class Half>
CHILDTUNE_INLINE WidePair load_wide(const Half* source) {
  const VecF32 single = load_as(source, VecF32());
  return {widened_low(single), widened_high(single)};
}

CHILDTUNE_INLINE WidePair squared(WidePair x) { return {x.low * x.low, x.high * x.high}; }

// Eq. 19's fold of the columns, in place.
CHILDTUNE_INLINE double folded(ColumnSums& sums) {
  for (int half = ColumnSums::kVectors / 2; half > 0; half /= 2)
    for (int at = 0; at < half; ++at) sums.vector[at] += sums.vector[at + half];
  double lane[kLanes64];
  store(lane, sums.vector[0]);
  for (int half = kLanes64 / 2; half > 0; half /= 2)
    for (int at = 0; at < half; ++at) lane[at] += lane[at + half];
  return lane[0];
}

// How many rows meet the column sums at once. Measured on Zen 3, AVX2, two cores, 32M elements (one read of
// them: 6.6 ms, of bf16 3.3): fp32 by one row takes 7.3 ms, by four 7.7; bf16 by one 4.9, by four 4.0.
template <class Grad>
constexpr int kRowsAtOnce = sizeof(Grad) == 2 ? 4 : 1;

// Lines are asked for ahead one by one, in the order of memory: by the order in which several rows
// read them the processor's own prefetch is misled (fp32 by four rows: 12.9 ms).
template <class Grad>
constexpr int kNormPrefetchBytes = sizeof(Grad) == 2 ? 4096 : 1024;

// Adds squares of kRows neighbouring rows to the columns.
template <int kRows, class Grad>
CHILDTUNE_INLINE void add_rows(const Grad* grad, ColumnSums& sums) {
  constexpr int kLine = 64, kVectors = kNormColumns / kLanes32;
  constexpr int kBytes = kRows * int(sizeof(Grad)) * kLanes32;  // that a turn of the loop reads
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(grad) + kNormPrefetchBytes<Grad>;
  for (int at = 0; at < kVectors; ++at) {
    for (int byte = 0; byte < kBytes; byte += kLine)
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + uintptr_t(at * kBytes + byte)), 0, 1);
    VecF64 &low = sums.vector[2 * at], &high = sums.vector[2 * at + 1];
    WidePair sum = {low, high};
    for (int row = 0; row < kRows; ++row) {
      const WidePair x = squared(load_wide(grad + row * kNormColumns + at * kLanes32));
      sum.low += x.low;
      sum.high += x.high;
    }
    low = sum.low;
    high = sum.high;
  }
}

// The same for one row, and for its elements whose bit is set.
template <class Grad>
CHILDTUNE_INLINE void add_masked_row(const Grad* grad, const uint64_t* bits, ColumnSums& every, ColumnSums& counting) {
  for (int at = 0; at < kNormColumns / kLanes32; ++at) {
    const int column = at * kLanes32;
    const uint64_t lanes = bits[column / kBlock] >> (column % kBlock);
    const WidePair x = squared(load_wide(grad + column));
    every.vector[2 * at] += x.low;
    every.vector[2 * at + 1] += x.high;
    counting.vector[2 * at] += select(lanes, x.low, VecF64{});
    counting.vector[2 * at + 1] += select(lanes >> kLanes64, x.high, VecF64{});
  }
}

// Of a unit's first `count` elements; there are zeros after them as far as a whole number of kElements goes. What
// lies farther need not be added: it is +0, and sums are never -0.
template <class Grad>
CHILDTUNE_INLINE double sum_of_squares(const Grad* grad, int count) {
  constexpr int kElements = kRowsAtOnce<Grad> * kNormColumns;
  ColumnSums sums = {};
#pragma GCC unroll 1
  for (int at = 0; at < count; at += kElements) add_rows<kRowsAtOnce<Grad>>(grad + at, sums);
  return folded(sums);
}

// Copies local elements local .. local+count-1 from wherever the row's strides put them.
template <class Grad>
inline void gather_unit(const PlanRow& row, int64_t local, int count, Grad* target) {
  const Grad* const grad = reinterpret_cast<const Grad*>(row.grad);
  if (row.storage_contiguous) {
    __builtin_memcpy(target, grad + local, size_t(count) * sizeof(Grad));
    return;
  }
  const IndexMap::Level& inner = row.storage_map.level[kMapLevels - 1];
  for (int at = 0; at < count;) {
    int64_t run, place = map_index(row.storage_map, local + at, &run);
    for (int64_t digit = (local + at) % inner.size; digit < inner.size && at < count; ++digit, ++at) {
      target[at] = grad[place];
      place += inner.stride;
    }
  }
}

// Which elements of a row a step does not drop.
struct NormMask {
  const uint32_t* words;  // null without a fixed mask
  bool bernoulli;
  uint32_t threshold;
  PhiloxStream stream;
};

// The bits of a unit's elements, whatever they are past the end.
inline void counting_bits(const PlanRow& row, const NormMask& mask, int64_t local, int count, uint64_t* bits) {
  for (int at = 0; at < count; at += kBlock) {
    uint64_t block = child_bits(mask.words, local + at, row.numel);
    if (mask.bernoulli && block != 0) {
      const int left = count - at < kBlock ? count - at : kBlock;
      block &= row.element_contiguous
                   ? keep_bits_from(mask.stream, uint64_t(row.element_map.base + local + at), mask.threshold)
                   : keep_bits_mapped(mask.stream, row.element_map, local + at, left, mask.threshold);
    }
    bits[at / kBlock] = block;
  }
}

template <class Grad>
__attribute__((noinline)) double sum_of_masked_squares(const PlanRow& row, const NormMask& mask, const Grad* grad,
                                                       int64_t local, int count, double* every) {
  uint64_t bits[kNormUnit / kBlock] = {};
  counting_bits(row, mask, local, count, bits);
  ColumnSums all = {}, counting = {};
  for (int at = 0; at < count; at += kNormColumns) add_masked_row(grad + at, bits + at / kBlock, all, counting);
  *every = folded(all);
  return folded(counting);
}

template <class Grad>
void norm_units(const PlanRow& row, const NormMask* mask, double factor, int64_t first, int64_t last, double* every,
                double* after_mask) {
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t local = unit * kNormUnit;
    const int count = row.numel - local < kNormUnit ? int(row.numel - local) : kNormUnit;
    const Grad* grad = reinterpret_cast<const Grad*>(row.grad) + local;
    alignas(64) Grad near[kNormUnit];
    if (count < kNormUnit || !row.storage_contiguous) {
      constexpr int kElements = kRowsAtOnce<Grad> * kNormColumns;
      __builtin_memset(near + count, 0, size_t((kNormUnit - count) % kElements) * sizeof(Grad));
      gather_unit(row, local, count, near);
      grad = near;
    }
    if (mask != nullptr) {
      after_mask[unit] = factor * sum_of_masked_squares(row, *mask, grad, local, count, every + unit);
    } else {
      every[unit] = sum_of_squares(grad, count);
      if (after_mask != nullptr) after_mask[unit] = factor * every[unit];
    }
  }
}

void gradient_norm_row(const PlanRow& row, const PlanGroup& group, const uint32_t* words, int64_t first, int64_t last,
                       double* every, double* after_mask) {
  NormMask mask = {words, group.threshold < double(kKeepAll), 0, {}};
  if (mask.bernoulli && after_mask != nullptr) {
    mask.threshold = uint32_t(group.threshold);
    const uint64_t step = uint64_t(*reinterpret_cast<const int64_t*>(row.step)) + 1;
    mask.stream = philox_stream(uint64_t(row.philox_key), step, kPurposeKeep);
  }
  const NormMask* const used = after_mask != nullptr && (mask.bernoulli || words != nullptr) ? &mask : nullptr;
  const double r = 1.0 / group.reserve_p, factor = r * r;
  switch (row.grad_dtype) {
    case kFloat32: return norm_units<float>(row, used, factor, first, last, every, after_mask);
    case kFloat64: return norm_units<double>(row, used, factor, first, last, every, after_mask);
    case kBFloat16: return norm_units<BFloat16>(row, used, factor, first, last, every, after_mask);
    case kFloat16: return norm_units<Float16>(row, used, factor, first, last, every, after_mask);
  }
}

// Eq. 19 of values as they are.
double unit_sum(const double* values, int64_t count) {
  double padded[kNormUnit];
  if (count < kNormUnit) {
    __builtin_memset(padded + count, 0, size_t(kNormUnit - count) * sizeof(double));
    __builtin_memcpy(padded, values, size_t(count) * sizeof(double));
    values = padded;
  }
  ColumnSums sums = {};
  for (int at = 0; at < kNormUnit; at += kNormColumns)
    for (int vector = 0; vector < ColumnSums::kVectors; ++vector)
      sums.vector[vector] += load<VecF64>(values + at + vector * kLanes64);
  return folded(sums);
}
