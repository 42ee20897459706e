// The CUDA operators over the emulator, for tensors on the CPU: so that Python can hold its side of the layout against
// them.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "cuda_emulator.h"
// The emulator stands for the device, and comes first.
#include "dual_gemm.cu"

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) [[maybe_unused]] static void registered(torch::Library& m)
#include "bindings_cuda.cpp"

TORCH_LIBRARY(libortho_emulated, m) {
  m.def("repack(Tensor packed, Tensor scales, int k) -> (Tensor, Tensor)", &libortho::cuda::repack_cuda);
  m.def(
      "dual_gemm(Tensor x, Tensor words, Tensor scales, Tensor starts, Tensor places, Tensor values, "
      "int n, int k, bool int8=False) -> Tensor",
      &libortho::cuda::dual_gemm_cuda);
}
