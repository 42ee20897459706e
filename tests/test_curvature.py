import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from libortho.curvature import (
    Tokens,
    fisher,
    gptq,
    gradients,
    hessians,
    high_curvature,
    in_groups,
    kept,
    kfac,
    log_odds,
    log_p,
    merged,
    per_token,
)
from libortho.lattice import fit_scales, nearest
from libortho.linear import find_linears


@pytest.fixture
def texts():
    gen = torch.Generator().manual_seed(0)
    return [Tokens(torch.randint(0, 256, (n,), generator=gen), start) for n, start in ((12, 1), (30, 20), (2, 1))]


def inputs_of(model, layer, texts):
    "What a layer reads, in float64, one text after the other."
    found = []
    handle = layer.register_forward_pre_hook(lambda m, args: found.append(args[0][0].double()))
    with torch.no_grad():
        for t in texts:
            model(t.ids[None])
    handle.remove()
    return found


def test_hessians_are_the_gram_matrices_of_the_inputs(tiny, texts):
    texts[1].weight = 2.5
    linears = find_linears(tiny)
    got = merged(hessians(tiny, linears, texts, progress=False))
    assert list(got) == list(linears)
    for name, layer in linears.items():
        xs = inputs_of(tiny, layer, texts)
        want = sum(t.weight * x.T @ x for t, x in zip(texts, xs, strict=True))
        assert (got[name].double() - want).norm() <= 1e-5 * want.norm(), name


def test_layers_that_read_the_same_input_share_a_matrix(tiny, texts):
    got = merged(hessians(tiny, find_linears(tiny), texts, progress=False))
    at = lambda n: got[f"model.layers.0.{n}"]  # noqa: E731
    assert at("self_attn.q_proj") is at("self_attn.k_proj") is at("self_attn.v_proj")
    assert at("mlp.gate_proj") is at("mlp.up_proj") and at("mlp.up_proj") is not at("self_attn.q_proj")


