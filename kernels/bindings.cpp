// The operators of the dual-stream product for torch: checks, threads, and what the kernels need beside their input.
#include "operators.h"
#include "panels.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>
#include <vector>

namespace libortho {
namespace {

using at::Tensor;

std::atomic<int> isa_limit{static_cast<int>(Isa::avx512_vnni)};
Isa isa() { return std::min(best_isa(), static_cast<Isa>(isa_limit.load())); }

// Use at most this instruction set (0 plain, 1 AVX2, 2 AVX-512, 3 with VNNI; -1 changes nothing); returns the one in
// use.
int64_t limit_isa(int64_t limit) {
  TORCH_CHECK_VALUE(-1 <= limit && limit <= 3, "limit must be -1, 0, 1, 2 or 3, got ", limit);
  if (limit >= 0) isa_limit = static_cast<int>(limit);
  return static_cast<int64_t>(isa());
}

void check(const Tensor& t, const char* name, at::ScalarType dtype, at::IntArrayRef sizes) {
  libortho::check(t, name, dtype, sizes, at::kCPU);
}

std::tuple<Tensor, Tensor> repack_cpu(const Tensor& packed, const Tensor& scales, int64_t k) {
  TORCH_CHECK_VALUE(packed.dim() == 2 && k > 0, "packed must be [n, ceil(k / 2)] with k > 0, got ", packed.sizes());
  TORCH_CHECK_VALUE(scales.dim() == 2, "scales must be [n, groups] or [1, 1], got ", scales.sizes());
  const int64_t n = packed.size(0);
  check(packed, "packed", at::kByte, {n, ceil_div(k, 2)});
  const Tensor rows = scales_in_panels(scales, n, kRows, at::kCPU);
  group_of(scales.size(1), k, kBlock);
  Tensor words = at::empty({ceil_div(n, kRows), ceil_div(k, kBlock), kRows}, packed.options().dtype(at::kInt));
  repack(packed.const_data_ptr<uint8_t>(), n, k, reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>()));
  return {words, rows};
}

// All tensors of a weight, checked so that no value in them can lead the kernels out of bounds.
Weight weight_of(const Tensor& words, const Tensor& scales, const Tensor& starts, const Tensor& places,
                 const Tensor& values, int64_t n, int64_t k) {
  TORCH_CHECK_VALUE(n > 0 && k > 0, "n and k must be above 0, got ", n, " and ", k);
  TORCH_CHECK_VALUE(scales.dim() == 3, "scales must be [panels, groups, 16], got ", scales.sizes());
  Weight w{.n = n, .k = k, .group = group_of(scales.size(1), k, kBlock)};
  check(words, "words", at::kInt, {w.panels(), w.blocks(), kRows});
  check(scales, "scales", at::kBFloat16, {w.panels(), w.groups(), kRows});
  w.words = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  w.scales = reinterpret_cast<const uint16_t*>(scales.const_data_ptr<at::BFloat16>());
  const int64_t entries = values.numel();
  if (entries == 0) return w;
  check(starts, "starts", at::kInt, {w.panels() * w.chunks() + 1});
  check(places, "places", at::kShort, {entries});
  check(values, "values", at::kFloat, {entries});
  w.starts = starts.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(w.starts[0] == 0 && w.starts[w.panels() * w.chunks()] == entries &&
                        std::is_sorted(w.starts, w.starts + w.panels() * w.chunks() + 1),
                    "starts must rise from 0 to the number of entries, ", entries);
  w.places = reinterpret_cast<const uint16_t*>(places.const_data_ptr<int16_t>());
  w.values = values.const_data_ptr<float>();
  return w;
}

// Panels at which each thread begins, so that all read about as many bytes; the last one is the end.
std::vector<int64_t> split(const Weight& w, int64_t threads) {
  const int64_t dense = w.blocks() * kRows * 4 + w.groups() * kRows * 2, panels = w.panels();
  const auto before = [&](int64_t p) { return p * dense + (w.starts ? 6 * int64_t(w.starts[p * w.chunks()]) : 0); };
  std::vector<int64_t> begin{0};
  for (int64_t t = 1; t < threads; ++t) {
    int64_t low = begin.back(), high = panels;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (before(middle) * threads < before(panels) * t) low = middle + 1;
      else high = middle;
    }
    begin.push_back(low);
  }
  begin.push_back(panels);
  return begin;
}

template <class F>
void for_panels(const Weight& w, const F& f) {
  const bool small = w.n * w.k < (1 << 15);
  const int64_t threads = small || at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), w.panels());
  const auto begin = split(w, threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) f(begin[t], begin[t + 1]);
  });
}

