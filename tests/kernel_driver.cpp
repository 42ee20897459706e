// Calls the CPU kernel on random shapes from a plain program, so that it can run under address sanitizer: every array
// is exactly as large as the layout says, and whatever is read or written beside one ends the program.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "panels.h"

using namespace libortho;

// Arrays of exactly this size on the heap; a vector may hold more.
template <class T>
std::unique_ptr<T[]> array(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]());
}

int main() {
  const unsigned seed = std::random_device{}();
  std::mt19937 random(seed);
  const auto below = [&](int64_t n) { return int64_t(random() % n); };
  std::normal_distribution<float> normal;
  double worst = 0;
  int cases = 0;
  for (int round = 0; round < 150; ++round) {
    const int64_t groups = below(2) ? 1 : 1 + below(5);
    const int64_t group = groups == 1 ? 1 + below(300) : 8 * (1 + below(24));
    const int64_t n = 1 + below(70), m = below(3) ? 1 + below(kMaxTokens) : 1;
    const int64_t k = round % 10 ? groups * group : 4090 + below(4200);
    const int64_t size = k == groups * group ? group : k;
    Weight w{.n = n, .k = k, .group = size};
    const int64_t bytes = ceil_div(k, 2), panels = w.panels();
    auto packed = array<uint8_t>(n * bytes);
    auto words = array<uint32_t>(panels * w.blocks() * kRows);
    auto scales = array<uint16_t>(panels * w.groups() * kRows);
    std::vector<double> dense(n * k);
    for (int64_t i = 0; i < panels * w.groups() * kRows; ++i) scales[i] = uint16_t(0x3f00 + below(256));
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < k; ++c) {
        const int q = int(1 + below(15));
        packed[r * bytes + c / 2] |= uint8_t(q << (c % 2 * 4));
        const uint32_t bits = uint32_t(scales[(r / kRows * w.groups() + c / size) * kRows + r % kRows]) << 16;
        float scale;
        __builtin_memcpy(&scale, &bits, 4);
        dense[r * k + c] = double(q - 8) * scale;
      }
    repack(packed.get(), n, k, words.get());
    w.words = words.get(), w.scales = scales.get();
    std::vector<std::vector<std::pair<uint16_t, float>>> runs(panels * w.chunks());
    int64_t entries = 0;
    for (int64_t c = 0; c < k; ++c)
      for (int64_t r = 0; r < n; ++r)
        if (below(20) == 0) {
          const float value = normal(random);
          runs[r / kRows * w.chunks() + c / kChunk].push_back({uint16_t(c % kChunk * kRows + r % kRows), value});
          dense[r * k + c] += value, ++entries;
        }
    auto starts = array<int32_t>(runs.size() + 1);
    auto places = array<uint16_t>(entries);
    auto values = array<float>(entries);
    for (size_t i = 0, at = 0; i < runs.size(); ++i) {
      for (const auto& [place, value] : runs[i]) places[at] = place, values[at++] = value;
      starts[i + 1] = int32_t(at);
    }
    w.starts = starts.get(), w.places = places.get(), w.values = values.get();
    auto x = array<float>(m * k);
    for (int64_t i = 0; i < m * k; ++i) x[i] = normal(random);
    for (int isa = 0; isa <= int(best_isa()); ++isa) {
      auto y = array<float>(m * n), coarse = array<float>(m * n);
      auto turned = array<float>(k * panels * kRows);
      for (int64_t i = 0; i < m * n; ++i) y[i] = NAN;
      Input in{};
      auto padded = array<float>(w.chunks() * kChunk), folded = array<float>(w.chunks() * kChunk);
      auto offset = array<float>(w.pieces());
      auto wide = array<float>(m * w.chunks() * kChunk), step = array<float>(m), sums = array<float>(m * w.groups());
      auto small = array<int8_t>(m * w.blocks() * kBlock);
      prepare_int8(x.get(), m, w, wide.get(), small.get(), step.get(), sums.get(), in);
      const int64_t middle = below(panels + 1);
      product_int8(in, w, 0, middle, coarse.get(), Isa(isa));
      product_int8(in, w, middle, panels, coarse.get(), Isa(isa));
      auto sliced = array<float>(ceil_div(k, kSlice) * kSlice * m);
      prepare_many(x.get(), m, w, sliced.get(), in);
      if (m == 1) prepare_one(x.get(), w, padded.get(), folded.get(), offset.get(), in);
      product(in, w, 0, middle, y.get(), Isa(isa));
      product(in, w, middle, panels, y.get(), Isa(isa));
      dequantize(w, 0, panels, turned.get(), panels * kRows, Isa(isa));
      double difference = 0, norm = 0, rounding = 0;
      for (int64_t t = 0; t < m; ++t)
        for (int64_t r = 0; r < n; ++r) {
          double right = 0, again = 0, terms = 0;  // a single sum may cancel to nothing, its terms do not
          for (int64_t c = 0; c < k; ++c) {
            right += dense[r * k + c] * x[t * k + c];
            terms += std::pow(dense[r * k + c] * x[t * k + c], 2);
            again += double(turned[c * panels * kRows + r]) * x[t * k + c];
          }
          difference += std::pow(y[t * n + r] - right, 2) + std::pow(again - right, 2), norm += std::max(right * right, terms);
          rounding += std::pow(coarse[t * n + r] - right, 2);
        }
      const double error = std::sqrt(difference / norm);
      if (!(error <= 1e-5 && std::sqrt(rounding / norm) <= 5e-2)) {
        std::printf("seed %u, isa %d, n %ld, k %ld, group %ld, m %ld: relative errors %g and %g\n", seed, isa, long(n),
                    long(k), long(size), long(m), error, std::sqrt(rounding / norm));
        return 1;
      }
      worst = std::max(worst, error), ++cases;
    }
  }
  std::printf("%d cases, worst relative error %.1e\n", cases, worst);
}
