// Runs the kernels of one capability on fixed inputs and prints a digest of every result bit, so that
// builds of other compilers and processors can be compared without torch.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/kernels.h"

using namespace childtune;

namespace {

uint64_t digest = 1469598103934665603u;

void add(const void* data, size_t bytes) {
  for (size_t at = 0; at < bytes; ++at)
    digest = (digest ^ static_cast<const unsigned char*>(data)[at]) * 1099511628211u;
}

uint64_t random_state = 88172645463325252u;

double random_unit() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return double(random_state >> 11) / 9007199254740992.0 - 0.5;
}

// A finite 16-bit pattern of either kind: exponents of bf16 and fp16 alike stay below their largest.
uint16_t random_half() {
  random_unit();
  return uint16_t(random_state >> 20) & 0xBBFFu;
}

// The child of mask words in each layout (SPEC.md, "Child layouts").
struct Child {
  std::vector<int64_t> ranks{0};
  std::vector<uint16_t> places;
  std::vector<ChildRun> runs;

  Child(const std::vector<uint32_t>& words, int64_t numel) {
    int64_t rank = 0;
    for (int64_t at = 0; at < numel; ++at) {
      if (!(words[at / 32] >> (at % 32) & 1)) continue;
      if (places.empty() || at == 0 || !(words[(at - 1) / 32] >> ((at - 1) % 32) & 1)) runs.push_back({at, rank});
      places.push_back(uint16_t(at));
      ++rank;
    }
    ranks.push_back(rank);
    runs.push_back({numel, rank});
  }
};

// `whole`: without a fixed mask, from a block's first element on, as most tensors are.
template <class Real>
void step(const Kernels& kernels, int64_t layout, int64_t dtype, int64_t grad_dtype, size_t weight_bytes, size_t grad_bytes,
          double reserve_p, bool master, bool original, bool whole = false) {
  const int64_t numel = 1003;
  std::vector<unsigned char> weight(numel * weight_bytes), grad(numel * grad_bytes);
  std::vector<Real> exp_avg(numel, Real(0)), exp_avg_sq(numel, Real(0)), masters(numel, Real(0));
  auto fill = [&](std::vector<unsigned char>& data, size_t bytes) {
    for (int64_t at = 0; at < numel; ++at) {
      const double wide = random_unit();
      const float single = float(wide);
      const uint16_t half = random_half();
      const void* source = bytes == 8 ? (const void*)&wide : bytes == 4 ? (const void*)&single : (const void*)&half;
      std::memcpy(&data[at * bytes], source, bytes);
    }
  };
  fill(weight, weight_bytes);
  fill(grad, grad_bytes);
  std::vector<uint32_t> words((numel + 31) / 32, 0xA5C3F00Fu);
  words.back() &= (1u << (numel % 32)) - 1;
  int64_t steps = 0;
  PlanRow row{};
  row.active = 1, row.numel = numel, row.weight_dtype = dtype, row.grad_dtype = grad_dtype;
  row.weight = int64_t(weight.data()), row.grad = int64_t(grad.data());
  row.exp_avg = int64_t(exp_avg.data()), row.exp_avg_sq = int64_t(exp_avg_sq.data());
  row.master_kind = master ? 1 : 0, row.master = master ? int64_t(masters.data()) : 0;
  row.mask_words = whole ? 0 : int64_t(words.data());
  row.step = int64_t(&steps), row.philox_key = 0x8BB4C9D81DFC5D36;
  row.element_contiguous = row.storage_contiguous = 1;
  row.element_map = row.storage_map = {whole ? 64 : 17, {{1, 0}, {1, 0}, {1, 0}, {numel, 1}}};
  row.storage_map.base = 0;
  const PlanGroup group = {1e-2, 0.9,  0.999, 1e-8, 0.1, reserve_p, double(uint64_t(reserve_p * 4294967296.0)),
                           0,    original ? 1.0 : 0.0, 1,    0};
  const Child child(words, numel);
  row.child_layout = layout, row.child_count = int64_t(child.places.size());
  row.run_count = int64_t(child.runs.size()) - 1, row.child_ranks = int64_t(child.ranks.data());
  row.child_places = layout == kRuns ? int64_t(child.runs.data()) : int64_t(child.places.data());
  for (steps = 1; steps <= 4; ++steps) kernels.child_adamw_row(row, group, 1.0, 0, units_of(row));
  add(weight.data(), weight.size());
  add(exp_avg.data(), exp_avg.size() * sizeof(Real));
  add(exp_avg_sq.data(), exp_avg_sq.size() * sizeof(Real));
  add(masters.data(), masters.size() * sizeof(Real));
}