// More tokens than the kernel takes: W(α)ᵀ eight megabytes at a time, and the library's product.
void product_of_library(const Tensor& x, const Weight& w, Tensor& y) {
  const int64_t room = (int64_t(8) << 20) / (4 * w.k) / kRows * kRows;
  const int64_t columns = std::min(std::max<int64_t>(room, 8 * kRows), w.panels() * kRows);
  Tensor part = at::empty({w.k, columns}, x.options());
  float* to = part.mutable_data_ptr<float>();
  for (int64_t row = 0; row < w.n; row += columns) {
    const int64_t rows = std::min(columns, w.n - row), p = row / kRows;
    at::parallel_for(p, p + ceil_div(rows, kRows), 1, [&](int64_t first, int64_t last) {
      dequantize(w, first, last, to + (first - p) * kRows, columns, isa());
    });
    Tensor out = y.narrow(1, row, rows);
    at::mm_out(out, x, part.narrow(1, 0, rows));
  }
}

Input input_of_many(const Tensor& x, const Weight& w, std::vector<float>& buffer) {
  buffer.resize(ceil_div(w.k, kSlice) * kSlice * x.size(0));
  Input in{};
  prepare_many(x.const_data_ptr<float>(), x.size(0), w, buffer.data(), in);
  return in;
}

Input input_of_one(const Tensor& x, const Weight& w, std::vector<float>& buffer) {
  const int64_t width = w.chunks() * kChunk;
  buffer.assign(2 * width + w.pieces(), 0.0f);
  Input in{};
  float* offset = buffer.data() + 2 * width;
  prepare_one(x.const_data_ptr<float>(), w, buffer.data(), buffer.data() + width, offset, in);
  // An infinity taken out beforehand would leave nothing but NaN; the way of several tokens takes none out.
  if (!std::all_of(offset, offset + w.pieces(), [](float v) { return std::isfinite(v); }))
    in = input_of_many(x, w, buffer);
  return in;
}

struct Bytes {
  std::vector<float> padded, step, sums;
  std::vector<int8_t> bytes;
};

Input input_of_bytes(const Tensor& x, const Weight& w, Bytes& b) {
  const int64_t m = x.size(0);
  b.padded.assign(m * w.chunks() * kChunk, 0.0f), b.step.assign(m, 0.0f), b.sums.assign(m * w.groups(), 0.0f);
  b.bytes.assign(m * w.blocks() * kBlock, 0);
  Input in{};
  prepare_int8(x.const_data_ptr<float>(), m, w, b.padded.data(), b.bytes.data(), b.step.data(), b.sums.data(), in);
  return in;
}

Tensor dual_gemm_cpu(const Tensor& x, const Tensor& words, const Tensor& scales, const Tensor& starts,
                     const Tensor& places, const Tensor& values, int64_t n, int64_t k, bool int8) {
  const Weight w = weight_of(words, scales, starts, places, values, n, k);
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "x must be float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_VALUE(x.device().is_cpu(), "x must be on the CPU, as the weight is; got ", x.device());
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == k, "x must be [..., ", k, "], got ", x.sizes());
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  const Tensor rows = x.reshape({-1, k}).to(at::kFloat).contiguous();
  const int64_t m = rows.size(0);
  Tensor y = at::empty({m, n}, rows.options());
  float* to = y.mutable_data_ptr<float>();
  if (m > kMaxTokens) {
    product_of_library(rows, w, y);
  } else if (m > 0 && int8) {
    Bytes b;
    const Input in = input_of_bytes(rows, w, b);
    for_panels(w, [&](int64_t first, int64_t last) { product_int8(in, w, first, last, to, isa()); });
  } else if (m > 0) {
    std::vector<float> buffer;
    const Input in = m == 1 ? input_of_one(rows, w, buffer) : input_of_many(rows, w, buffer);
    for_panels(w, [&](int64_t first, int64_t last) { product(in, w, first, last, to, isa()); });
  }
  return y.to(dtype).view(sizes);
}

Tensor dual_gemm_autograd(const Tensor& x, const Tensor& words, const Tensor& scales, const Tensor& starts,
                          const Tensor& places, const Tensor& values, int64_t n, int64_t k, bool int8) {
  TORCH_CHECK(!(at::GradMode::is_enabled() && (x.requires_grad() || values.requires_grad())),
              "libortho::dual_gemm has no gradient. Use it under torch.no_grad(), or take the reference path ",
              "(LIBORTHO_BACKEND=reference), which has one.");
  at::AutoDispatchBelowAutograd below;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("libortho::dual_gemm", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                           const Tensor&, int64_t, int64_t, bool)>();
  return op.call(x, words, scales, starts, places, values, n, k, int8);
}

}  // namespace
}  // namespace libortho

TORCH_LIBRARY(libortho, m) {
  m.def("repack(Tensor packed, Tensor scales, int k) -> (Tensor, Tensor)");
  m.def(
      "dual_gemm(Tensor x, Tensor words, Tensor scales, Tensor starts, Tensor places, Tensor values, "
      "int n, int k, bool int8=False) -> Tensor");
  m.def("limit_isa(int limit) -> int", &libortho::limit_isa);
}
TORCH_LIBRARY_IMPL(libortho, CPU, m) {
  m.impl("repack", &libortho::repack_cpu);
  m.impl("dual_gemm", &libortho::dual_gemm_cpu);
}
TORCH_LIBRARY_IMPL(libortho, Autograd, m) { m.impl("dual_gemm", &libortho::dual_gemm_autograd); }
