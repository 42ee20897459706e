"""The CUDA kernel where there is no GPU: run by an emulator, compiled by nvcc; and on a GPU where there is one."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_kernel import BOUND, error, needs_kernel, run, weight

from libortho import build, kernel
from libortho.build import KernelError
from libortho.kernel import Panels, deltas, dual_gemm, repack, sparse
from libortho.linear import OrthoLinear
from libortho.streams import Base, OrthoConfig

HERE = Path(__file__).parent
needs_nvcc = pytest.mark.skipif(not build._nvcc(), reason="no nvcc")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or not build._nvcc(), reason="no GPU, or no nvcc")
SANITIZER = shutil.which("compute-sanitizer", path=str(Path(build._nvcc()).parent)) or shutil.which("compute-sanitizer")
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@needs_kernel
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_emulated_on_every_kind_of_shape_without_a_wild_access_or_a_race(sanitizer, tmp_path):
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{build.sources()}"]
    run("g++", "-pthread", *flags, HERE / "cuda_driver.cpp", "-o", tmp_path / "driver")
    assert "cases, worst error" in run(tmp_path / "driver")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    "The CUDA operators over the emulator, for tensors on the CPU."
    out = tmp_path_factory.mktemp("emulated") / "ops.so"
    told, linked = build._recipe()["arguments"](Path(torch.__file__).parent, torch.compiled_with_cxx11_abi(), "cuda")
    flags = [*told, "-O1", "-shared", "-fPIC", "-pthread", f"-I{build.sources()}"]
    run("g++", *flags, HERE / "cuda_ops.cpp", "-o", out, *linked)
    torch.ops.load_library(out)
    return torch.ops.libortho_emulated


def product(ops, x, base, compartments, alpha):
    panels = Panels(*ops.repack(base.packed, base.scales, base.width), *base.shape)
    s = sparse(panels, deltas(base, compartments, "cuda"), alpha)
    return ops.dual_gemm(x, panels.words, panels.scales, s.starts, s.places, s.values, panels.n, panels.k)


@needs_kernel
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("n, k, group", [(33, 128, 64), (20, 96, 32), (17, 70, 0), (40, 256, 128)])
def test_emulated_operators_take_what_python_lays_out(emulated, dtype, n, k, group):
    base, compartments = weight(n, k, group, [0.05, 0.3])
    for m in (1, 5, 16, 65):
        x = torch.randn(m, 2, k).to(dtype).transpose(0, 1)[0]
        for alpha in ({"c0": 1.0, "c1": 0.0}, {"c0": 0.3, "c1": 1.0}, {"c0": 0.0, "c1": 0.0}):
            y = product(emulated, x, base, compartments, alpha)
            assert y.dtype == dtype and error(y, x, base, compartments, alpha) <= BOUND[dtype]


@needs_kernel
def test_emulated_product_is_the_same_each_time(emulated):
    base, compartments = weight(40, 512, 64, [0.2])
    x, alpha = torch.randn(9, 512, dtype=torch.float16), {"c0": 1.0}
    first = product(emulated, x, base, compartments, alpha)
    assert all(torch.equal(product(emulated, x, base, compartments, alpha), first) for _ in range(3))


@needs_kernel
def test_emulated_operators_refuse_bad_input(emulated):
    base, _ = weight(20, 64, 64)
    words, scales = emulated.repack(base.packed, base.scales, 64)
    none = [torch.empty(0, dtype=d) for d in (torch.int32, torch.int16, torch.float32)]
    x = torch.randn(2, 64).half()
    with pytest.raises(TypeError, match="x must be float16 or bfloat16 on a GPU"):
        emulated.dual_gemm(x.float(), words, scales, *none, 20, 64)
    with pytest.raises(ValueError, match="int8 activations are for the CPU"):
        emulated.dual_gemm(x, words, scales, *none, 20, 64, True)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\]"):
        emulated.dual_gemm(x[:, :63], words, scales, *none, 20, 64)
    with pytest.raises(ValueError, match="words must have shape"):
        emulated.dual_gemm(x, words[:1], scales, *none, 20, 64)
    with pytest.raises(ValueError, match="places must have shape"):
        starts = torch.zeros(33, dtype=torch.int32)
        emulated.dual_gemm(x, words, scales, starts, none[1], torch.ones(3), 20, 64)
    with pytest.raises(ValueError, match="the kernel takes multiples of 32"):
        emulated.repack(base.packed, base.scales.expand(20, 4).contiguous(), 64)


def test_a_device_without_a_kernel_is_told():
    base = Base(torch.empty(4, 32, dtype=torch.uint8, device="meta"), torch.empty(4, 1, device="meta"), 64)
    assert "it is on meta" in kernel.why_not(base)
    with pytest.raises(ValueError, match="it is on meta"):
        repack(base)


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_nvcc_compiles_the_kernel_for(arch, tmp_path):
    out = tmp_path / "kernel.o"
    told = run(build._nvcc(), "-O3", "-std=c++20", f"-arch={arch}", "-Xptxas", "-v", "-c",
               build.sources() / "dual_gemm.cu", "-o", out)  # fmt: skip
    assert out.stat().st_size and "bytes stack frame" in told
    assert not re.search(r"\b[1-9]\d* bytes (stack frame|spill)", told), "an array is not in registers"


@needs_nvcc
def test_nvcc_builds_the_whole_library_and_torch_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path))
    path = build.build("sm_90")
    assert path == build.cached_library("sm_90") != build.cached_library("sm_80")
    code = f"""
