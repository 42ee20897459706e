// The CUDA operators for torch: checks, the device and its current stream. It needs no CUDA header.
#include "dual_gemm_cuda.h"
#include "operators.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

namespace libortho::cuda {
namespace {

using at::Tensor;

constexpr int64_t kMost = std::numeric_limits<int>::max() - 64;  // sums of indices stay within 32 bits

void check(const Tensor& t, const char* name, at::ScalarType dtype, at::IntArrayRef sizes, at::Device device) {
  libortho::check(t, name, dtype, sizes, device);
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
                    " must begin at a multiple of 16 bytes; ", "call .clone() on it");
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
void* stream_of(const Tensor& t) {
  if (t.is_cpu()) return nullptr;  // an emulator's
  return c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()).native_handle();
}
void must(int error) { TORCH_CHECK(!error, "the CUDA kernel could not be started: ", message(error)); }

int group_of(int64_t groups, int64_t n, int64_t k) {
  TORCH_CHECK_VALUE(n > 0 && n < kMost && k > 0 && k <= kMaxColumns, "the kernel takes up to ", kMaxColumns,
                    " columns, got a weight of [", n, ", ", k, "]");
  return int(libortho::group_of(groups, k, kGroup));
}

std::tuple<Tensor, Tensor> repack_cuda(const Tensor& packed, const Tensor& scales, int64_t k) {
  const c10::DeviceGuard guard(packed.device());
  TORCH_CHECK_VALUE(packed.dim() == 2, "packed must be [n, ceil(k / 2)], got ", packed.sizes());
  TORCH_CHECK_VALUE(scales.dim() == 2, "scales must be [n, groups] or [1, 1], got ", scales.sizes());
  const int64_t n = packed.size(0);
  group_of(scales.size(1), n, k);
  check(packed, "packed", at::kByte, {n, ceil_div(k, 2)}, packed.device());
  const Tensor rows = scales_in_panels(scales, n, kRows, packed.device());
  Tensor words = at::empty({ceil_div(n, kRows), ceil_div(k, kBlock), kLanes, 4}, packed.options().dtype(at::kInt));
  must(repack(packed.const_data_ptr<uint8_t>(), int(n), int(k),
              reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>()), stream_of(packed)));
  return {words, rows};
}

// Shapes and types are checked here; places are checked by the kernels themselves, as reading them here would wait.
Weight weight_of(const Tensor& words, const Tensor& scales, const Tensor& starts, const Tensor& places,
                 const Tensor& values, int64_t n, int64_t k) {
  TORCH_CHECK_VALUE(scales.dim() == 3, "scales must be [panels, groups, 16], got ", scales.sizes());
  const int64_t panels = ceil_div(n, kRows), entries = values.numel();
  const int group = group_of(scales.size(1), n, k);
  const at::Device device = words.device();
  check(words, "words", at::kInt, {panels, ceil_div(k, kBlock), kLanes, 4}, device);
  check(scales, "scales", at::kBFloat16, {panels, k / group, kRows}, device);
  Weight w{.n = int(n), .k = int(k), .group = group};
  w.words = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  w.scales = reinterpret_cast<const uint16_t*>(scales.const_data_ptr<at::BFloat16>());
  if (entries == 0) return w;
  TORCH_CHECK_VALUE(entries < kMost, "values has ", entries, " entries, too many for 32 bits");
  check(starts, "starts", at::kInt, {panels * kRows + 1}, device);
  check(places, "places", at::kShort, {entries}, device);
  check(values, "values", at::kFloat, {entries}, device);
  w.starts = starts.const_data_ptr<int32_t>();
  w.columns = reinterpret_cast<const uint16_t*>(places.const_data_ptr<int16_t>());
  w.values = values.const_data_ptr<float>();
  w.entries = int(entries);
  return w;
}

// More tokens than the kernel takes: W(α) 32 megabytes at a time, and the library's product.
void product_of_library(const Tensor& x, const Weight& w, Tensor& y, Dtype dtype) {
  const int64_t room = (int64_t(32) << 20) / (2 * w.k) / kRows * kRows;
  const int64_t most = std::min<int64_t>(std::max<int64_t>(room, 8 * kRows), w.n);
  Tensor part = at::empty({most, w.k}, x.options());
  for (int64_t first = 0; first < w.n; first += most) {
    const int64_t rows = std::min(most, w.n - first);
    must(dequantize(w, int(first), int(rows), part.mutable_data_ptr(), dtype, stream_of(x)));
    Tensor out = y.narrow(1, first, rows);
    at::mm_out(out, x, part.narrow(0, 0, rows).t());
  }
}

Tensor dual_gemm_cuda(const Tensor& x, const Tensor& words, const Tensor& scales, const Tensor& starts,
                      const Tensor& places, const Tensor& values, int64_t n, int64_t k, bool int8) {
  const c10::DeviceGuard guard(words.device());
  const Weight w = weight_of(words, scales, starts, places, values, n, k);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
                   "x must be float16 or bfloat16 on a GPU, got ", x.scalar_type());
  TORCH_CHECK_VALUE(!int8, "int8 activations are for the CPU; leave int8 off on a GPU");
  TORCH_CHECK_VALUE(x.device() == words.device(), "x must be on ", words.device(), ", as the weight is; got ",
                    x.device());
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == k, "x must be [..., ", k, "], got ", x.sizes());
  const Dtype dtype = x.scalar_type() == at::kHalf ? Dtype::half : Dtype::bfloat16;
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  const Tensor rows = x.reshape({-1, k}).contiguous();
  const int64_t m = rows.size(0);
  Tensor y = at::empty({m, n}, rows.options());
  if (m > kMaxTokens) {
    product_of_library(rows, w, y, dtype);
  } else if (m > 0) {
    const Tensor across = w.starts && m > 1 ? rows.t().contiguous() : rows;
    must(product(rows.const_data_ptr(), across.const_data_ptr(), w, y.mutable_data_ptr(), int(m), dtype,
                 processors(x.get_device()), stream_of(x)));
  }
  return y.view(sizes);
}

}  // namespace
}  // namespace libortho::cuda

TORCH_LIBRARY_IMPL(libortho, CUDA, m) {
  m.impl("repack", &libortho::cuda::repack_cuda);
  m.impl("dual_gemm", &libortho::cuda::dual_gemm_cuda);
}
