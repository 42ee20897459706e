// What the operators of both kernels check of their tensors, and the order of scales that they share.
#pragma once
#include <ATen/ATen.h>

namespace libortho {

inline void check(const at::Tensor& t, const char* name, at::ScalarType dtype, at::IntArrayRef sizes,
                  at::Device device) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == device, name, " must be on ", device, ", got ", t.device());
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous; call .contiguous() on it");
}

// Columns that share a scale: a multiple of `step`, or all of them.
inline int64_t group_of(int64_t groups, int64_t k, int64_t step) {
  TORCH_CHECK_VALUE(groups > 0 && k % groups == 0, "k = ", k, " columns do not divide into ", groups,
                    " groups of scales");
  TORCH_CHECK_VALUE(groups == 1 || k / groups % step == 0, "groups of ", k / groups, " columns; the kernel takes ",
                    "multiples of ", step, ", or one group a row");
  return k / groups;
}

// Scales [n, groups], or one for all, as [panels, groups, rows of a panel]; zeros beyond the last row.
inline at::Tensor scales_in_panels(const at::Tensor& scales, int64_t n, int64_t rows, at::Device device) {
  TORCH_CHECK_VALUE(scales.size(0) == n || scales.numel() == 1, "scales must be [", n, ", groups] or [1, 1], got ",
                    scales.sizes());
  check(scales, "scales", at::kBFloat16, scales.sizes(), device);
  const int64_t panels = (n + rows - 1) / rows, groups = scales.size(1);
  at::Tensor all = at::zeros({panels * rows, groups}, scales.options());
  all.narrow(0, 0, n).copy_(scales.expand({n, groups}));
  return all.view({panels, rows, groups}).transpose(1, 2).contiguous();
}

}  // namespace libortho
