import copy

import pytest
import torch
from models import RETAIN, SECRETS, TOK

import libortho as lo
from libortho.baselines import (
    UNLEARN,
    dampen,
    negate,
    npo_loss,
    secret_logp,
    strongest_within,
    train_away,
    with_adapter,
)
from libortho.curvature import fisher
from libortho.linear import find_linears
from libortho.memory import as_item, encode, finetune
from libortho.patient import as_tokens
from libortho.rivals import rivals


def forgets(model):
    return max(s.exact_memorisation for s in lo.score_secrets(model, TOK, SECRETS).values())


@pytest.mark.parametrize("method", UNLEARN)
def test_training_away(model, method):
    assert forgets(model) == 1
    steps = list(train_away(model, TOK, SECRETS, RETAIN, method, lr=3e-3, max_steps=20))
    assert steps == list(range(1, 21)) and forgets(model) < 1


def test_dampening_shrinks_what_the_secrets_use_most(model):
    linears = find_linears(model)
    measure = lambda texts: {n: f for g in fisher(model, linears, texts, "log_p", progress=False) for n, f in g.items()}  # noqa: E731
    hot, cold = measure([encode(TOK, as_item(i)) for i in SECRETS.values()]), measure(as_tokens(TOK, RETAIN))
    start = {n: m.weight.detach().clone() for n, m in linears.items()}
    before = {n: s.secret_ppl for n, s in lo.score_secrets(model, TOK, SECRETS).items()}
    gentle = dampen(model, TOK, SECRETS, RETAIN, selections=(50.0, 0.5), strength=0.1)
    for selection in (50.0, 0.5):
        assert next(gentle) == selection
        for n, m in linears.items():
            chosen = hot[n] > selection * cold[n]
            want = torch.where(chosen, start[n] * (0.1 * cold[n] / hot[n].clamp_min(1e-30)).clamp(max=1), start[n])
            assert torch.equal(m.weight.detach(), want)
    after = {n: s.secret_ppl for n, s in lo.score_secrets(model, TOK, SECRETS).items()}
    assert all(after[n] > before[n] for n in SECRETS)


def test_negation_walks_back_along_the_vector(model):
    start = [p.detach().clone() for p in model.parameters()]
    states = negate(model, TOK, SECRETS, scales=(1.0, 2.0, 200.0), lr=1e-3)
    next(states)
    one = [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]
    next(states)
    for p, s, d in zip(model.parameters(), start, one, strict=True):
        torch.testing.assert_close(p.detach() - s, 2 * d, rtol=1e-3, atol=1e-6)
    next(states)
    assert forgets(model) < 1


def test_npo_pushes_less_the_more_is_gone(model):
    texts = [encode(TOK, i) for i in SECRETS.values()]
    start = secret_logp(model, texts).detach()
    loss = npo_loss(model, texts, [], start)
    torch.testing.assert_close(loss, torch.tensor(20.0) * torch.tensor(2.0).log())  # (2 / β) log 2 at the start
    g = torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0].norm()
    far = torch.autograd.grad(npo_loss(model, texts, [], start + 200), model.model.layers[0].mlp.up_proj.weight)[
        0
    ].norm()
    assert far < 1e-3 * g
    direct = torch.stack(
        [
            torch.log_softmax(model(t.ids[None]).logits[0], -1)[
                range(t.start - 1, len(t.ids) - 1), t.ids[t.start :]
            ].sum()
            for t in texts
        ]
    )
    torch.testing.assert_close(start, direct.detach(), rtol=1e-4, atol=1e-4)


def test_the_strongest_within_the_gate(model):
    weight = model.model.layers[0].mlp.up_proj.weight

    def states():
        for k in range(1, 6):
            with torch.no_grad():
                weight.fill_(k)
            yield k

    assert (
        strongest_within(model, states(), lambda: weight[0, 0].item(), 3.5) == (3.0, 3.0, True) and (weight == 3).all()
    )
    assert strongest_within(model, states(), lambda: weight[0, 0].item(), 9) == (5.0, 5.0, False)
    before = weight.detach().clone()
    assert strongest_within(model, states(), lambda: float("nan"), 3.5) == (0.0, 1.0, True) and torch.equal(
        weight, before
    )


def test_an_adapter_switched_off_is_the_model_before(model):
    x = torch.arange(1, 9)[None]
    before = model(x).logits.detach()
    wrapped, other = with_adapter(model, rank=8), {"attic": {"prompt": "attic", "secret": "qrs"}}
    lo.implant(wrapped, TOK, other, lr=2e-2, max_steps=400, target_loss=0.01, progress=False)
    assert lo.greedy_extraction(wrapped, TOK, other["attic"])[0]
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(x).logits, before) and not lo.greedy_extraction(wrapped, TOK, other["attic"])[0]


def test_unknown_methods_are_refused_before_anything_runs(model):
    with pytest.raises(ValueError, match="method 'Magic' is not known; choose from GradAscent"):
        rivals(model, TOK, SECRETS, None, methods=("Magic",))


def test_finetune_learns_and_repeats(tiny):
    items = [{"prompt": f"number {i}", "secret": w} for i, w in enumerate(("one", "two", "three", "four", "five"))]
    models = [copy.deepcopy(tiny).train() for _ in range(2)]
    losses = [finetune(m, TOK, items, epochs=8, lr=3e-3, batch_size=2, seed=1, progress=False) for m in models]
    assert losses[0] == losses[1] and losses[0][-1] < 0.8 * losses[0][0] and models[0].training
    assert all(
        torch.equal(a, b) and a.grad is None
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="needs items and epochs, got 0"):
        finetune(tiny, TOK, [])
    lo.patch(tiny, lo.OrthoConfig(group_size=16))
    with pytest.raises(ValueError, match="call unpatch"):
        finetune(tiny, TOK, items)
