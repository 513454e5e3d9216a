// Op keep_words: the launch.
#include "launch.h"

namespace childtune {

void keep_words_(Tensor words, int64_t numel, Tensor element_map, bool contiguous, int64_t key, int64_t step,
                 int64_t purpose, int64_t threshold, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const IndexMap& map = *static_cast<const IndexMap*>(element_map.data_ptr());
  uint32_t* const target = static_cast<uint32_t*>(words.data_ptr());
  torch::stable::parallel_for(0, (numel + 63) / 64, 64, [&](int64_t begin, int64_t end) {
    kernels.keep_words(uint64_t(key), uint64_t(step), uint32_t(purpose), uint64_t(threshold), map, contiguous, numel,
                       target, begin, end);
  });
}

}  // namespace childtune
