// The CUDA kernel, run by an emulator, against float64, on shapes with every kind of edge: each array is exactly as
// large as the layout says, outputs are poisoned first, and sparse entries that lie outside must be left alone.
#include "cuda_emulator.h"
// The emulator comes first: it stands for the device.
#include "dual_gemm.cu"

#include <cstdio>
#include <cstdlib>
#include <random>

using namespace libortho::cuda;

namespace {

struct Case {
  int m, n, k, group;
  double density;
  int processors = 132;  // one of them lets two panels share a block of threads
  bool heavy = false;    // one row has two entries in every column, the next has none, and one entry lies outside
};

constexpr uint16_t kPoison = 0x7fff;  // not a number in either format

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
std::unique_ptr<T[], Free> array(int64_t size) {  // aligned as a GPU's allocations are, and not a byte longer
  void* p = nullptr;
  if (posix_memalign(&p, 64, size * sizeof(T))) std::abort();
  std::memset(p, 0, size * sizeof(T));
  return std::unique_ptr<T[], Free>(static_cast<T*>(p));
}

double relative(const std::vector<double>& got, const std::vector<double>& right) {
  double off = 0, size = 0;
  for (size_t i = 0; i < right.size(); ++i)
    off += (got[i] - right[i]) * (got[i] - right[i]), size += right[i] * right[i];
  return std::isfinite(off) ? std::sqrt(off / (size ? size : 1)) : INFINITY;  // a single weight may be 0
}

// Largest relative error of the product and of the weight unpacked.
template <class T>
double run(const Case& c, Dtype dtype, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  const int64_t groups = (c.k + c.group - 1) / c.group, panels = (c.n + kRows - 1) / kRows, bytes = (c.k + 1) / 2;
  const int64_t blocks = (c.k + kBlock - 1) / kBlock;
  auto packed = array<uint8_t>(c.n * bytes);
  auto scales = array<uint16_t>(panels * groups * kRows);
  for (int64_t i = 0; i < panels * groups * kRows; ++i) scales[i] = Bfloat16::narrow(0.5f + float(uniform(random)));
  std::vector<double> w(int64_t(c.n) * c.k);
  std::vector<uint16_t> columns;
  std::vector<float> values;
  auto starts = array<int32_t>(panels * kRows + 1);
  for (int64_t r = 0; r < panels * kRows; ++r) {
    for (int64_t j = 0; r < c.n && j < c.k; ++j) {
      const int q = 1 + int(random() % 15);
      packed[r * bytes + j / 2] |= uint8_t(q << (j % 2 * 4));
      w[r * c.k + j] =
          (q - 8) * double(Bfloat16::widen(scales[(r / kRows * groups + j / c.group) * kRows + r % kRows]));
      if (c.heavy && r == 2 ? true : !(c.heavy && r == 3) && uniform(random) < c.density) {
        for (int twice = c.heavy && r == 2 ? 2 : 1; twice; --twice) {
          columns.push_back(uint16_t(j)), values.push_back(normal(random));
          w[r * c.k + j] += values.back();
        }
      }
    }
    if (c.heavy && r == 0) columns.push_back(0xffff), values.push_back(1e6f);
    starts[r + 1] = int(columns.size());
  }
  auto words = array<uint32_t>(panels * blocks * kLanes * 4);
  if (repack(packed.get(), c.n, c.k, words.get(), nullptr)) std::abort();
  auto places = array<uint16_t>(columns.size());
  auto added = array<float>(values.size());
  std::copy(columns.begin(), columns.end(), places.get()), std::copy(values.begin(), values.end(), added.get());
  const Weight weight{words.get(),  scales.get(), columns.empty() ? nullptr : starts.get(),
                      places.get(), added.get(),  c.n,
                      c.k,          c.group,      int(columns.size())};

  auto x = array<uint16_t>(int64_t(c.m) * c.k), across = array<uint16_t>(int64_t(c.m) * c.k);
  auto y = array<uint16_t>(int64_t(c.m) * c.n), dense = array<uint16_t>(int64_t(c.n) * c.k);
  std::fill_n(y.get(), int64_t(c.m) * c.n, kPoison), std::fill_n(dense.get(), int64_t(c.n) * c.k, kPoison);
  for (int64_t t = 0; t < c.m; ++t)
    for (int64_t j = 0; j < c.k; ++j) across[j * c.m + t] = x[t * c.k + j] = T::narrow(normal(random));
  if (product(x.get(), c.m == 1 ? x.get() : across.get(), weight, y.get(), c.m, dtype, c.processors, nullptr))
    std::abort();
  std::vector<double> got, right;
  for (int64_t t = 0; t < c.m; ++t)
    for (int64_t r = 0; r < c.n; ++r) {
      double sum = 0;
      for (int64_t j = 0; j < c.k; ++j) sum += w[r * c.k + j] * double(T::widen(x[t * c.k + j]));
      got.push_back(T::widen(y[t * c.n + r])), right.push_back(sum);
    }
  const int first = c.n > kRows ? kRows : 0;  // a part of the rows, as the library product takes them
  if (dequantize(weight, first, c.n - first, dense.get(), dtype, nullptr)) std::abort();
  std::vector<double> unpacked, stored(w.begin() + int64_t(first) * c.k, w.end());
  for (size_t i = 0; i < stored.size(); ++i) unpacked.push_back(T::widen(dense[i]));
#ifndef __SANITIZE_THREAD__  // rows that overlap are no races of ours
  if (weight.starts) {       // starts that are nonsense must not lead outside the arrays
    for (int64_t r = 0; r <= panels * kRows; ++r) starts[r] = int32_t(random());
    if (product(x.get(), c.m == 1 ? x.get() : across.get(), weight, y.get(), c.m, dtype, c.processors, nullptr))
      std::abort();
    if (dequantize(weight, 0, c.n, std::make_unique<uint16_t[]>(int64_t(c.n) * c.k).get(), dtype, nullptr))
      std::abort();
  }
#endif
  return std::max(relative(got, right), relative(unpacked, stored));
}

}  // namespace

int main() {
  const unsigned seed = std::random_device{}();
  std::mt19937 random(seed);
  const Case cases[] = {
      {1, 1, 2, 2, 0},
      {1, 16, 64, 64, 0.05},
      {1, 33, 1100, 1100, 0.01},
      {2, 20, 96, 32, 0.5, 132, true},
      {3, 17, 65, 65, 0.3},
      {8, 48, 640, 64, 0.005},
      {9, 70, 192, 96, 0.05, 1},
      {16, 64, 256, 128, 0.05, 1, true},
      {17, 70, 160, 32, 0.1},
      {37, 65, 128, 64, 0.02, 1},
      {64, 50, 72, 72, 0.05, 1},
      {5, 31, 2112, 64, 0.02, 132, true},
      {12, 81, 2624, 64, 0.05, 1, true},
  };
  double worst = 0;
  for (const Case& c : cases) {
    const double error =
        std::max(run<Half>(c, Dtype::half, random) / 1e-3, run<Bfloat16>(c, Dtype::bfloat16, random) / 8e-3);
    if (!(error < 1))
      return std::printf("seed %u: m %d n %d k %d group %d: error %g of what is allowed\n", seed, c.m, c.n, c.k,
                         c.group, error),
             1;
    worst = std::max(worst, error);
  }
  std::printf("%zu cases, worst error %.2g of what is allowed\n", std::size(cases), worst);
}