void squares(const Kernels& kernels, int64_t dtype, bool contiguous) {
  const int64_t numel = 1003;  // 17 by 59
  std::vector<double> grad(numel);
  for (double& value : grad) {
    const double wide = random_unit();
    const float singles[2] = {float(wide), float(random_unit())};
    const uint16_t halves[4] = {random_half(), random_half(), random_half(), random_half()};
    const void* source = dtype == kFloat64   ? (const void*)&wide
                         : dtype == kFloat32 ? (const void*)singles
                                             : (const void*)halves;
    std::memcpy(&value, source, sizeof value);
  }
  std::vector<float> sums(numel, 0.25f);
  const IndexMap::Level whole[] = {{numel, 1}}, transposed[] = {{59, 1}, {17, 59}};
  const FisherRow row = {sums.data(), grad.data(), numel, dtype, contiguous, contiguous ? whole : transposed,
                         contiguous ? 1 : 2};
  for (int record = 0; record < 3; ++record) kernels.fisher_accumulate_row(row, 0.3f, 0, (numel + 63) / 64);
  add(sums.data(), sums.size() * sizeof(float));
}

// All passes of op topk_select over scores that crowd in a few bins, -0 and a NaN among them.
void select(const Kernels& kernels) {
  const int64_t numel = 64 * 41 + 37, granularity = 96;
  const uint32_t one = 0x3F800000u;
  std::vector<uint32_t> scores(numel);
  for (int64_t at = 0; at < numel; ++at) {
    random_unit();
    const uint32_t low = random_state >> 40 & 0xFFFu;
    scores[at] = random_state % 5 == 0 ? one : random_state % 7 == 0 ? 0x80000000u : one + (low << (low & 15u));
  }
  const int digits[3][2] = {{20, 11}, {10, 10}, {0, 10}};
  for (const auto& digit : digits) {
    std::vector<uint32_t> tables(kHistogramTables * histogram_stride(digit[1]), 0), counts(size_t(1) << digit[1], 0);
    for (int64_t changed = 0; changed < 2; ++changed) {
      scores[5] = changed ? 0x7FC00000u : one;
      const int64_t refused =
          kernels.digit_histogram(scores.data(), numel, digit[0], digit[1], one >> (digit[0] + digit[1]), tables.data());
      add(&refused, 8);
    }
    scores[5] = one;
    for (size_t bin = 0; bin < counts.size(); ++bin)
      for (int table = 0; table < kHistogramTables; ++table)
        counts[bin] += tables[table * histogram_stride(digit[1]) + bin];
    add(counts.data(), counts.size() * 4);
  }
  for (int shift : {0, 4}) {
    const uint32_t low = one - 9, high = one + 2000;
    std::vector<uint32_t> table(((high - low) >> shift) + 1);
    int64_t above = 0;
    const int64_t refused = kernels.bracket_histogram(scores.data(), numel, low, high, shift, table.data(), &above);
    add(&refused, 8);
    add(&above, 8);
    add(table.data(), table.size() * 4);
  }
  for (bool largest : {false, true}) {
    std::vector<uint32_t> words((numel + 31) / 32);
    const int64_t ties = kernels.select_words(scores.data(), numel, int32_t(one), largest, words.data());
    add(&ties, 8);
    add(words.data(), words.size() * 4);
    for (int64_t quota : {ties / 2, ties}) {
      kernels.take_ties(scores.data(), numel, int32_t(one), quota, words.data());
      add(words.data(), words.size() * 4);
    }
  }
  std::vector<float> runs((numel + granularity - 1) / granularity);
  const int64_t refused = kernels.run_scores(scores.data(), numel, granularity, runs.data());
  add(&refused, 8);
  add(runs.data(), runs.size() * 4);
}

