import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libortho.lattice import SCALES, dequantize, fit_scales, nearest
from libortho.noise import NOISES
from libortho.sieve import keep_top
from libortho.streams import OrthoConfig, compress, reconstruct, split

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def weights(rows, cols, seed, dtype=torch.float32):
    "Random weights with outliers, and some that are tiny."
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64) ** 3
    w[torch.rand(rows, cols, generator=gen) < 0.05] *= 1e-6
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", sorted(set(NOISES) - {"counter_memory"}))
def test_on_is_exact_on_the_storage_mask_and_off_is_the_base(dtype, noise):
    w = weights(33, 128, 0, dtype)
    t = split(w, OrthoConfig(group_size=32, density=0.2, noise=noise))
    c = t.compartments["memory"]
    mask, base = c.mask(), t.base.dequantize()
    assert c.nnz == round(0.2 * w.numel()) and c.values.dtype == dtype
    on = t.reconstruct(1.0).to(dtype)
    assert torch.equal(on[mask], w[mask])
    assert torch.equal(on[~mask], base.to(dtype)[~mask])
    assert torch.equal(t.reconstruct(0.0).float(), base)
    assert torch.equal(on, t.reconstruct({"memory": 1.0}).to(dtype))


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_alpha_is_linear(seed, a):
    t = split(weights(5, 64, seed), OrthoConfig(group_size="row", scale="three_sigma", density=0.1, noise="post_clamp"))
    off, on = t.reconstruct(0.0).double(), t.reconstruct(1.0).double()
    torch.testing.assert_close(t.reconstruct(a).double(), off + a * (on - off), rtol=1e-5, atol=1e-6)


