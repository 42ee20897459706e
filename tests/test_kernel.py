"""The compiled product against float64, its checks, its build, and the layer that uses it."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import library
from torch.nn import functional as F

import libortho as lo
from libortho import build, kernel
from libortho.build import KernelError
from libortho.kernel import Product, Sparse, deltas, dual_gemm, reference, repack, sparse
from libortho.lattice import pack
from libortho.linear import OrthoLinear
from libortho.streams import Base, compress

needs_kernel = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
pytestmark = needs_kernel
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def every_instruction_set_again():
    yield
    if not kernel._load():
        torch.ops.libortho.limit_isa(3)


def isas():
    kernel.load()
    return range(torch.ops.libortho.limit_isa(3) + 1)


def run(*command):
    "What a command printed; a barrier that not all threads reach would hang the emulator, so time is limited."
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def weight(n, k, group, densities=(), seed=None):
    "A random base and compartments, which may overlap."
    gen = torch.Generator()
    gen.seed() if seed is None else gen.manual_seed(seed)
    q = torch.randint(-7, 8, (n, k), generator=gen, dtype=torch.int8)
    scales = (torch.rand(n, k // group if group else 1, generator=gen) + 0.5).bfloat16()
    base = Base(pack(q), scales, k)
    masks = [torch.rand(n, k, generator=gen) < d for d in densities]
    return base, {f"c{i}": compress(torch.randn(n, k, generator=gen), m) for i, m in enumerate(masks)}


def error(y, x, base, compartments, alpha):
    "Relative to the product in float64, of the input as the kernel saw it."
    exact = base.dequantize().double()
    for name, c in compartments.items():
        at = c.index()
        exact[at] += alpha[name] * (c.values.double() - base.dequantize().double()[at])
    right = x.double() @ exact.T
    return ((y.double() - right).norm() / (right.norm() or 1.0)).item()  # a single weight may be 0


def product_of(x, base, compartments, alpha, **kwargs):
    panels = repack(base)
    return dual_gemm(x, panels, sparse(panels, deltas(base, compartments), alpha), **kwargs)


SHAPES = [(1, 1, 0), (5, 7, 0), (16, 64, 32), (33, 128, 64), (70, 384, 128), (48, 4100, 0), (17, 4224, 64)]


@pytest.mark.parametrize("n, k, group", SHAPES)
@pytest.mark.parametrize("density", [0.0, 1e-4, 0.005, 0.05, 0.5])
def test_against_float64(n, k, group, density):
    base, compartments = weight(n, k, group, [density])
    panels = repack(base)
    found = deltas(base, compartments)
    for isa in isas():
        torch.ops.libortho.limit_isa(isa)
        for a in (0.0, 0.3, 1.0):
            stream = sparse(panels, found, {"c0": a})
            for m in (1, 2, 3, 5, 6, 7, 11, 16, 17, 33, 64, 128, 129):
                x = torch.randn(m, k)
                worst = error(dual_gemm(x, panels, stream), x, base, compartments, {"c0": a})
                assert worst <= 1e-5, (isa, a, m, worst)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("m", [*range(1, 65), 65, 127, 128, 129, 500])
def test_every_number_of_tokens(dtype, m):
    base, compartments = weight(37, 192, 64, [0.05])
    x = torch.randn(m, 192).to(dtype)
    y = product_of(x, base, compartments, {"c0": 1.0})
    assert y.dtype == dtype and error(y, x, base, compartments, {"c0": 1.0}) <= BOUND[dtype]


def test_long_rows_with_one_scale_lose_no_digits():
    base, compartments = weight(32, 11008, 0, [0.005])
    x = torch.randn(1, 11008) + 3  # the offsets are large
    assert error(product_of(x, base, compartments, {"c0": 1.0}), x, base, compartments, {"c0": 1.0}) <= 1e-5


def test_one_scale_for_all():
    base, _ = weight(20, 64, 0)
    base = Base(base.packed, base.scales[:1], 64)
    x = torch.randn(4, 64)
    assert error(product_of(x, base, {}, {}), x, base, {}, {}) <= 1e-5


@pytest.mark.parametrize("m", [1, 9, 140])
def test_several_compartments_that_overlap(m):
    base, compartments = weight(40, 256, 64, [0.05, 0.3, 0.0])
    x = torch.randn(m, 256)
    for alpha in ({"c0": 1.0, "c1": 0.0, "c2": 1.0}, {"c0": 0.3, "c1": 1.0, "c2": 0.0}):
        assert error(product_of(x, base, compartments, alpha), x, base, compartments, alpha) <= 1e-5
        assert torch.allclose(
            product_of(x, base, compartments, alpha), reference(x, base, compartments, alpha), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("m", [1, 16, 140])
def test_empty_and_heavy_rows(m):
    base, _ = weight(40, 512, 64)
    mask = torch.zeros(40, 512, dtype=torch.bool)
    mask[17] = True  # all of one row, nothing of the others
    compartments = {"c0": compress(torch.randn(40, 512), mask)}
    x = torch.randn(m, 512)
    assert error(product_of(x, base, compartments, {"c0": 1.0}), x, base, compartments, {"c0": 1.0}) <= 1e-5


@pytest.mark.parametrize("isa", [0, 1, 2, 3])
@pytest.mark.parametrize("m", [1, 3, 16, 64])
def test_int8_activations(isa, m):
    if isa not in isas():
        pytest.skip("not on this processor")
    torch.ops.libortho.limit_isa(isa)
    base, compartments = weight(37, 384, 128, [0.05])
    x = torch.randn(m, 384)
    y = product_of(x, base, compartments, {"c0": 1.0}, int8=True)
    step = x.abs().amax(1, keepdim=True) / 127
    panels = repack(base)
    rounded = (x / step).round() * step  # what the bytes say; the sparse stream sees x itself
    only = sparse(panels, deltas(base, compartments), {"c0": 1.0})
    none = sparse(panels, {}, {})
    right = dual_gemm(rounded, panels, none) + dual_gemm(x, panels, only) - dual_gemm(x, panels, none)
    assert (y - right).norm() / right.norm() <= 1e-5
    assert error(y, x, base, compartments, {"c0": 1.0}) <= 2e-2


@pytest.mark.parametrize("m", [1, 2, 16, 128, 129])
@pytest.mark.parametrize("int8", [False, True])
def test_several_chunks_and_parts(m, int8):
    "Wide enough for three runs of 4096 columns, and for the library's way to go part by part."
    base, compartments = weight(300, 8704, 64, [0.05])
    x = torch.randn(m, 8704)
    y = product_of(x, base, compartments, {"c0": 1.0}, int8=int8)
    assert error(y, x, base, compartments, {"c0": 1.0}) <= (2e-2 if int8 and m <= kernel.TOKENS else 1e-5)


def test_int8_with_one_scale_a_row():
    base, compartments = weight(20, 4100, 0, [0.5])
    x = torch.randn(3, 4100)
    y = product_of(x, base, compartments, {"c0": 1.0}, int8=True)
    assert error(y, x, base, compartments, {"c0": 1.0}) <= 2e-2


@pytest.mark.parametrize("m", [1, 2])
def test_infinities_are_the_references(m):
    base, _ = weight(32, 192, 64)  # more than a slice
    x = torch.randn(m, 192)
    x[0, 5] = float("inf")
    y, right = product_of(x, base, {}, {}), reference(x, base, {})
    assert torch.equal(y.isinf(), right.isinf()) and torch.equal(y[right.isinf()], right[right.isinf()])


def test_what_is_not_finite_stays_so():
    base, _ = weight(16, 64, 64)
    x = torch.randn(2, 64)
    x[1, 5] = float("nan")
    for int8 in (False, True):
        y = product_of(x, base, {}, {}, int8=int8)
        assert y[0].isfinite().all() and y[1].isnan().all()


def test_outputs_are_all_written():
    "Memory that was full of NaN a moment ago is handed out again; none may be left in the result."
    base, compartments = weight(50, 64, 64, [0.05])
    for m in (1, 6, 64, 100):
        for _ in range(5):
            junk = [torch.full((m, 50), float("nan")) for _ in range(8)]
            del junk
            assert product_of(torch.randn(m, 64), base, compartments, {"c0": 1.0}).isfinite().all()


def test_shapes_strides_and_nothing():
    base, compartments = weight(24, 64, 32, [0.05])
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    assert not x.is_contiguous()
    y = product_of(x, base, compartments, {"c0": 1.0})
    assert y.shape == (2, 3, 24)
    assert torch.equal(y, product_of(x.contiguous(), base, compartments, {"c0": 1.0}))
    assert product_of(x[:0], base, compartments, {"c0": 1.0}).shape == (0, 3, 24)
    assert product_of(torch.randn(64), base, compartments, {"c0": 1.0}).shape == (24,)


@pytest.mark.parametrize("m, int8", [(1, False), (16, False), (100, False), (200, False), (1, True), (16, True)])
def test_threads_do_not_change_a_bit(m, int8):
    base, compartments = weight(400, 512, 64, [0.05])
    x, before = torch.randn(m, 512), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(product_of(x, base, compartments, {"c0": 1.0}, int8=int8))
    finally:
        torch.set_num_threads(before)
    same = torch.equal if m <= kernel.TOKENS else torch.allclose  # beyond, the sums are the library's
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_a_closed_switch_is_not_there():
    base, compartments = weight(20, 64, 64, [0.3, 0.1])
    panels = repack(base)
    stream = sparse(panels, deltas(base, compartments), {"c0": 0.0, "c1": 1.0})
    assert len(stream.values) == compartments["c1"].nnz
    closed = sparse(panels, deltas(base, compartments), {"c0": 0.0, "c1": 0.0})
    x = torch.randn(3, 64)
    assert torch.equal(dual_gemm(x, panels, closed), product_of(x, base, {}, {}))


def test_bad_input_is_refused():
    base, compartments = weight(20, 64, 64, [0.3])
    panels = repack(base)
    stream = sparse(panels, deltas(base, compartments), {"c0": 1.0})
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\], got \[2, 63\]"):
        dual_gemm(x[:, :63], panels, stream)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        dual_gemm(x.double(), panels, stream)
    with pytest.raises(ValueError, match="starts must rise from 0"):
        dual_gemm(x, panels, Sparse(stream.starts + 1, stream.places, stream.values))
    with pytest.raises(ValueError, match="starts must rise from 0"):
        bad = stream.starts.clone()
        bad[0:2] = torch.tensor([0, 2**30])
        dual_gemm(x, panels, Sparse(bad, stream.places, stream.values))
    with pytest.raises(ValueError, match="places must have shape"):
        dual_gemm(x, panels, Sparse(stream.starts, stream.places[:-1], stream.values))
    with pytest.raises(ValueError, match="words must have shape"):
        panels_ = repack(weight(40, 64, 64)[0])
        dual_gemm(x, kernel.Panels(panels_.words, panels.scales, 20, 64), stream)
    with pytest.raises(ValueError, match="multiples of 8"):
        repack(weight(4, 20, 10)[0])
    with pytest.raises(RuntimeError, match="has no gradient"):
        dual_gemm(x.requires_grad_(), panels, stream)


@needs_kernel
@pytest.mark.parametrize("which", range(6))
def test_a_tensor_without_memory_among_others_gives_no_result(which):
    base, compartments = weight(33, 64, 16, [0.1])
    panels = repack(base)
    s = sparse(panels, deltas(base, compartments), {"c0": 1.0})
    tensors = [torch.randn(3, 64), panels.words, panels.scales, s.starts, s.places, s.values]
    tensors[which] = tensors[which].to("meta")
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        torch.ops.libortho.dual_gemm(*tensors, 33, 64, False)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("m", [1, 16, 140])
def test_wild_places_read_nothing_outside(m, int8):
    "Any 16 bits are a place inside buffers that are large enough for all of them, and columns past the last are zeros."
    base, _ = weight(16, 72, 0)
    panels = repack(base)
    places = torch.arange(-32768, 32768).short()
    places = places[(places.int() & 0xFFFF).argsort()]
    outside = ((places.int() & 0xFFFF) >> 4 >= 72).float()
    wild = Sparse(torch.tensor([0, len(places)], dtype=torch.int32), places, outside)
    x = torch.randn(m, 72)
    assert torch.equal(dual_gemm(x, panels, wild, int8), dual_gemm(x, panels, sparse(panels, {}, {}), int8))


def test_opcheck():
    base, compartments = weight(20, 64, 64, [0.3])
    panels = repack(base)
    stream = sparse(panels, deltas(base, compartments), {"c0": 1.0})
    tensors = (panels.words, panels.scales, stream.starts, stream.places, stream.values)
    for m in (1, 5, 140):
        library.opcheck(torch.ops.libortho.dual_gemm, (torch.randn(m, 64), *tensors, 20, 64, False))
    library.opcheck(torch.ops.libortho.repack, (base.packed, base.scales, 64))


def small_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 32, bias=False))
    lo.patch(model, lo.OrthoConfig(group_size=32, density=0.05))
    return model.eval()


def test_a_compiled_model_has_no_graph_break():
    model, x = small_model(), torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)  # the first call repacks the weights, which is not traced
        graphs = []
        traced = torch.compile(model, backend=lambda g, _: graphs.append(g) or g.forward, fullgraph=True)
        assert torch.allclose(traced(x), expected, atol=1e-6)
        assert sum("dual_gemm" in str(n.target) for n in graphs[0].graph.nodes) == 2
        for a in [i / 20 for i in range(20)]:  # more positions than torch would compile anew for
            lo.set_alpha(model, a)
            assert torch.allclose(traced(x), model(x), atol=1e-6) and not torch.allclose(model(x), expected)
        assert len(graphs) <= 3


@pytest.mark.parametrize("dtype", BOUND)
def test_a_layer_takes_the_kernel_and_says_so(dtype, monkeypatch):
    layer = OrthoLinear.from_linear(torch.nn.Linear(64, 48, dtype=dtype), lo.OrthoConfig(density=0.05))
    few, many = torch.randn(2, 3, 64, dtype=dtype), torch.randn(200, 64, dtype=dtype)
    assert layer.takes_kernel(few) and not layer.takes_kernel(many)
    assert not layer.takes_kernel(few.clone().requires_grad_())
    with torch.no_grad():
        for a in (1.0, 0.3, 0.0):
            layer.set_alpha(a)
            right = F.linear(few.double(), layer.dequantize().double(), layer.bias.double())
            assert (layer(few) - right).norm() / right.norm() <= BOUND[dtype]
        monkeypatch.setenv("LIBORTHO_BACKEND", "reference")
        assert not layer.takes_kernel(few)
        assert torch.equal(layer(few), F.linear(few, layer.weight, layer.bias))
        monkeypatch.setenv("LIBORTHO_BACKEND", "gpu")
        with pytest.raises(ValueError, match="LIBORTHO_BACKEND must be one of auto, cpu, cuda, reference, got 'gpu'"):
            layer(few)


def test_without_keeping_the_weight_the_kernel_takes_everything():
    layer = OrthoLinear.from_linear(torch.nn.Linear(64, 48), lo.OrthoConfig(density=0.05), keep_dense=False)
    x = torch.randn(100, 64)
    with torch.no_grad():
        assert layer.takes_kernel(x) and layer._dense is None
        assert torch.allclose(layer(x), F.linear(x, layer.dequantize(), layer.bias), atol=1e-4)


def test_a_layer_may_round_its_activations():
    layer = OrthoLinear.from_linear(torch.nn.Linear(64, 48), lo.OrthoConfig(density=0.05))
    x = torch.randn(3, 64)
    with torch.no_grad():
        exact = layer(x)
        layer.int8 = True
        assert 0 < (layer(x) - exact).norm() / exact.norm() < 0.02


def test_a_layer_has_gradients_through_the_reference():
    layer = OrthoLinear.from_linear(torch.nn.Linear(64, 48), lo.OrthoConfig(density=0.05))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(2, 64), atol=1e-4)


def test_what_the_kernel_cannot_take_goes_the_other_way():
    for linear, cfg in (
        (torch.nn.Linear(20, 8), lo.OrthoConfig(group_size=10)),
        (torch.nn.Linear(64, 8, dtype=torch.float64), lo.OrthoConfig()),
    ):
        layer = OrthoLinear.from_linear(linear, cfg)
        x = torch.randn(2, linear.in_features, dtype=linear.weight.dtype)
        assert not layer.takes_kernel(x)
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_casts_and_new_states_are_seen():
    layer = OrthoLinear.from_linear(torch.nn.Linear(64, 48), lo.OrthoConfig(density=0.05))
    other = OrthoLinear.from_linear(torch.nn.Linear(64, 48), lo.OrthoConfig(density=0.05))
    x = torch.randn(2, 64)
    with torch.no_grad():
        layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        before = layer._product
        layer.half()
        assert layer._product is None and layer(x.half()).dtype == torch.float16 and layer._product is not before
        assert not layer.double().takes_kernel(x.double())


def test_product_moves_with_the_switches():
    base, compartments = weight(20, 64, 64, [0.3])
    product, x = Product.of(base, compartments), torch.randn(2, 64)
    on = product.at({"c0": 1.0})(x)
    off = product.at({"c0": 0.0})(x)
    assert not torch.allclose(on, off) and torch.equal(product.at({"c0": 1.0})(x), on)


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_import_compiles_nothing(tmp_path):
    done = python("import libortho", LIBORTHO_CACHE=str(tmp_path))
    assert done.returncode == 0 and not done.stdout + done.stderr and not list(tmp_path.iterdir())


def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path):
    code = (
        "import torch, libortho as lo\n"
        "from libortho import kernel\n"
        "kernel.prebuilt = lambda: None\n"
        "layer = lo.OrthoLinear.from_linear(torch.nn.Linear(64, 8))\n"
        "x = torch.randn(1, 64)\n"
        "with torch.no_grad(): layer(x), layer(x)\n"
        "print(kernel.backend())"
    )
    env = {"LIBORTHO_CACHE": str(tmp_path), "PATH": str(tmp_path), "CXX": ""}
    done = python(code, **env)
    assert done.stdout == "reference\n", done.stderr
    assert done.stderr.count("no C++ compiler was found; install g++") == 1
    done = python(code, LIBORTHO_BACKEND="cpu", **env)
    assert done.returncode == 1 and "KernelError: no C++ compiler" in done.stderr


def test_a_failed_build_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false"))
    with pytest.raises(KernelError, match="compiling the kernel failed"):
        build.build()
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.part"))


def test_the_cache_is_private_and_keyed(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path))
    copy = tmp_path / "kernels-copy"
    shutil.copytree(build.sources(), copy)
    monkeypatch.setattr(build, "sources", lambda: copy)
    first = build.cached_library()
    assert build.cached_library() == first
    (copy / "panels.h").write_text((copy / "panels.h").read_text() + "\n")
    assert build.cached_library() != first
    monkeypatch.setenv("CXX", shutil.which("false"))
    with pytest.raises(KernelError):
        build.build()
    folder = build.cached_library().parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(KernelError, match="may be written by others"):
        build.build()


def test_self_test_finds_a_wrong_kernel(monkeypatch):
    assert max(e for k, e in kernel.check().items() if "int8" not in k) < 1e-5
    right = kernel.dual_gemm
    monkeypatch.setattr(kernel, "dual_gemm", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(KernelError, match="products are wrong"):
        kernel.check()


def test_no_warning_where_the_kernel_is_there():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel.backend() == "cpu"


def test_address_sanitizer_is_silent(tmp_path):
    "The kernel called from a plain program, on arrays that are exactly as large as the layout says."
    flags = ["-O1", "-g", "-std=c++20", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = [Path(__file__).parent / "kernel_driver.cpp", build.sources() / "dual_gemm_cpu.cpp"]
    run("g++", *flags, f"-I{build.sources()}", *files, "-o", tmp_path / "driver")
    assert "cases, worst" in run(tmp_path / "driver")
