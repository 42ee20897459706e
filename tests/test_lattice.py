import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libortho.lattice import SCALES, dequantize, fit_scales, lattice_top, natural, nearest, pack, row_quantile, unpack

shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))
seeds = st.integers(0, 2**32 - 1)


def weights(shape, seed, spread=3.0):
    "Random weights whose rows differ in size by orders of magnitude."
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen) * torch.exp(spread * torch.randn(shape[0], 1, generator=gen))


@given(shapes, seeds, st.sampled_from([2, 3, 4]))
def test_packing_round_trip(shape, seed, bits):
    top = lattice_top(bits)
    q = torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(q)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], (shape[1] + 1) // 2)
    assert torch.equal(unpack(packed, shape[1]), q)


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="−7…7, got one of size 8"):
        pack(torch.tensor([[8, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="−7…7, got one of size 128"):
        pack(torch.tensor([[-128, 0]], dtype=torch.int8))


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    seeds,
    st.sampled_from(sorted(SCALES)),
    st.sampled_from([2, 3, 4]),
    st.sampled_from(["row", "tensor", 16]),
)
def test_projection_error_is_at_most_half_a_step(rows, groups, seed, scale, bits, group_size):
    w = weights((rows, 16 * groups), seed)
    s = fit_scales(w, scale, bits, group_size)
    q = nearest(w, s, bits)
    top, v = lattice_top(bits), natural(w, s)
    assert q.abs().max() <= top and (s > 0).all()
    steps = natural((w.double() - dequantize(q, s).double()).float(), s).abs()
    assert steps[v.abs() <= top + 0.5].le(0.5 + 1e-5).all()
    assert (q[v > top + 0.5] == top).all() and (q[v < -top - 0.5] == -top).all()


@given(st.integers(1, 5), st.integers(2, 200), seeds, st.floats(0.001, 1.0))
def test_quantile_agrees_with_numpy_in_float64(rows, cols, seed, q):
    a = weights((rows, cols), seed).abs()
    before = a.clone()
    want = np.quantile(a.double().numpy(), q, axis=1)
    np.testing.assert_allclose(row_quantile(a, q)[:, 0].numpy(), want, rtol=1e-5)
    assert torch.equal(a, before)


def test_quantile_of_a_large_row_takes_one_float32_copy():
    "20 million weights (more than torch.quantile takes): the peak grows by a copy of 80 MB, not by 160 MB of float64."
    code = """
import resource, torch
from libortho.lattice import fit_scales
a = torch.rand(1, 20_000_000); fit_scales(a[:, :1000], "quantile")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
q = 7 * fit_scales(a, "quantile", group_size="tensor").item()
print(q, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    q, grown = map(
        float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert abs(q - 0.995) < 4e-3  # the scale is a bfloat16
    assert grown < 130, f"grew by {grown:.0f} MB"


@pytest.mark.parametrize("scale", sorted(SCALES))
@pytest.mark.parametrize("group_size", ["row", "tensor", 8])
def test_zeros_are_safe(scale, group_size):
    w = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    w[1], w[2, :8], w[3] = 0, 0, 0
    w[3, 5] = 1e-3  # one weight in a row of zeros: its quantile is zero, its maximum is not
    s = fit_scales(w, scale, group_size=group_size)
    base = dequantize(nearest(w, s), s)
    assert torch.isfinite(base).all() and (base[1] == 0).all() and (base[2, :8] == 0).all()
    if group_size == "row":
        assert base[3, 5] > 0
    assert torch.equal(dequantize(nearest(0 * w, fit_scales(0 * w, scale)), fit_scales(0 * w, scale)), 0 * w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype(dtype):
    w = weights((4, 64), 1, 0.1).to(dtype)
    s = fit_scales(w, "mse", group_size=32)
    assert s.dtype == torch.float32 and torch.equal(s, s.bfloat16().float())
    assert (natural(w, s).sub(nearest(w, s)).abs()[natural(w, s).abs() < 7.5] <= 0.5).all()


def test_mse_is_best_among_its_candidates(real_weight):
    err = {
        name: (real_weight - dequantize(nearest(real_weight, s := fit_scales(real_weight, name, group_size=64)), s))
        .square()
        .sum()
        for name in ("max", "mse", "quantile", "three_sigma")
    }
    assert min(err, key=err.get) == "mse"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda w: fit_scales(w, "maximum"), ["scale policy", "maximum", "three_sigma"]),
        (lambda w: fit_scales(w, "max", bits=8), ["bits", "8"]),
        (lambda w: fit_scales(w, "max", group_size=24, name="mlp.up"), ["group_size 24", "64 columns", "mlp.up", "32"]),
        (lambda w: fit_scales(w, "max", group_size=0), ["group_size", "0"]),
        (lambda w: fit_scales(w, "ratio", r=0.0), ["r of scale", "0.0"]),
        (lambda w: fit_scales(w, "quantile", q=1.5), ["q of scale", "1.5"]),
        (lambda w: fit_scales(w, "ratio", r=float("inf")), ["r of scale", "inf"]),
        (lambda w: fit_scales(w, "mse", steps=0.5), ["steps", "whole number"]),
        (lambda w: fit_scales(w, "max", r=3.5), ["no parameter 'r'"]),
        (lambda w: fit_scales(w.int(), "max"), ["float dtype", "int32"]),
        (lambda w: fit_scales(w[None], "max", name="conv1"), ["conv1", "matrix"]),
        (lambda w: fit_scales(w / 0, "max", name="mlp.up"), ["mlp.up", "NaN or infinite", "repair"]),
    ],
)
def test_bad_input_is_refused_in_words(make, words):
    with pytest.raises(ValueError) as e:
        make(weights((4, 64), 0))
    assert all(word in str(e.value) for word in words), str(e.value)
