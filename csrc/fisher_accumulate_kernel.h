// Op fisher_accumulate: sums of squared gradients (SPEC.md, eq. 13), for a share of one tensor's blocks.

template <class Grad>
CHILDTUNE_INLINE void accumulate_block(float* sums, const Grad* grad, float scale) {
#pragma GCC unroll 1
  for (int at = 0; at < kBlock; at += kLanes32) {
    prefetch_ahead<true>(sums + at);
    prefetch_ahead<false>(grad + at);
    const VecF32 gradient = load_as(grad + at, VecF32());
    store(sums + at, load<VecF32>(sums + at) + scale * (gradient * gradient));
  }
}

// Copies the gradient of local elements local .. local+count-1 from wherever its strides put them.
template <class Grad>
inline void gather_gradient(const FisherRow& row, int64_t local, int count, Grad* target) {
  constexpr int kMostLevels = 64;  // of two elements or more each, in a tensor of less than 2^63
  const Grad* const grad = static_cast<const Grad*>(row.grad);
  int64_t digit[kMostLevels], offset = 0;
  for (int level = row.level_count - 1; level >= 0; --level) {
    digit[level] = local % row.levels[level].size;
    local /= row.levels[level].size;
    offset += digit[level] * row.levels[level].stride;
  }
  for (int at = 0; at < count; ++at) {
    target[at] = grad[offset];
    for (int level = row.level_count - 1; level >= 0; --level) {
      offset += row.levels[level].stride;
      if (++digit[level] < row.levels[level].size) break;
      offset -= digit[level] * row.levels[level].stride;
      digit[level] = 0;
    }
  }
}

// A tail or a block of a strided gradient, in padded arrays, so that it meets the same vector code.
template <class Grad>
__attribute__((noinline)) void accumulate_gathered(const FisherRow& row, float scale, int64_t local, int count) {
  float sums[kBlock] = {};
  Grad grad[kBlock] = {};
  const size_t bytes = size_t(count) * sizeof(float);
  __builtin_memcpy(sums, row.sums + local, bytes);
  gather_gradient(row, local, count, grad);
  accumulate_block(sums, grad, scale);
  __builtin_memcpy(row.sums + local, sums, bytes);
}

template <class Grad>
void accumulate_blocks(const FisherRow& row, float scale, int64_t first_block, int64_t last_block) {
  for (int64_t at = first_block; at < last_block; ++at) {
    const int64_t local = at * kBlock;
    const int count = row.numel - local < kBlock ? int(row.numel - local) : kBlock;
    if (count < kBlock || !row.contiguous) {
      accumulate_gathered<Grad>(row, scale, local, count);
    } else {
      accumulate_block(row.sums + local, static_cast<const Grad*>(row.grad) + local, scale);
    }
  }
}

void fisher_accumulate_row(const FisherRow& row, float scale, int64_t first_block, int64_t last_block) {
  switch (row.grad_dtype) {
    case kFloat32: return accumulate_blocks<float>(row, scale, first_block, last_block);
    case kFloat64: return accumulate_blocks<double>(row, scale, first_block, last_block);
    case kBFloat16: return accumulate_blocks<BFloat16>(row, scale, first_block, last_block);
    case kFloat16: return accumulate_blocks<Float16>(row, scale, first_block, last_block);
  }
}
