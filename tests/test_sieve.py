import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libortho.sieve import SIEVES, keep_top, resolve_density, sieve


def reference(score, k):
    "The k largest, ties to the lower index, by a stable sort."
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[torch.sort(score.flatten(), descending=True, stable=True).indices[:k]] = True
    return mask.reshape(score.shape)


@given(st.integers(1, 8), st.integers(1, 40), st.floats(1e-3, 1.0), st.integers(0, 10**6), st.integers(1, 50))
def test_counts_are_exact_and_ties_go_to_the_lower_index(rows, cols, density, seed, levels):
    score = torch.randint(0, levels, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(keep_top(score, density), reference(score, round(density * score.numel())))
    by_row = keep_top(score, density, per_row=True)
    for i in range(rows):
        assert torch.equal(by_row[i], reference(score[i], round(density * cols)))


@given(st.floats(0.001, 0.999))
def test_density_and_sparsity_say_the_same(density):
    score = torch.rand(13, 17, generator=torch.Generator().manual_seed(1))
    assert resolve_density(sparsity=1 - density) == pytest.approx(density)
    assert abs(keep_top(score, sparsity=1 - density).sum() - keep_top(score, density).sum()) <= 1


def test_the_score_is_not_changed():
    score = torch.rand(50, 60)
    before = score.clone()
    keep_top(score, 0.1), keep_top(score, 0.1, per_row=True)
    assert torch.equal(score, before)


def test_scores_against_their_formulas(real_weight):
    w, gen = real_weight.double(), torch.Generator().manual_seed(0)
    base, h = (w + 0.01 * torch.randn(w.shape, generator=gen)).float(), torch.rand(w.shape[1], generator=gen)
    want = {"magnitude": w.abs(), "residual": (w - base).abs(), "impact": (w - base) ** 2 * h}
    for name, formula in want.items():
        torch.testing.assert_close(SIEVES[name](real_weight, base=base, h=h).double(), formula, rtol=1e-4, atol=1e-6)
    g, f = torch.randn(w.shape, generator=gen), torch.rand(w.shape, generator=gen)
    contrast = SIEVES["contrast"](real_weight, grad=g, fisher=f, damp=0.5).double()
    torch.testing.assert_close(
        contrast, g.double() ** 2 / (f.double() + 0.5 * f.double().median()), rtol=1e-4, atol=1e-6
    )
    assert set(SIEVES) == {*want, "contrast"}


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"density": 0}, ["density", "(0, 1]", "got 0"]),
        ({"density": 1.7}, ["1.7", "did you mean 0.017"]),
        ({"density": 5}, ["did you mean 0.05"]),
        ({"density": -1}, ["got -1"]),
        ({"density": float("nan")}, ["density", "nan"]),
        ({"sparsity": 1.0}, ["sparsity", "[0, 1)"]),
        ({"density": 0.1, "sparsity": 0.9}, ["exactly one"]),
        ({}, ["exactly one"]),
        ({"density": 0.1, "by": "loudness"}, ["sieve", "loudness", "magnitude"]),
        ({"density": 0.1, "by": "contrast"}, ["contrast", "decompose"]),
        ({"density": 0.1, "by": "residual"}, ["residual", "base"]),
        ({"density": 0.1, "by": "impact", "base": torch.zeros(4, 8)}, ["impact", "pass h"]),
        ({"density": 0.1, "by": "impact", "base": torch.zeros(4, 8), "h": torch.ones(4)}, ["[8]", "[4]"]),
    ],
)
def test_bad_input_is_refused_in_words(kwargs, words):
    with pytest.raises(ValueError) as e:
        sieve(torch.ones(4, 8), **kwargs)
    assert all(word in str(e.value) for word in words), str(e.value)


def test_parameters_and_low_precision_are_fine():
    linear = torch.nn.Linear(32, 8)
    assert torch.equal(sieve(linear.weight, density=0.1), sieve(linear.weight.detach(), density=0.1))
    assert keep_top(torch.rand(8, 32).bfloat16(), 0.1).sum() == round(0.1 * 256)


def test_a_score_with_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        keep_top(torch.tensor([[1.0, float("nan")]]), 0.5)