// Sums of squares by units, before and after masks, and the sum of those.
void norms(const Kernels& kernels, int64_t dtype, size_t bytes, bool contiguous) {
  const int64_t numel = 1208 * 11;  // three units and a part of one, in a line or by columns
  std::vector<unsigned char> grad(size_t(numel) * bytes);
  for (int64_t at = 0; at < numel; ++at) {
    const double wide = random_unit();
    const float single = float(wide);
    const uint16_t half = random_half();
    const void* source = bytes == 8 ? (const void*)&wide : bytes == 4 ? (const void*)&single : (const void*)&half;
    std::memcpy(&grad[size_t(at) * bytes], source, bytes);
  }
  std::vector<uint32_t> words((numel + 31) / 32, 0xA5C3F00Fu);
  int64_t steps = 6;
  PlanRow row{};
  row.active = 1, row.numel = numel, row.grad_dtype = dtype, row.grad = int64_t(grad.data());
  row.step = int64_t(&steps), row.philox_key = 0x8BB4C9D81DFC5D36;
  row.element_contiguous = row.storage_contiguous = contiguous;
  row.element_map = {17, {{1, 0}, {1, 0}, {1, 0}, {numel, 1}}};
  row.storage_map = {0, {{1, 0}, {1, 0}, {numel / 11, 1}, {11, numel / 11}}};
  for (double reserve_p : {1.0, 0.3}) {
    PlanGroup group{};
    group.reserve_p = reserve_p, group.threshold = double(uint64_t(reserve_p * 4294967296.0));
    for (const uint32_t* fixed : {(const uint32_t*)nullptr, (const uint32_t*)words.data()}) {
      double every[4] = {}, counting[4] = {};
      kernels.gradient_norm_row(row, group, fixed, 0, 4, every, counting);
      add(every, sizeof every);
      add(counting, sizeof counting);
      kernels.gradient_norm_row(row, group, fixed, 0, 4, every, nullptr);
      const double total = kernels.unit_sum(every, 4);
      add(every, sizeof every);
      add(&total, sizeof total);
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  const Kernels* const kernels = kernels_of(std::atoi(arguments[1]));
  if (kernels == nullptr) return 1;
  for (int64_t layout : {kDense, kWords, kIndices, kRuns}) {
    for (double reserve_p : {1.0, 0.3}) {
      for (bool original : {false, true}) {
        step<float>(*kernels, layout, kFloat32, kFloat32, 4, 4, reserve_p, false, original);
        step<double>(*kernels, layout, kFloat64, kFloat64, 8, 8, reserve_p, false, original);
        for (int64_t half : {kBFloat16, kFloat16})
          for (bool master : {false, true}) {
            step<float>(*kernels, layout, half, half, 2, 2, reserve_p, master, original);
            step<float>(*kernels, layout, half, kFloat32, 2, 4, reserve_p, master, original);
          }
      }
    }
  }
  for (double reserve_p : {1.0 / 4294967296.0, 0.3}) {
    step<float>(*kernels, kDense, kFloat32, kFloat32, 4, 4, reserve_p, false, false, true);
    step<double>(*kernels, kDense, kFloat64, kFloat64, 8, 8, reserve_p, false, false, true);
    step<float>(*kernels, kDense, kFloat16, kFloat16, 2, 2, reserve_p, true, false, true);
  }
  const IndexMap column_shard = {(int64_t(1) << 35) + 5, {{3, 4000}, {5, 100}, {4, 20}, {11, 1}}};
  std::vector<uint32_t> words(21);
  kernels->keep_words(0x1234567890ABCDEFu, 7, 0, 1288490189u, column_shard, false, 660, words.data(), 0, 11);
  add(words.data(), words.size() * 4);
  for (int64_t dtype : {kFloat32, kFloat64, kBFloat16, kFloat16})
    for (bool contiguous : {true, false}) squares(*kernels, dtype, contiguous);
  select(*kernels);
  for (bool contiguous : {true, false}) {
    norms(*kernels, kFloat32, 4, contiguous);
    norms(*kernels, kFloat64, 8, contiguous);
    for (int64_t half : {kBFloat16, kFloat16}) norms(*kernels, half, 2, contiguous);
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(digest));
  return 0;
}