import torch
from libortho import kernel
kernel.load()
torch.ops.load_library({str(path)!r})
print(torch._C._dispatch_has_kernel_for_dispatch_key("libortho::dual_gemm", "CUDA"))
"""
    assert run(sys.executable, "-c", code) == "True\n"


def test_without_a_gpu_the_wish_for_one_is_an_error_there_only(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert kernel.backend("cuda") == "reference"
    monkeypatch.setenv("LIBORTHO_BACKEND", "cuda")
    assert kernel.backend("cpu") in ("cpu", "reference")
    for asked in (lambda: kernel.backend("cuda"), kernel.diagnosis):
        with pytest.raises(KernelError, match="torch sees no CUDA device"):
            asked()


def on_gpu(base, compartments):
    kernel.load("cuda")
    there = Base(base.packed.cuda(), base.scales.cuda(), base.width)
    found = deltas(base, compartments, "cuda")
    return repack(there), {c: (key.cuda(), value.cuda()) for c, (key, value) in found.items()}


def wide():
    "Rows enough for two panels to share a block of threads on this GPU, the last without a partner."
    return kernel._rows_for_pairs() if torch.cuda.is_available() else 1


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("n, k, group", [(1, 2, 0), (33, 128, 64), (70, 384, 128), (48, 4100, 0), (wide(), 4096, 64)])
@pytest.mark.parametrize("density", [0.0, 0.005, 0.5])
def test_on_a_gpu_against_float64(n, k, group, density, dtype):
    base, compartments = weight(n, k, group, [density, 0.3])
    panels, found = on_gpu(base, compartments)
    for m in (1, 2, 7, 8, 9, 15, 16, 17, 33, 64, 65, 500):
        x = torch.randn(m, k).to(dtype)
        for alpha in ({"c0": 0.0, "c1": 0.0}, {"c0": 0.3, "c1": 1.0}):
            y = dual_gemm(x.cuda(), panels, sparse(panels, found, alpha)).cpu()
            assert error(y, x, base, compartments, alpha) <= BOUND[dtype], (m, alpha)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_on_a_gpu_every_weight_is_in_its_place(dtype):
    base, _ = weight(80, 128, 64)
    panels, found = on_gpu(base, {})
    for first in (0, 64):
        x = torch.eye(128, dtype=dtype, device="cuda")[first : first + 64]
        y = dual_gemm(x, panels, sparse(panels, found, {})).cpu()
        assert torch.equal(y.T, base.dequantize()[:, first : first + 64].to(dtype))


@pytest.mark.cuda
@needs_gpu
def test_on_a_gpu_a_graph_captures_a_layer(monkeypatch):
    monkeypatch.setenv("LIBORTHO_BACKEND", "cuda")
    layer = OrthoLinear.from_linear(torch.nn.Linear(512, 256), OrthoConfig(density=0.01)).cuda().half()
    x = torch.randn(4, 512, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        right = layer(x).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.zero_()
        graph.replay()
    assert layer.takes_kernel(x) and torch.equal(y, right)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.skipif(not SANITIZER, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_on_a_gpu_the_sanitizer_finds_nothing(tool):
    code = "from libortho import kernel; print(kernel.check_cuda())"
    assert "{" in run(SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code)
