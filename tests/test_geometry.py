"""Angles, shares, ranks and the permutation test against dense and independent references."""

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles, svdvals
from scipy.stats import permutation_test

from libortho.curvature import QUANTITIES, Tokens, gradients, kfac, per_token
from libortho.geometry import (
    CurvatureBasis,
    PairingTest,
    cosines,
    curvature_basis,
    dense_gradient,
    gradient_factors,
    inner_products,
    pairing_test,
    percentiles,
    principal_angles,
    random_cosine,
    ranks,
    share_in_span,
    shares_by_curvature,
)
from libortho.linear import find_linears


def drawn(seed, n=5, d_in=7, d_out=6):
    gen = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (n,), generator=gen).tolist()
    return [(torch.randn(t, d_in, generator=gen), torch.randn(t, d_out, generator=gen)) for t in sizes]


def flat(factors):
    return torch.stack([dense_gradient(f).flatten() for f in factors]).double()


@pytest.fixture
def texts():
    gen = torch.Generator().manual_seed(int(np.random.default_rng().integers(1 << 30)))
    return [Tokens(torch.randint(256, (k,), generator=gen), s) for k, s in ((9, 3), (5, 1), (12, 11))]


@pytest.mark.parametrize("quantity", list(QUANTITIES))
@pytest.mark.parametrize("memory_gb", [2.0, 1e-9])
def test_factors_are_the_gradients_of_autograd(tiny, texts, quantity, memory_gb):
    layers = find_linears(tiny)
    flags = [p.requires_grad for p in tiny.parameters()]
    groups = list(gradient_factors(tiny, layers, texts, quantity, memory_gb, progress=False))
    assert len(groups) == (1 if memory_gb > 1 else len(layers))
    found = {n: f for group in groups for n, f in group.items()}
    assert list(found) == list(layers)
    for i, t in enumerate(texts):
        real = {}
        with gradients(tiny, {n: m.weight for n, m in layers.items()}, real.__setitem__):
            per_token(tiny, t, QUANTITIES[quantity]).sum().backward()
        for n in layers:
            g = dense_gradient(found[n][i])
            assert torch.allclose(g, real[n], rtol=1e-4, atol=1e-6 * real[n].abs().max().item() + 1e-9)
    assert flags == [p.requires_grad for p in tiny.parameters()] and all(p.grad is None for p in tiny.parameters())
    assert not any(m._forward_hooks for m in layers.values())


def test_factors_refuse_what_cannot_be(tiny, texts):
    layers = find_linears(tiny)
    with pytest.raises(ValueError, match="log_odds, log_p, got 'loss'"):
        next(gradient_factors(tiny, layers, texts, "loss"))
    with pytest.raises(ValueError, match="texts is empty"):
        next(gradient_factors(tiny, layers, []))
    idle = {"idle": torch.nn.Linear(3, 3)}
    with pytest.raises(ValueError, match="'idle' is not called once"):
        next(gradient_factors(tiny, layers | idle, texts, progress=False))


@pytest.mark.parametrize("seed", range(4))
def test_inner_products_and_cosines_are_those_of_the_matrices(seed):
    factors = drawn(seed)
    dense = flat(factors)
    k = inner_products(factors)
    assert torch.allclose(k, dense @ dense.T, rtol=1e-4, atol=1e-4)
    assert torch.allclose(cosines(k), torch.nn.functional.cosine_similarity(dense[:, None], dense[None], 2), atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_angles_and_shares_against_scipy_and_least_squares(seed):
    factors = drawn(seed, n=9)
    dense = flat(factors)
    k, a, b = dense @ dense.T, [0, 2, 4], [1, 3, 5, 6]
    want = np.sort(subspace_angles(dense[a].T.numpy(), dense[b].T.numpy()))
    assert np.allclose(principal_angles(k, a, b).numpy(), want, atol=1e-6)
    assert np.allclose(principal_angles(k, b, a).numpy(), want, atol=1e-6)
    for i, share in zip(a, share_in_span(k, a, b).tolist(), strict=True):
        fit = dense[b].T.numpy() @ np.linalg.lstsq(dense[b].T.numpy(), dense[i].numpy(), rcond=None)[0]
        assert share == pytest.approx(np.square(fit).sum() / dense[i].square().sum().item(), abs=1e-6)


def test_a_span_of_dependent_gradients_counts_once():
    dense = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 2]]
    dense[2] *= 5
    dense = torch.cat([dense, torch.tensor([[3.0, 0, 4, 0]], dtype=torch.float64)])
    k = dense @ dense.T
    assert share_in_span(k, [4, 1, 3], [0, 2]).tolist() == pytest.approx([9 / 25, 0, 0])
    assert principal_angles(k, [0, 2], [0, 1]).tolist() == pytest.approx([0.0], abs=1e-6)


def test_a_random_direction_has_the_share_and_cosine_that_are_said():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(400, 300, generator=gen, dtype=torch.float64)
    k = x @ x.T
    assert share_in_span(k, list(range(30, 400)), list(range(30))).mean().item() == pytest.approx(30 / 300, rel=0.05)
    off = cosines(k)[~torch.eye(400, dtype=torch.bool)].abs().mean().item()
    assert off == pytest.approx(random_cosine(300), rel=0.03)


