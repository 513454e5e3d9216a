// Op topk_select: the launches. Every pass cuts all tensors into units and shares those between torch's
// threads; what they count are sums of integers, so that no order of the units matters.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "launch.h"

namespace childtune {
namespace {

constexpr int64_t kPassUnit = int64_t(1) << 16;  // elements
constexpr int64_t kGrain = 2;                    // units below which a second thread costs more than it brings
constexpr int64_t kUnitsOfTables = 1 << 14;      // after so many a 32-bit count may overflow in the next

const uint32_t* bits_of(const Tensor& scores) { return static_cast<const uint32_t*>(scores.data_ptr()); }

// The units of a list of tensors, in the order of the list.
class Units {
 public:
  Units(const std::vector<Tensor>& tensors, int64_t elements) : elements_(elements) {
    for (const Tensor& tensor : tensors) {
      numel_.push_back(tensor.numel());
      first_.push_back(first_.back() + (tensor.numel() + elements - 1) / elements);
    }
  }
  int64_t size() const { return first_.back(); }

  // Calls work(unit, tensor, start, count) for units begin .. end-1: the stretch of a tensor that each is.
  template <class Work>
  void each(int64_t begin, int64_t end, const Work& work) const {
    size_t tensor = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
    for (int64_t unit = begin; unit < end; ++unit) {
      while (first_[tensor + 1] <= unit) ++tensor;
      const int64_t start = (unit - first_[tensor]) * elements_;
      work(unit, tensor, start, std::min(elements_, numel_[tensor] - start));
    }
  }
  template <class Work>
  void share(const Work& work) const {
    torch::stable::parallel_for(0, size(), kGrain, [&](int64_t begin, int64_t end) { each(begin, end, work); });
  }

 private:
  int64_t elements_;
  std::vector<int64_t> numel_, first_{0};
};

// One thread's tables, added up into 64 bits before they overflow.
class Histogram {
 public:
  Histogram(int64_t bins, int64_t stride, int table_count)
      : bins_(bins), stride_(stride), table_count_(table_count), tables_(size_t(table_count * stride)) {}
  uint32_t* tables() { return tables_.data(); }

  void add_to(int64_t* counts) {
    for (int table = 0; table < table_count_; ++table)
      for (int64_t bin = 0; bin < bins_; ++bin) counts[bin] += tables_[size_t(table * stride_ + bin)];
    std::fill(tables_.begin(), tables_.end(), 0u);
  }

 private:
  int64_t bins_, stride_;
  int table_count_;
  std::vector<uint32_t> tables_;
};

// Counts all scores: count(scores, how many, tables) fills a thread's tables and returns how many it refused.
template <class Count>
void histogram_pass(const std::vector<Tensor>& scores, int64_t bins, int64_t stride, int table_count, Tensor& counts,
                    Tensor& refused, const Count& count_scores) {
  int64_t* const all_counts = static_cast<int64_t*>(counts.data_ptr());
  int64_t* const all_refused = static_cast<int64_t*>(refused.data_ptr());
  const Units units(scores, kPassUnit);
  std::mutex mutex;
  torch::stable::parallel_for(0, units.size(), kGrain, [&](int64_t begin, int64_t end) {
    Histogram histogram(bins, stride, table_count);
    for (int64_t stop; begin < end; begin = stop) {
      stop = std::min(end, begin + kUnitsOfTables);
      units.each(begin, stop, [&](int64_t, size_t tensor, int64_t start, int64_t count) {
        const int64_t found = count_scores(bits_of(scores[tensor]) + start, count, histogram.tables());
        if (found == 0) return;
        const std::lock_guard<std::mutex> lock(mutex);
        all_refused[tensor] += found;
      });
      const std::lock_guard<std::mutex> lock(mutex);
      histogram.add_to(all_counts);
    }
  });
}

}  // namespace

void digit_histogram_(std::vector<Tensor> scores, int64_t shift, int64_t bits, int64_t prefix, Tensor counts,
                      Tensor refused, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  histogram_pass(scores, int64_t(1) << bits, histogram_stride(int(bits)), kHistogramTables, counts, refused,
                 [&](const uint32_t* first, int64_t count, uint32_t* tables) {
                   return kernels.digit_histogram(first, count, int(shift), int(bits), uint32_t(prefix), tables);
                 });
}

void bracket_histogram_(std::vector<Tensor> scores, int64_t low, int64_t high, int64_t shift, Tensor counts,
                        Tensor above, Tensor refused, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const int64_t bins = counts.numel();
  std::atomic<int64_t> all_above{0};
  histogram_pass(scores, bins, bins, 1, counts, refused, [&](const uint32_t* first, int64_t count, uint32_t* table) {
    int64_t found_above = 0;
    const int64_t found =
        kernels.bracket_histogram(first, count, uint32_t(low), uint32_t(high), int(shift), table, &found_above);
    all_above += found_above;
    return found;
  });
  *static_cast<int64_t*>(above.data_ptr()) = all_above;
}

void select_words_(std::vector<Tensor> scores, int64_t threshold, bool largest, int64_t unit,
                   std::vector<Tensor> words, Tensor ties, int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  int64_t* const all_ties = static_cast<int64_t*>(ties.data_ptr());
  Units(scores, unit).share([&](int64_t at, size_t tensor, int64_t start, int64_t count) {
    uint32_t* const target = static_cast<uint32_t*>(words[tensor].data_ptr()) + start / 32;
    all_ties[at] = kernels.select_words(bits_of(scores[tensor]) + start, count, int32_t(threshold), largest, target);
  });
}

void take_ties_(std::vector<Tensor> scores, int64_t threshold, Tensor quotas, int64_t unit, std::vector<Tensor> words,
                int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  const int64_t* const quota = static_cast<const int64_t*>(quotas.data_ptr());
  Units(scores, unit).share([&](int64_t at, size_t tensor, int64_t start, int64_t count) {
    if (quota[at] == 0) return;
    uint32_t* const target = static_cast<uint32_t*>(words[tensor].data_ptr()) + start / 32;
    kernels.take_ties(bits_of(scores[tensor]) + start, count, int32_t(threshold), quota[at], target);
  });
}

void run_scores_(std::vector<Tensor> scores, int64_t granularity, std::vector<Tensor> runs, Tensor refused,
                 int64_t capability) {
  const Kernels& kernels = require_kernels(capability);
  int64_t* const all_refused = static_cast<int64_t*>(refused.data_ptr());
  std::mutex mutex;
  const int64_t unit = std::max<int64_t>(1, kPassUnit / granularity) * granularity;
  Units(scores, unit).share([&](int64_t, size_t tensor, int64_t start, int64_t count) {
    float* const target = static_cast<float*>(runs[tensor].data_ptr()) + start / granularity;
    const int64_t found = kernels.run_scores(bits_of(scores[tensor]) + start, count, granularity, target);
    if (found == 0) return;
    const std::lock_guard<std::mutex> lock(mutex);
    all_refused[tensor] += found;
  });
}

}  // namespace childtune
