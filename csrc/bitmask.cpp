// Op bitmask: the launches.
#include <atomic>

#include "launch.h"

namespace childtune {
namespace {

constexpr int64_t kGrain = 512;  // 64-bit words a thread

}  // namespace

void pack_mask_(Tensor mask, Tensor words, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const uint8_t* const source = static_cast<const uint8_t*>(mask.data_ptr());
  uint32_t* const target = static_cast<uint32_t*>(words.data_ptr());
  const int64_t numel = mask.numel();
  torch::stable::parallel_for(0, (numel + 63) / 64, kGrain, [&](int64_t begin, int64_t end) {
    kernels.pack_mask(source, numel, target, begin, end);
  });
}

void unpack_mask_(Tensor words, Tensor mask, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const uint32_t* const source = static_cast<const uint32_t*>(words.data_ptr());
  uint8_t* const target = static_cast<uint8_t*>(mask.data_ptr());
  const int64_t numel = mask.numel();
  torch::stable::parallel_for(0, (numel + 63) / 64, kGrain, [&](int64_t begin, int64_t end) {
    kernels.unpack_mask(source, numel, target, begin, end);
  });
}

int64_t count_mask(Tensor words, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const uint32_t* const source = static_cast<const uint32_t*>(words.data_ptr());
  const int64_t word_count = words.numel();
  std::atomic<int64_t> total{0};
  torch::stable::parallel_for(0, (word_count + 1) / 2, kGrain, [&](int64_t begin, int64_t end) {
    total += kernels.count_mask(source, word_count, begin, end);
  });
  return total;
}

}  // namespace childtune