def test_two_compartments_that_share_weights_add_up():
    w, gen = weights(20, 32, 0), torch.Generator().manual_seed(1)
    first, second = (torch.rand(w.shape, generator=gen) < 0.3 for _ in range(2))
    assert (first & second).any()
    base = split(w, OrthoConfig(group_size="row")).base
    cs = {"a": compress(w, first), "b": compress(2 * w, second)}
    b = base.dequantize().double()
    for x, y in ((1, 1), (0, 1), (1, 0), (0.3, 0.8)):
        want = b + x * first * (w.double() - b) + y * second * (2 * w.double() - b)
        torch.testing.assert_close(reconstruct(base, cs, {"a": x, "b": y}).double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(reconstruct(base, cs, {"a": 1.0, "b": 0.0})[first], w[first])
    assert torch.equal(reconstruct(base, cs, {"a": 0.0, "b": 1.0})[second], 2 * w[second])


@given(st.integers(1, 12), st.integers(1, 30), st.floats(0, 1), st.integers(0, 10**6))
def test_compressed_rows(rows, cols, p, seed):
    gen = torch.Generator().manual_seed(seed)
    w, mask = torch.randn(rows, cols, generator=gen), torch.rand(rows, cols, generator=gen) < p
    c = compress(w, mask)
    assert c.crow.dtype == c.col.dtype == torch.int32 and c.shape == (rows, cols)
    assert torch.equal(c.mask(), mask) and torch.equal(w[c.index()], c.values)
    with warnings.catch_warnings():  # only torch's constructor of sparse CSR warns; ours is plain tensors
        warnings.simplefilter("ignore")
        csr = torch.sparse_csr_tensor(c.crow, c.col, c.values, c.shape)
    assert torch.equal(csr.to_dense(), torch.where(mask, w, 0))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_odd_shapes(shape, bits):
    w = weights(*shape, 0)
    t = split(w, OrthoConfig(group_size="row", bits=bits, density=1.0))
    assert t.base.shape == shape and torch.equal(t.reconstruct(1.0), w)
    assert torch.equal(t.base.dequantize(), dequantize(t.base.integers(), t.base.scales))


def test_the_base_knows_nothing_of_the_compartment():
    "Without noise the base is the projection, whatever is stored."
    w = weights(8, 64, 0)
    bases = [split(w, OrthoConfig(density=d)).base for d in (0.01, 0.9)]
    assert torch.equal(bases[0].packed, bases[1].packed)
    s = fit_scales(w, "mse", group_size=64)
    assert torch.equal(bases[0].integers(), nearest(w, s))


def test_bytes_are_what_the_tensors_hold():
    w = weights(64, 256, 0, torch.bfloat16)
    t = split(w, OrthoConfig(group_size=64, density=0.05))
    assert t.base.nbytes == w.numel() // 2 + 2 * w.numel() // 64
    assert t.compartments["memory"].nbytes == 4 * 65 + round(0.05 * w.numel()) * (4 + 2)


def test_storing_is_not_attacking():
    w = weights(64, 256, 0)
    t = split(w, OrthoConfig(group_size="row", sieve="magnitude", density=0.1, attack_density=0.01, noise="tri_state"))
    plain = split(w, OrthoConfig(group_size="row", sieve="magnitude", density=0.1))
    moved = t.base.integers() != plain.base.integers()
    assert 0 < moved.sum() <= t.stats["attacked"] == round(0.01 * w.numel())
    assert keep_top(w.abs(), 0.01)[moved].all()
    assert torch.equal(t.reconstruct(1.0), plain.reconstruct(1.0))


def test_given_masks():
    w = weights(4, 16, 0)
    storage = torch.zeros(4, 16, dtype=torch.bool)
    storage[1, 3] = storage[2, 5] = True
    attacked = storage.clone()
    attacked[2, 5] = False
    t = split(w, OrthoConfig(group_size="row", noise="post_clamp"), storage=storage, attacked=attacked)
    assert torch.equal(t.compartments["memory"].mask(), storage) and t.stats["attacked"] == 1
    with pytest.raises(ValueError, match="up.*outside the storage mask"):
        split(w, name="up", cfg=OrthoConfig(group_size=16), storage=attacked, attacked=storage)
    with pytest.raises(ValueError, match=r"mask has shape \[2, 2\]"):
        compress(w, storage[:2, :2])


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_the_split_is_reproducible(scale, real_weight):
    cfg = OrthoConfig(scale=scale, group_size="row", noise="tri_state", density=0.01, seed=5)
    assert split(real_weight, cfg, "x").digest() == split(real_weight.clone(), cfg, "x").digest()
    assert split(real_weight, cfg, "x").digest() != split(real_weight, cfg, "y").digest()


def test_config_round_trip():
    cfg = OrthoConfig(scale="ratio", scale_args={"r": 3.0}, sparsity=0.99, targets=["a", "b"], seed=7)
    assert OrthoConfig.from_json(cfg.to_json()) == cfg and cfg.targets == ("a", "b")


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"density": 0}, "density must be"),
        ({"density": 1.7}, "0.017"),
        ({"density": -1}, "density must be"),
        ({"density": 0.1, "sparsity": 0.9}, "exactly one"),
        ({"bits": 5}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": "col"}, "group_size"),
        ({"scale": "maxx"}, "scale policy"),
        ({"projection": "up"}, "projection"),
        ({"sieve": "x"}, "sieve"),
        ({"noise": "x"}, "noise mode"),
        ({"density": 0.01, "attack_density": 0.1}, "attack_density"),
        ({"compartment": "repair"}, "reserved"),
        ({"compartment": ""}, "name"),
        ({"scale": "ratio", "scale_args": {"r": -1}}, "r of scale"),
        ({"scale": "max", "scale_args": {"r": 3.5}}, "no parameter"),
    ],
)
def test_config_refuses_in_words(kwargs, word):
    with pytest.raises(ValueError, match=word):
        OrthoConfig(**kwargs)


@pytest.mark.parametrize("alpha", [2, -0.1, float("nan"), {"memory": 1.5}])
def test_alpha_outside_the_range(alpha):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        split(weights(4, 64, 0)).reconstruct(alpha)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("noise", sorted(set(NOISES) - {"counter_memory"}))
@pytest.mark.parametrize("scale", sorted(SCALES))
@pytest.mark.parametrize("group_size", [32, "row", "tensor"])
def test_the_same_integers_and_masks_on_a_gpu(group_size, scale, noise):
    w, cfg = weights(48, 128, 3), OrthoConfig(group_size=group_size, scale=scale, density=0.1, noise=noise, seed=5)
    here, there = split(w, cfg), split(w.cuda(), cfg)
    assert torch.equal(here.base.packed, there.base.packed.cpu())
    torch.testing.assert_close(there.base.scales.cpu(), here.base.scales, rtol=2**-8, atol=0)  # a sum in another order
    a, b = here.compartments["memory"], there.compartments["memory"]
    assert all(torch.equal(getattr(a, part), getattr(b, part).cpu()) for part in ("crow", "col", "values"))
