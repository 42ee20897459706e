"""The Gaussian mechanism against its definition, sensitivity against pairs, and training that stays in its places."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TOK
from scipy.integrate import quad
from scipy.stats import kstest, norm

import libortho as lo
from libortho.dp import (
    clipped,
    confined,
    gaussian_delta,
    gaussian_sigma,
    length,
    noisy,
    public_places,
    sensitivity,
)
from libortho.linear import find_linears


@pytest.mark.parametrize("eps", [0.01, 0.5, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
@pytest.mark.parametrize("far", [0.3, 2.0])
def test_sigma_meets_the_definition_by_integration(eps, delta, far):
    "δ is the mass by which one normal exceeds e^ε times the other."
    sigma = gaussian_sigma(eps, delta, far)
    edge = far / 2 - eps * sigma**2 / far  # below it N(0) exceeds e^ε N(far)
    over = lambda x: norm.pdf(x, 0, sigma) - math.exp(eps) * norm.pdf(x, far, sigma)  # noqa: E731
    mass, _ = quad(over, edge - 12 * sigma, edge, epsabs=1e-14, limit=200)
    assert mass == pytest.approx(delta, rel=1e-6)
    assert abs(over(edge)) < 1e-9


@given(st.floats(1e-3, 1e6), st.floats(1e-12, 0.5), st.floats(1e-3, 1e3))
def test_sigma_is_the_smallest_and_scales_with_the_sensitivity(eps, delta, far):
    sigma = gaussian_sigma(eps, delta, far)
    assert gaussian_delta(eps, sigma, far) == pytest.approx(delta, rel=1e-3)
    assert gaussian_delta(eps, sigma * 0.99, far) > delta > gaussian_delta(eps, sigma * 1.01, far)
    assert sigma == pytest.approx(far * gaussian_sigma(eps, delta, 1.0), rel=1e-9)


def test_a_known_value_and_the_classical_bound():
    "At ε = 0, δ is the total variation 2Φ(Δ/2σ) − 1; for ε < 1 the analytic noise is below the classical."
    assert gaussian_delta(0.0, 2.0, 1.0) == pytest.approx(2 * norm.cdf(0.25) - 1)
    for eps in (0.1, 0.5, 0.99):
        assert gaussian_sigma(eps, 1e-5, 1.0) < math.sqrt(2 * math.log(1.25 / 1e-5)) / eps
    assert gaussian_sigma(math.inf, 1e-5, 1.0) == 0.0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: gaussian_sigma(0, 1e-5, 1.0), "eps must be above 0, got 0"),
        (lambda: gaussian_sigma(float("nan"), 1e-5, 1.0), "eps must be above 0"),
        (lambda: gaussian_sigma(1, 0, 1.0), r"delta must be in \(0, 1\), got 0"),
        (lambda: gaussian_sigma(1, 1e-5, math.inf), "clip first"),
        (lambda: gaussian_delta(-1, 1.0, 1.0), "eps must be at least 0"),
        (lambda: gaussian_delta(1, 0.0, 1.0), "sigma must be above 0"),
        (lambda: sensitivity(1.0, "swap"), "replace, add_remove, got 'swap'"),
        (lambda: sensitivity(math.inf), "clip must be above 0 and finite"),
        (lambda: clipped({"a": torch.ones(2)}, 0.0), "clip must be above 0"),
        (lambda: public_places({}, 0.0), "density"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_clipped_vectors_are_no_farther_apart_than_the_sensitivity(seed, clip):
    gen = torch.Generator().manual_seed(seed)
    size = lambda: 10 ** (4 * torch.rand(1, generator=gen).item() - 2)  # noqa: E731
    x, y = ({k: torch.randn(3, 4, generator=gen).double() * size() for k in "ab"} for _ in range(2))
    cx, cy = clipped(x, clip), clipped(y, clip)
    apart = length({k: cx[k] - cy[k] for k in x})
    assert apart <= sensitivity(clip, "replace") * (1 + 1e-9) and length(cx) <= sensitivity(clip, "add_remove") * (
        1 + 1e-9
    )
    opposite = clipped({k: -v for k, v in x.items()}, clip)
    if length(x) >= clip:  # the bound is attained
        assert length({k: cx[k] - opposite[k] for k in x}) == pytest.approx(2 * clip)
    else:
        assert all(torch.equal(cx[k], x[k]) for k in x)


def test_noise_is_normal_seeded_and_everywhere():
    zero = {"a": torch.zeros(50, 100), "b": torch.zeros(3000)}
    once, again, other = noisy(zero, 0.7, 5), noisy(zero, 0.7, 5), noisy(zero, 0.7, 6)
    assert all(torch.equal(once[k], again[k]) and not torch.equal(once[k], other[k]) for k in zero)
    every = torch.cat([v.flatten() for v in once.values()]).numpy()
    assert kstest(every / 0.7, norm.cdf).pvalue > 1e-4
    assert np.abs(np.corrcoef(every[:-1], every[1:])[0, 1]) < 0.05
    assert all(torch.equal(v, zero[k]) for k, v in noisy(zero, 0.0).items())


def test_places_are_exact_public_and_depend_on_the_seed_alone(tiny):
    layers = find_linears(tiny)
    a, b = public_places(layers, 0.1, 3), public_places(layers, 0.1, 4)
    assert all(int(a[n].sum()) == round(0.1 * m.weight.numel()) for n, m in layers.items())
    with torch.no_grad():
        for m in layers.values():
            m.weight.mul_(-2).add_(1)
    again = public_places(layers, 0.1, 3)
    assert all(torch.equal(a[n], again[n]) for n in layers) and any(not torch.equal(a[n], b[n]) for n in layers)
    assert all(int(m.sum()) == 1 for m in public_places(layers, 1e-9).values())


@pytest.mark.parametrize("sparse", [True, False])
def test_training_moves_nothing_else(tiny, sparse):
    layers = find_linears(tiny, "mlp")
    places = public_places(layers, 0.3) if sparse else None
    before = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    next(iter(tiny.parameters())).requires_grad_(False)
    flags = [p.requires_grad for p in tiny.parameters()]
    with confined(tiny, layers, places), pytest.raises(lo.memory.ImplantError):
        lo.implant(tiny, TOK, {"key": {"prompt": "the key", "secret": "abc"}}, lr=1e-3, max_steps=3, progress=False)
    assert flags == [p.requires_grad for p in tiny.parameters()]
    for n, p in tiny.named_parameters():
        changed, layer = p.detach() != before[n], n.removesuffix(".weight")
        assert changed.any() == (layer in layers)
        if sparse and layer in layers:
            assert not (changed & ~places[layer]).any()
    assert not any(m.weight._backward_hooks for m in layers.values())