def test_the_pairing_test_enumerates_and_agrees_with_scipy():
    table = np.random.default_rng(3).normal(size=(5, 5))
    ours = pairing_test(table, [list(range(5))])
    rows = np.arange(5)
    statistic = lambda deal: table[rows, deal.astype(int)].mean()  # noqa: E731
    for side, p in (("less", ours.below), ("greater", ours.above)):
        theirs = permutation_test((rows,), statistic, permutation_type="pairings", alternative=side, n_resamples=999)
        assert p == pytest.approx(theirs.pvalue)
    assert ours.deals == 120 and ours.observed == pytest.approx(table.trace() / 5)


def test_the_pairing_test_stays_within_groups_and_draws_where_deals_are_many():
    table = np.full((6, 6), np.nan)
    groups = [[0, 3, 4], [1, 2, 5]]
    for g in groups:
        for i, j in itertools.product(g, g):
            table[i, j] = np.random.default_rng(i * 6 + j).normal()
    whole = pairing_test(np.nan_to_num(table), groups)
    few = pairing_test(np.nan_to_num(table), groups, draws=35, seed=1)
    assert whole.deals == 36 and few.deals == 36 and 0 < few.below <= 1
    many = pairing_test(np.nan_to_num(table), groups, draws=20_000)
    assert many == whole and whole.null == pytest.approx(np.mean([np.nanmean(table[g][:, g]) for g in groups]))
    big = np.random.default_rng(0).normal(size=(12, 12)) - 3 * np.eye(12)
    found = pairing_test(big, [list(range(12))], draws=500)
    assert found.below == pytest.approx(1 / 501) and found.deals == 501  # the deal that is there counts as one
    mixed = pairing_test(big, [list(range(8)), [8], [9], [10], [11]], draws=500)
    assert mixed.below >= 1 / 501 and mixed.deals == 501
    with pytest.raises(ValueError, match="each of the 6 rows once"):
        pairing_test(table, [[0, 1], [1, 2]])


def test_verdicts():
    of = lambda below, above: PairingTest(0, 0, 0, 0, below, above, 100).verdict()  # noqa: E731
    assert [of(0.05, 1), of(0.5, 0.6), of(1, 0.01)] == [
        "SUPPORTED",
        "not distinguishable from high dimension",
        "CONTRADICTED",
    ]


@pytest.mark.parametrize("seed", range(3))
def test_shares_by_curvature_against_the_kronecker_product(seed):
    gen = torch.Generator().manual_seed(seed)
    a, g = (x.T @ x for x in (torch.randn(20, n, generator=gen) for n in (5, 4)))
    factors = drawn(seed, n=3, d_in=5, d_out=4)
    basis = curvature_basis(a, g, (0.5, 0.8))
    values, vectors = np.linalg.eigh(np.kron(g.double().numpy(), a.double().numpy()))  # vec by rows: out, then in
    energy = np.square(flat(factors).numpy() @ vectors)
    want = np.stack([energy[:, :10].sum(1), energy[:, 10:16].sum(1), energy[:, 16:].sum(1)], 1)
    assert np.allclose(
        shares_by_curvature(basis, factors, batch=2).numpy(), want / want.sum(1, keepdims=True), atol=1e-3
    )
    assert np.allclose(basis.spectrum.numpy(), [v.sum() / values.sum() for v in np.split(values, [10, 16])], atol=1e-4)


def test_curvature_basis_of_a_model_and_its_refusals(tiny, texts):
    name, layer = next(iter(find_linears(tiny).items()))
    basis = curvature_basis(*kfac(tiny, {name: layer}, texts, progress=False)[name])
    assert isinstance(basis, CurvatureBasis) and basis.part.sum().item() == layer.weight.numel()
    assert basis.spectrum.sum().item() == pytest.approx(1)
    for edges in ((), (0.9, 0.5), (0.5, 0.5), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match="ascend"):
            curvature_basis(torch.eye(3), torch.eye(2), edges)


def test_percentiles_are_ranks():
    from scipy.stats import rankdata

    score = torch.randint(50, (40, 30), generator=torch.Generator().manual_seed(2)).float()
    at = torch.randperm(1200, generator=torch.Generator().manual_seed(3))[:200]
    want = (rankdata(score.flatten().numpy())[at] - 0.5) / 1200
    assert np.allclose(percentiles(score, at).numpy(), want)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_ranks_against_singular_values(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    s = svdvals(w.double().numpy())
    p = s / s.sum()
    assert ranks(w) == pytest.approx((np.exp(-(p * np.log(p)).sum()), np.square(s).sum() / s[0] ** 2), rel=1e-6)
    assert ranks(torch.eye(7)) == pytest.approx((7, 7))
    with pytest.raises(ValueError, match="zero everywhere"):
        ranks(torch.zeros(shape))
