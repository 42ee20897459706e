import pytest
import torch

from libortho.lattice import fit_scales, lattice_top, natural, nearest
from libortho.noise import NOISES, attack, upper_levels
from libortho.sieve import sieve

MODES = sorted(set(NOISES) - {"counter_memory"})  # which needs a gradient, see test_surgery


@pytest.fixture(scope="module")
def layer(real_weight):
    s = fit_scales(real_weight, "three_sigma")
    return nearest(real_weight, s), sieve(real_weight, density=0.05), natural(real_weight, s)


@pytest.mark.parametrize("mode", MODES)
def test_only_the_mask_moves_and_the_input_stays(layer, mode):
    q, mask, v = layer
    before = q.clone()
    p = attack(q, mask, v, mode, seed=3, name="a")
    assert p.dtype == torch.int8 and p.abs().max() <= 7
    assert torch.equal(p[~mask], q[~mask]) and torch.equal(q, before)
    assert (p[mask].sign() * v[mask].sign() >= 0).all(), "a sign flipped"


@pytest.mark.parametrize("mode", [m for m in MODES if m != "none"])
def test_seeded_by_seed_and_name(layer, mode):
    same = [attack(*layer, mode, seed=3, name="a") for _ in range(2)]
    assert torch.equal(*same)
    for other in ({"seed": 4, "name": "a"}, {"seed": 3, "name": "b"}):
        assert not torch.equal(same[0], attack(*layer, mode, **other))


@pytest.mark.parametrize("mode, levels", [("post_clamp", {4, 5, 6, 7}), ("tri_state", {5, 6, 7})])
def test_levels(layer, mode, levels):
    q, mask, v = layer
    p = attack(q, mask, v, mode)
    assert set(p[mask].abs().unique().tolist()) == levels
    counts = torch.bincount(p[mask].abs().long())[min(levels) :].double()
    assert (counts / counts.sum() - 1 / len(levels)).abs().max() < 0.01, "the draw is not uniform"


def test_deep_focal_exempts_the_middle_class(layer):
    q, mask, v = layer
    p, deep = attack(q, mask, v, "deep_focal"), mask & (v.abs() > 4.5)
    assert torch.equal(p[~deep], q[~deep]) and set(p[deep].abs().unique().tolist()) == {5, 6, 7}
    assert (mask & ~deep).any() and deep.any()


@pytest.mark.parametrize("value", [16.0, 100.0, -100.0])
def test_pre_clamp_is_swallowed_far_beyond_the_clamp(value):
    v = torch.full((100, 100), value)
    q = v.clamp(-7, 7).to(torch.int8)
    mask = torch.ones_like(q, dtype=torch.bool)
    assert torch.equal(attack(q, mask, v, "pre_clamp"), q)
    assert not torch.equal(attack(q, mask, v, "post_clamp"), q)


def test_pre_clamp_jitter_has_the_stated_width():
    v = torch.full((1, 200_000), 3.2)
    p = attack(v.round().to(torch.int8), torch.ones(1, 200_000, dtype=torch.bool), v, "pre_clamp").float()
    inside = torch.distributions.Normal(3.2, 2.0)
    for level in (2, 3, 4, 5):
        want = inside.cdf(torch.tensor(level + 0.5)) - inside.cdf(torch.tensor(level - 0.5))
        assert abs((p == level).float().mean() - want) < 0.005


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_narrow_lattices(real_weight, bits, mode):
    s = fit_scales(real_weight, "quantile", bits)
    mask = sieve(real_weight, density=0.05)
    assert attack(nearest(real_weight, s, bits), mask, natural(real_weight, s), mode, bits).abs().max() <= lattice_top(
        bits
    )
    low, high = upper_levels(5, lattice_top(bits))
    assert 1 <= low <= high == lattice_top(bits)


def test_unknown_mode():
    with pytest.raises(ValueError, match="loud.*deep_focal"):
        attack(None, None, None, "loud")