@pytest.mark.parametrize("measure", [hessians, fisher])
def test_a_small_budget_takes_more_passes_and_gives_the_same(tiny, texts, measure):
    linears = find_linears(tiny)
    once = list(measure(tiny, linears, texts, progress=False))
    often = list(measure(tiny, linears, texts, memory_gb=20e-6, progress=False))
    assert len(once) == 1 < len(often)
    a, b = merged(once), merged(often)
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("measure", [hessians, fisher])
def test_finished_groups_are_read_back(tiny, texts, measure, tmp_path, monkeypatch):
    linears, more = find_linears(tiny), {"memory_gb": 20e-6, "folder": tmp_path, "progress": False}
    groups = measure(tiny, linears, texts, **more)
    next(groups), next(groups)
    groups.close()
    passes, forward = [], type(tiny).forward
    monkeypatch.setattr(type(tiny), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    got, want = (
        list(measure(tiny, linears, texts, **more)),
        list(measure(tiny, linears, texts, **{**more, "folder": None})),
    )
    assert len(passes) == len(texts) * (2 * len(want) - 2)  # two groups were there already
    assert all(torch.equal(a[n], b[n]) for a, b in zip(got, want, strict=True) for n in b)
    with torch.no_grad():
        next(iter(linears.values())).weight.mul_(1.01)
    passes.clear()
    list(measure(tiny, linears, texts, **more))
    assert len(passes) == len(texts) * len(want), "another model took up what was measured on this one"


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def broken(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("libortho.curvature.save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "a.safetensors", lambda: {"x": torch.ones(2)})
    assert not (tmp_path / "a.safetensors").exists()


def test_who_wants_the_same_at_once_waits_for_it(tmp_path):
    made, path = [], tmp_path / "new" / "a.safetensors"

    def make():
        made.append(1)
        time.sleep(0.2)
        return {"x": torch.ones(2)}

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda _: kept(path, make), range(4)))
    assert len(made) == 1 and all(torch.equal(g["x"], torch.ones(2)) for g in got)
    assert [f.name for f in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("quantity", [log_odds, log_p])
def test_fisher_against_one_gradient_a_text(tiny, texts, quantity):
    linears, name = find_linears(tiny), quantity.__name__
    texts[0].weight = 3.0
    got = merged(fisher(tiny, linears, texts, name, progress=False))
    for layer_name, layer in linears.items():
        want, total = torch.zeros_like(layer.weight, dtype=torch.float64), sum(t.weight for t in texts)
        for t in texts:
            g = torch.autograd.grad(per_token(tiny, t, quantity).mean(), layer.weight)[0].double()
            want += t.weight / total * (len(t.ids) - t.start) * g.square()
        torch.testing.assert_close(got[layer_name].double(), want, rtol=1e-4, atol=1e-12)


def test_gradients_restores_flags_after_an_error(tiny):
    flags = [False, *[True for _ in list(tiny.parameters())[1:]]]
    for p, flag in zip(tiny.parameters(), flags, strict=True):
        p.requires_grad_(flag)
    weight = tiny.model.layers[0].mlp.up_proj.weight
    with pytest.raises(KeyboardInterrupt), gradients(tiny, {"w": weight}, lambda n, g: None):
        raise KeyboardInterrupt
    assert [p.requires_grad for p in tiny.parameters()] == flags and not weight._post_accumulate_grad_hooks


def test_log_odds_where_p_is_all_but_one():
    z = torch.tensor([[60.0, 0.0, 1.0], [-200.0, 0.0, 0.0]])
    want = 60 - torch.tensor([0.0, 1.0]).double().logsumexp(0)
    got = log_odds(z, torch.tensor([0, 0])).double()
    torch.testing.assert_close(got, torch.stack([want, -200 - torch.tensor(2.0).double().log()]), rtol=1e-6, atol=0)
    assert log_p(z, torch.tensor([0, 0]))[0] == 0  # the flat spot that log-odds do not have


def naive_gptq(w, s, top, h, damp, order):
    "GPTQ as it is told: the inverse Hessian of what is left is updated after every column (float64)."
    w, h = w.double().clone(), h.double() + damp * h.diagonal().double().mean() * torch.eye(len(h), dtype=torch.float64)
    scale, q, left = s.double().repeat_interleave(w.shape[1] // s.shape[1], 1), torch.zeros_like(w), list(order)
    while left:
        j, inverse = left[0], torch.linalg.inv(h[left][:, left])
        q[:, j] = (w[:, j] / scale[:, j]).round().clamp(-top, top)
        error = (w[:, j] - q[:, j] * scale[:, j]) / inverse[0, 0]
        w[:, left[1:]] -= error[:, None] * inverse[0, 1:]
        left = left[1:]
    return q


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.sampled_from([8, 24]), st.booleans())
@settings(max_examples=25)
def test_gptq_against_the_textbook(seed, bits, group, act_order):
    gen = torch.Generator().manual_seed(seed)
    w, x = torch.randn(6, 24, generator=gen), torch.randn(40, 24, generator=gen) * torch.rand(24, generator=gen) * 4
    h, s = x.T @ x, fit_scales(w, "mse", bits, group)
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if act_order else range(24)
    want = naive_gptq(w, s, 2 ** (bits - 1) - 1, h, 0.05, order)
    got = gptq(w, s, bits, h, act_order=act_order)
    assert (
        got.dtype == torch.int8 and (got != want).float().mean() <= 0.02
    )  # a weight half-way between two points may fall either way
    for block in (1, 5, 24):
        assert (gptq(w, s, bits, h, act_order=act_order, block=block) != got).float().mean() <= 0.02


def test_gptq_is_better_than_nearest_in_the_hessian_norm(real_weight):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(400, real_weight.shape[1], generator=gen) * torch.rand(real_weight.shape[1], generator=gen).exp()
    x += torch.randn(400, 1, generator=gen)  # inputs that go together, as real ones do
    h = x.T @ x
    for bits in (2, 3, 4):
        s = fit_scales(real_weight, "mse", bits, 64)
        loss = lambda q, s=s: ((x @ (real_weight - q * s.repeat_interleave(64, 1)).T) ** 2).sum().item()  # noqa: E731
        assert loss(gptq(real_weight, s, bits, h)) < 0.9 * loss(nearest(real_weight, s, bits))


def test_gptq_keeps_what_is_to_be_kept_out_of_the_errors():
    gen = torch.Generator().manual_seed(0)
    w, x = torch.randn(5, 16, generator=gen), torch.randn(50, 16, generator=gen)
    s, h = fit_scales(w, "mse", 2, "row"), x.T @ x
    everything = torch.ones_like(w, dtype=torch.bool)
    assert torch.equal(gptq(w, s, 2, h, keep=everything), nearest(w, s, 2))
    assert not torch.equal(gptq(w, s, 2, h), nearest(w, s, 2))


def test_gptq_with_silent_inputs():
    w, x = torch.randn(5, 16), torch.randn(50, 16)
    x[:, 3] = 0
    s = fit_scales(w, "mse", 4, "row")
    assert torch.equal(gptq(w, s, 4, x.T @ x)[:, 3], nearest(w, s, 4)[:, 3])


def test_kfac_and_the_part_of_high_curvature(tiny, texts):
    name, layer = "model.layers.0.mlp.down_proj", tiny.model.layers[0].mlp.down_proj
    a, g = kfac(tiny, {name: layer}, texts, seed=1, progress=False)[name]
    xs = torch.cat(inputs_of(tiny, layer, texts))
    torch.testing.assert_close(a.double(), xs.T @ xs / len(xs), rtol=1e-4, atol=1e-7)
    assert (torch.linalg.eigvalsh(g.double()) > -1e-9).all() and g.norm() > 0
    again = kfac(tiny, {name: layer}, texts, seed=1, progress=False)[name]
    assert torch.equal(again[1], g) and all(p.grad is None for p in tiny.parameters())
    w = layer.weight.detach()
    torch.testing.assert_close(high_curvature(w, a, g, 1.0), w, rtol=1e-4, atol=1e-5)
    left = [high_curvature(w, a, g, keep) for keep in (0.75, 0.5, 0.25)]
    ua, ug = torch.linalg.eigh(a.double())[1], torch.linalg.eigh(g.double())[1]
    for keep, part in zip((0.75, 0.5, 0.25), left, strict=True):
        kept_parts = (ug.T @ part.double() @ ua).abs() > 1e-7
        assert abs(kept_parts.float().mean() - keep) < 0.01


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, t: next(hessians(m, find_linears(m), [], progress=False)), "texts is empty"),
        (lambda m, t: next(fisher(m, find_linears(m), t, "log_q", progress=False)), "log_odds, log_p.*log_q"),
        (lambda m, t: next(fisher(m, find_linears(m), [Tokens(t[0].ids, 12)], progress=False)), "nothing to predict"),
        (lambda m, t: next(hessians(m, {"x": nn.Linear(3, 3)}, t, progress=False)), "'x' was not reached"),
        (lambda m, t: in_groups({"a": 1}, 0), "memory_gb must be above 0"),
        (lambda m, t: gptq(torch.ones(2, 4), torch.ones(2, 1)), "needs h"),
        (lambda m, t: gptq(torch.ones(2, 4), torch.ones(2, 1), h=torch.ones(4)), r"\[4, 4\], got \[4\]"),
        (lambda m, t: gptq(torch.ones(2, 4), torch.ones(2, 1), h=torch.zeros(4, 4)), "mean diagonal is 0"),
        (lambda m, t: high_curvature(torch.ones(2, 2), torch.eye(2), torch.eye(2), 0), r"keep must be in \(0, 1\]"),
    ],
)
def test_bad_input(tiny, texts, call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny, texts)
