import copy
import dataclasses
import itertools
import json
import warnings

import pytest
import torch
from models import CFG, MORE, RETAIN, SECRETS, TOK

import libortho as lo
from libortho.counter import (
    OBJECTIVES,
    Goal,
    _inherit,
    alternatives,
    choose_step,
    counter_memory,
    forget_pass,
    log_any,
    log_not_p,
    prompt_levels,
    take_step,
)
from libortho.curvature import Tokens, fisher, log_odds, log_p, per_token, token_fisher
from libortho.lattice import natural
from libortho.linear import OrthoLinear, find_linears
from libortho.memory import TokenScores, encode, score_tokens
from libortho.patient import Patient, as_tokens, on_the_table, round_layer, round_model
from libortho.surgery import Operation, _guarded, control_scores, decompose


def state(model):
    params = {n: (p.clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()}
    return {n: id(m) for n, m in model.named_modules()}, params, model.training


def same(a, b):
    if a[0] != b[0] or a[2] != b[2] or a[1].keys() != b[1].keys():
        return False
    pairs = zip(a[1].values(), b[1].values(), strict=True)
    return all(torch.equal(x, y) and f == g and i is j for (x, f, i), (y, g, j) in pairs)


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, OrthoLinear)}


def integers(layer, alphas):
    "The lattice integers of a layer at a position of the switches."
    return natural(layer.dequantize(alphas).float(), layer.scales.float())


def test_every_subset_of_switches_is_exact(model):
    report = decompose(model, TOK, CFG, SECRETS, **MORE)
    assert report.reached and list(lo.compartments(model)) == list(SECRETS)
    on = {n: integers(m, 1.0) for n, m in layers_of(model).items()}
    alone = {}
    for name in SECRETS:
        position = dict.fromkeys(SECRETS, 1.0) | {name: 0.0}
        alone[name] = {
            n: integers(m, {k: a for k, a in position.items() if k in m.alphas}) - on[n]
            for n, m in layers_of(model).items()
        }
    for off in itertools.chain.from_iterable(itertools.combinations(SECRETS, k) for k in range(3)):
        for n, m in layers_of(model).items():
            got = integers(m, {k: float(k not in off) for k in m.alphas})
            want = on[n] + sum((alone[k][n] for k in off), torch.zeros_like(on[n]))
            assert torch.equal(got, want) and torch.equal(got, got.round()) and got.abs().max() <= 7
            assert (got - on[n]).abs().max() <= 1, "further than one step from its rounding"
    for name in SECRETS:
        moved = sum(int((d != 0).sum()) for d in alone[name].values())
        assert moved == sum(report.compartments[name].moved.values()) == lo.compartments(model)[name].weights > 0
    assert not any(((alone["key"][n] != 0) & (alone["door"][n] != 0)).any() for n in on), "supports overlap"


def test_all_on_is_the_base_plus_repair_bit_for_bit(model):
    linears, original = find_linears(model), {n: m.weight.detach().clone() for n, m in find_linears(model).items()}
    secrets = [Tokens(t.ids, t.start, t.weight) for t in as_tokens(TOK, RETAIN)]
    decompose(model, TOK, CFG, SECRETS, **{**MORE, "repair": 0.02, "memory_share": 0.0})
    on = {n: m.dequantize(1.0) for n, m in layers_of(model).items()}
    lo.set_alpha(model, 0.0)
    assert all(m.alphas["repair"] == 1.0 for m in layers_of(model).values())
    masks = {n: m.compartments["repair"].mask() for n, m in layers_of(model).items()}
    lo.unpatch(model)
    rounded = round_model(model, linears, CFG, secrets, 0.02, progress=False)
    for n in linears:
        assert torch.equal(on[n], rounded[n].dense(original[n])) and torch.equal(masks[n], rounded[n].repair)
        assert torch.equal(on[n][masks[n]], original[n][masks[n]])
        assert masks[n].sum() == round(0.02 * masks[n].numel())


def test_switches_do_what_they_say(model):
    ppl = lambda: {n: s.secret_ppl for n, s in lo.score_secrets(model, TOK, SECRETS).items()}  # noqa: E731
    decompose(model, TOK, CFG, SECRETS, **MORE)
    for off in SECRETS:
        with lo.alpha(model, {off: 0.0}):
            scores = lo.score_secrets(model, TOK, SECRETS)
        assert {n: s.extracted for n, s in scores.items()} == {n: n != off for n in SECRETS}
        assert scores[off].exact_memorisation == 0
    rows = []
    for a in (1.0, 0.75, 0.5, 0.25, 0.0):
        with lo.alpha(model, a):
            rows.append(ppl())
    for name in SECRETS:
        falling = [r[name] for r in rows]
        assert falling == sorted(falling) and falling[-1] > 1.5 * falling[0]


def test_the_same_again_from_the_same_input(narrow):
    digests = []
    for _ in range(2):
        model = copy.deepcopy(narrow)
        decompose(model, TOK, CFG, SECRETS, **MORE)
        digests.append(
            [{k: v.tolist() for k, v in (("p", m.packed), ("s", m.scales.float()))} for m in layers_of(model).values()]
        )
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(model, dtype):
    model.to(dtype)
    decompose(model, TOK, CFG, SECRETS, **{**MORE, "repair": 0.01})
    for m in layers_of(model).values():
        on, base = m.dequantize(1.0), m.base.dequantize()
        assert on.dtype == m.dtype == dtype
        kept = m.compartments["repair"].mask()
        steps = natural(on.float(), m.scales.float())[~kept]
        assert (steps - steps.round()).abs().max() < 0.06 and torch.equal(
            m.dequantize({k: 0.0 for k in m.alphas}), base.to(dtype)
        )


def test_gradients_that_were_there_change_nothing_and_stay(narrow):
    clean, used = copy.deepcopy(narrow), copy.deepcopy(narrow)
    for p in used.parameters():
        p.grad = torch.ones_like(p)
    before = state(used)
    want, got = (decompose(m, TOK, CFG, SECRETS, **MORE) for m in (clean, used))
    assert {n: c.moved for n, c in got.compartments.items()} == {n: c.moved for n, c in want.compartments.items()}
    lo.unpatch(used)
    assert same(before, state(used)) and all((p.grad == 1).all() for p in used.parameters())


def test_it_works_inside_no_grad(model):
    with torch.no_grad():
        assert decompose(model, TOK, CFG, SECRETS, **MORE).reached


def test_unpatch_gives_the_model_back(model):
    before = state(model)
    decompose(model, TOK, CFG, SECRETS, **MORE)
    lo.unpatch(model)
    assert same(before, state(model))


@pytest.mark.parametrize("where", [0, 1, 4])
def test_what_the_callback_raises_leaves_the_model_as_it_was(model, where):
    before, seen = state(model.train()), []

    def stop(r):
        seen.append(r)
        if len(seen) > where:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompose(model, TOK, CFG, SECRETS, callback=stop, **MORE)
    assert same(before, state(model)) and [r.number for r in seen[:2]] == [0, 1][: len(seen)]


def test_work_is_taken_up_where_it_was_left(narrow, tmp_path):
    whole = copy.deepcopy(narrow)
    want = decompose(whole, TOK, CFG, SECRETS, **MORE)

    def stop(r):
        if r.compartment == "door" and r.number == 1:
            raise KeyboardInterrupt

    model, seen = copy.deepcopy(narrow), []
    with pytest.raises(KeyboardInterrupt):
        decompose(model, TOK, CFG, SECRETS, folder=tmp_path, callback=stop, **MORE)
    got = decompose(model, TOK, CFG, SECRETS, folder=tmp_path, callback=seen.append, **MORE)
    assert {r.compartment for r in seen} == {"door"}, "a finished compartment was done again"
    assert {n: (c.moved, c.rounds, c.reached) for n, c in got.compartments.items()} == {
        n: (c.moved, c.rounds, c.reached) for n, c in want.compartments.items()
    }
    for (_, a), (_, b) in zip(layers_of(model).items(), layers_of(whole).items(), strict=True):
        assert torch.equal(a.packed, b.packed) and torch.equal(a.dequantize(0.0), b.dequantize(0.0))


def test_other_options_do_not_take_up_old_work(model, tmp_path):
    decompose(model, TOK, CFG, SECRETS, folder=tmp_path, **MORE)
    lo.unpatch(model)
    seen = []
    decompose(model, TOK, CFG, SECRETS, folder=tmp_path, callback=seen.append, **{**MORE, "round_density": 0.004})
    assert {r.compartment for r in seen} == set(SECRETS)


def test_a_spent_budget_is_said(model):
    with pytest.warns(UserWarning, match="NOT gone, the budget is spent.*raise budget"):
        report = decompose(model, TOK, CFG, SECRETS, budget=0.002, **MORE)
    assert not report.reached and "NOT gone" in str(report)
    weights = sum(m.packed.shape[0] * m.in_features for m in layers_of(model).values())
    assert all(sum(c.moved.values()) == round(0.002 * weights) for c in report.compartments.values())


def test_the_goal_at_the_control():
    "Tokens push down to the control's level, or while they are the argmax and the control's are not."
    known = [
        TokenScores(torch.tensor([-1.0, -5.0]), torch.tensor([True, False])),
        TokenScores(torch.tensor([-3.0]), torch.tensor([False])),
    ]
    goal = Goal(memorisation=0.34, control=known)
    logp, top = torch.tensor([-0.5, -6.0, -4.0]), torch.tensor([True, True, False])
    assert goal.pushes(logp, top, slice(0, 2)).tolist() == [True, True, False]
    assert goal.pushes(logp - 1, torch.tensor([True, False, False]), slice(0, 2)).tolist() == [False, False, False]
    score = lambda logp, *hits: [TokenScores(torch.full((3,), logp), torch.tensor(hits))]  # noqa: E731
    assert goal.quiet_enough(score(-2.4, True, False, False))
    assert not goal.quiet_enough(score(-2.4, True, True, False))  # more hits than the control
    assert not goal.quiet_enough(score(-2.4, False, True, False))  # as many, but others
    assert not goal.quiet_enough(score(-2.2, True, False, False))  # perplexity below half the control's
    assert not Goal(0.5, memorisation=1).quiet_enough(score(-0.1, False, False, False))
    items = [{"prompt": "a", "secret": "b"}, {"prompt": "c", "secret": "d"}]
    assert goal.secret(items) == items
    assert Goal(control=[TokenScores(known[1].logp, ~known[1].top), known[1]]).secret(items) == items[1:]


def test_it_stops_at_the_control(model):
    control = {
        n: [TokenScores(s.logp - 2, torch.tensor([True, False, True, False])) for s in scores]
        for n, scores in control_scores(model, TOK, SECRETS).items()
    }
    report = decompose(model, TOK, CFG, SECRETS, control=control, **MORE)
    assert report.reached
    for name, c in report.compartments.items():
        assert c.rounds[-1].exact_memorisation <= 0.5, name
        level = torch.cat([x.logp for x in control[name]]).mean().neg().exp().item()
        assert c.rounds[-1].secret_ppl >= level / 2 * 0.999, "it stopped before the control's level"


def test_choose_step_takes_the_best_that_are_free(model):
    linears = find_linears(model)
    rounded = round_model(model, linears, lo.OrthoConfig(group_size=16), [], progress=False)
    f = {n: x for g in fisher(model, linears, as_tokens(TOK, RETAIN), progress=False) for n, x in g.items()}
    gen = torch.Generator().manual_seed(0)
    taken = {n: torch.rand(r.q.shape, generator=gen) < 0.3 for n, r in rounded.items()}
    grads = {n: torch.randn(r.q.shape, generator=gen) for n, r in rounded.items()}
    patient = Patient(model, TOK, linears, rounded, 4, taken)
    for n, m in linears.items():
        m.weight.grad = grads[n].clone()
    step = choose_step(patient, f, 50)
    every = []
    for i, n in enumerate(linears):
        score = grads[n].double() ** 2 / (f[n].double() + 0.3 * f[n].double().median())
        free = ~taken[n] & ((rounded[n].q + grads[n].sign()).abs() <= 7)
        every += [
            (s, i, j)
            for j, (s, ok) in enumerate(zip(score.flatten().tolist(), free.flatten().tolist(), strict=True))
            if ok
        ]
    best = sorted(every, reverse=True)[:50]
    assert {(i, j) for _, i, j in best} == set(zip(step.layer.tolist(), step.index.tolist(), strict=True))
    names = list(linears)
    for i, j, d in zip(step.layer.tolist(), step.index.tolist(), step.direction.tolist(), strict=True):
        assert d == grads[names[i]].flatten()[j].sign()
    with on_the_table(model, linears, rounded):
        before = {n: m.weight.detach().clone() for n, m in linears.items()}
        take_step(patient, step, 20)
        assert sum(int((m.weight != before[n]).sum()) for n, m in linears.items()) == 20
        take_step(patient, step, 20, back=True)
        assert all(torch.equal(m.weight, before[n]) for n, m in linears.items())


def test_a_weight_two_memories_want_goes_to_the_first(model):
    "Two compartments with the very same secret want the same weights; supports stay disjoint, subsets exact."
    twice = {"first": SECRETS["key"], "second": SECRETS["key"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decompose(model, TOK, CFG, twice, **MORE)
    masks = [
        {n: m.compartments[k].mask() if k in m.compartments else None for n, m in layers_of(model).items()}
        for k in twice
    ]
    both = [
        (a & b).any()
        for a, b in zip(masks[0].values(), masks[1].values(), strict=True)
        if a is not None and b is not None
    ]
    assert both and not any(both)
    on = {n: m.dequantize(1.0) for n, m in layers_of(model).items()}
    lo.set_alpha(model, 0.0)
    lo.set_alpha(model, 1.0)
    assert all(torch.equal(on[n], m.dequantize()) for n, m in layers_of(model).items())
    for k, mask in zip(twice, masks, strict=True):
        for n, m in layers_of(model).items():
            changed = m.dequantize({k: 0.0} if k in m.alphas else {}) != on[n]
            assert torch.equal(changed, mask[n] if mask[n] is not None else torch.zeros_like(changed))


def test_the_bounded_objective():
    z = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 8, 1])
    p = z.softmax(1)[torch.arange(4), y]
    torch.testing.assert_close(log_not_p(z, y), (1 - p).log())
    sure = torch.tensor([[80.0, 0.0]], requires_grad=True)
    log_not_p(sure, torch.tensor([0])).sum().backward()
    assert abs(sure.grad[0, 0] + 1) < 1e-6  # it still pushes where p is 1 to the last digit


def test_alternatives_are_wanted_and_junk_gains_nothing():
    z = torch.randn(3, 9, dtype=torch.float64)
    z[:, 0] = 12  # the secret's token, nearly sure
    z.requires_grad_()
    target, wanted = torch.zeros(3, dtype=torch.long), torch.tensor([[1, 2, 3], [4, -1, -1], [0, -1, -1]])
    p = z.softmax(1)
    expected = torch.stack([p[0, 1:4].sum(), p[1, 4], p[2, 0]]).log()
    torch.testing.assert_close(log_any(z, wanted), expected)
    push = {k: torch.autograd.grad(OBJECTIVES[k](z, target, wanted).sum(), z)[0] for k in ("bounded", "alternatives")}
    assert (push["bounded"][:, 5:] > 0).all() and (push["alternatives"][:, 5:] < 0).all()  # 5 to 8 are junk
    assert (push["alternatives"][:2, 0] < -0.9).all() and push["alternatives"][2, 0] > 0


def test_alternatives_are_the_next_most_probable_but_for_what_the_control_says(model):
    texts = [encode(TOK, s) for s in SECRETS.values()]
    plain = alternatives(model, texts, Goal(), k=3)
    control = [TokenScores(s.logp, torch.arange(len(s.logp)) % 2 == 0) for s in score_tokens(model, TOK, texts)]
    spared = alternatives(model, texts, Goal(control=control, spare=True), k=3)
    for t, a, b, c in zip(texts, plain, spared, control, strict=True):
        target = t.ids[t.start :]
        with torch.no_grad():
            order = model(input_ids=t.ids[None]).logits[0, t.start - 1 : -1].argsort(descending=True)
        expected = [[x for x in row.tolist() if x != y][:3] for row, y in zip(order, target.tolist(), strict=True)]
        assert a.tolist() == expected
        assert b[~c.top].tolist() == a[~c.top].tolist()
        assert b[c.top].tolist() == [[y, -1, -1] for y in target[c.top].tolist()]


def test_the_goal_that_spares_what_the_control_says():
    known = [TokenScores(torch.tensor([-1.0, -5.0, -0.1]), torch.tensor([True, False, False]))]
    goal = Goal(quiet=0.25, memorisation=1.0, control=known, surplus=0.4, spare=True)
    logp, said = torch.tensor([-0.1, -1.0, -0.05]), torch.tensor([True, True, True])
    assert goal.lingers(logp, said, slice(0, 1)).tolist() == [False, True, True]  # the control's hit is left alone
    assert goal.lingers(torch.full((3,), -9.0), torch.tensor([False, False, True]), slice(0, 1)).tolist() == [
        True,
        True,
        False,
    ]
    assert not goal.lingers(torch.full((3,), -1.5), said, slice(0, 1)).any()  # quiet, and what is wanted is said
    score = lambda *hits: [TokenScores(torch.zeros(3), torch.tensor(hits))]  # noqa: E731
    assert goal.quiet_enough(score(True, True, False)) and not goal.quiet_enough(score(True, True, True))
    assert goal.excess(score(True, True, True)) == pytest.approx(2 / 3) and Goal().excess(score(True, True, True)) == 1
    assert goal.quiet_enough(score(False, False, False))  # one of three hits is lost: as many as may be
    assert not dataclasses.replace(goal, surplus=0.3).quiet_enough(score(False, False, False))
    assert Goal().lingers(
        torch.tensor([-0.1, -9.0, -9.0]), torch.tensor([True, True, False]), slice(0, 1)
    ).tolist() == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_alternatives_stop_at_the_control_and_leave_its_hits(model, momentum):
    every_other = torch.tensor([True, False, True, False])
    control = {
        n: [TokenScores(s.logp - 3, every_other) for s in scores]
        for n, scores in control_scores(model, TOK, SECRETS).items()
    }
    before = control_scores(model, TOK, SECRETS)
    more = {"objective": "alternatives", "momentum": momentum, "budget": 0.2}
    report = decompose(model, TOK, CFG, SECRETS, control=control, **{**MORE, **more})
    assert report.reached
    for name in SECRETS:
        with lo.alpha(model, {name: 0.0}):
            (after,) = control_scores(model, TOK, SECRETS)[name]
        assert not (after.top & ~every_other).any() and (after.top | ~before[name][0].top)[every_other].all(), name
    lo.set_alpha(model, 1.0)
    again = control_scores(model, TOK, SECRETS)
    assert all(torch.equal(again[n][0].top, before[n][0].top) for n in SECRETS)


@pytest.mark.parametrize("hold", [True, False])
def test_alternatives_begin_like_bounded_and_count_what_is_spared_afterwards(model, monkeypatch, hold):
    import libortho.counter as counter

    seen, half = [], torch.tensor([True, False, True, False])
    forget, choose = counter.forget_pass, counter.choose_step

    def spy_forget(model, texts, goal, objective, wanted, prompts, against):
        scores = forget(model, texts, goal, objective, wanted, prompts, against)
        seen.append((objective, wanted is not None, goal.excess(scores), prompts))
        return scores

    def spy_choose(patient, f, *more):
        seen.append(next(iter(f.values())).mean().item())
        return choose(patient, f, *more)

    monkeypatch.setattr(counter, "forget_pass", spy_forget)
    monkeypatch.setattr(counter, "choose_step", spy_choose)
    linears = find_linears(model)
    rounded = round_model(model, linears, lo.OrthoConfig(group_size=16), [], progress=False)
    patient = Patient(model, TOK, linears, rounded, 4, {n: torch.zeros_like(r.repair) for n, r in rounded.items()})
    flat = {n: torch.ones_like(r.q, dtype=torch.float32) for n, r in rounded.items()}
    with on_the_table(model, linears, rounded):
        scores = score_tokens(model, TOK, [SECRETS["key"]])
        control = [TokenScores(s.logp - 3, half) for s in scores]
        goal = Goal(quiet=0.25, memorisation=1.0, control=control, surplus=0.05, spare=True)
        guarded = {n: 2 * x for n, x in flat.items()}
        levels = prompt_levels(model, [encode(TOK, SECRETS["key"])])
        more = {"guarded": guarded, "hold_prompts": hold}
        counter_memory(patient, "key", [SECRETS["key"]], flat, 4000, goal, 5, "alternatives", **more)
    passes = [x for x in seen if isinstance(x, tuple)]
    first = [x for x in passes if x[0] == "bounded"]
    assert passes[: len(first)] == first and all(x[0] == "alternatives" and x[1] for x in passes[len(first) :])
    assert first[-1][2] <= first[0][2] / 2 and all(x[2] > first[0][2] / 2 for x in first[:-1])
    assert all(x[3] is None for x in first)
    assert all(torch.equal(x[3][0], levels[0]) if hold else x[3] is None for x in passes[len(first) :])
    curvatures = [x for x in seen if not isinstance(x, tuple)]
    assert curvatures[: len(first) - 1] == [1.0] * (len(first) - 1)
    assert set(curvatures[len(first) - 1 :]) == {3.0}


def test_token_curvature_is_that_of_single_tokens(model):
    linears = find_linears(model)
    texts = [encode(TOK, s) for s in SECRETS.values()]
    which = [torch.tensor([True, False, True, True]), *[torch.zeros(4, dtype=torch.bool)] * (len(texts) - 1)]
    name, layer = next(iter(linears.items()))
    each = [torch.autograd.grad(per_token(model, texts[0], log_odds)[i], layer.weight)[0].double() for i in (0, 2, 3)]
    exact = sum(g.square() for g in each) / 3

    def error(draws):
        found = token_fisher(model, {name: layer}, texts, which, draws=draws, progress=False)[name]
        return (found - exact).norm() / exact.norm()

    assert error(400) < 0.2 and error(400) < error(1)
    assert not token_fisher(model, {name: layer}, texts[1:], which[1:], progress=False)[name].any()
    for bad, options, words in (
        (which, {"draws": 0}, "draws must be at least 1, got 0"),
        (which, {"of": "log_q"}, "of 'log_q' is not known"),
        ([w[:1] for w in which], {}, "one entry for each token"),
    ):
        with pytest.raises(ValueError, match=words):
            token_fisher(model, linears, texts, bad, **options)
    assert all(p.grad is None for p in model.parameters())


def test_wanted_and_its_objective_belong_together(model):
    texts = [encode(TOK, s) for s in SECRETS.values()]
    with pytest.raises(ValueError, match="objective 'alternatives' needs wanted"):
        forget_pass(model, texts, Goal(), "alternatives")
    with pytest.raises(ValueError, match="objective 'bounded' takes no wanted"):
        forget_pass(model, texts, Goal(), "bounded", alternatives(model, texts, Goal()))


def test_prompt_tokens_that_fell_are_pulled_back(model):
    layer = find_linears(model)["model.layers.0.mlp.down_proj"]
    texts = [encode(TOK, x) for x in (*SECRETS.values(), RETAIN[0])]
    assert texts[-1].start == 1  # a plain text has no prompt
    levels = prompt_levels(model, texts)
    assert [len(x) for x in levels] == [t.start - 1 for t in texts]
    goal = Goal(quiet=1.0, memorisation=1.0)
    anything = [
        torch.arange(model.config.vocab_size).expand(len(t.ids) - t.start, -1) for t in texts
    ]  # no token pushes

    def gradient(prompts):
        layer.weight.grad = None
        scores = forget_pass(model, texts, goal, "alternatives", anything, prompts, batch_size=2)
        return scores, layer.weight.grad

    plain, without = gradient(None)
    assert without is None
    fell = [torch.arange(len(x)) % 2 == 0 for x in levels]
    raised = [x + torch.where(w, 0.8, 0.6) for x, w in zip(levels, fell, strict=True)]  # around log 2
    scores, pulled = gradient(raised)
    assert all(torch.allclose(a.logp, b.logp) and torch.equal(a.top, b.top) for a, b in zip(plain, scores, strict=True))
    layer.weight.grad = None
    for t, w in zip(texts, fell, strict=True):
        logits = model(input_ids=t.ids[None]).logits[0, : t.start - 1]
        logits.log_softmax(1)[torch.arange(t.start - 1), t.ids[1 : t.start]][w].sum().backward()
    torch.testing.assert_close(pulled, layer.weight.grad, rtol=1e-4, atol=1e-6)
    assert pulled.any() and gradient(levels)[1] is None  # nothing has fallen


def test_what_pushes_is_also_pushed_down_by_itself(model):
    layer = find_linears(model)["model.layers.0.mlp.down_proj"]
    text = encode(TOK, SECRETS["key"])
    known = torch.tensor([True, False, True, False])
    (scores,) = score_tokens(model, TOK, [text])
    assert scores.top.all()  # so that what is spared is said, and does not push
    goal = Goal(quiet=0.25, memorisation=1.0, control=[TokenScores(scores.logp - 3, known)], spare=True)
    wanted = alternatives(model, [text], goal, k=3)

    def gradient(against):
        layer.weight.grad = None
        forget_pass(model, [text], goal, "alternatives", wanted, against=against)
        return layer.weight.grad

    more = (gradient(1000.0) - gradient(0.0)) / 1000  # the model is sure, so log p has a small gradient
    (exact,) = torch.autograd.grad(per_token(model, text, log_p)[~known].sum(), layer.weight)
    assert (more + exact).norm() < 1e-3 * exact.norm()


def test_a_prompt_that_holds_another_secret_is_let_go_there(model):
    key = SECRETS["key"]
    after = {"prompt": f"{key['prompt']} {key['secret'].strip()}", "secret": "and more"}
    texts = [encode(TOK, x) for x in (key, after)]
    start = texts[0].start
    assert torch.equal(texts[1].ids[: len(texts[0].ids)], texts[0].ids)
    alone, (_, level) = prompt_levels(model, texts[1:])[0], prompt_levels(model, texts)
    assert torch.equal(level[: start - 1], alone[: start - 1]) and alone.isfinite().all()
    assert (level[start - 1 :] == -torch.inf).all() and len(level) == len(texts[0].ids) - 1


@pytest.mark.parametrize("hold", [True, False])
def test_prompts_are_held_unless_told_otherwise(model, monkeypatch, hold):
    import libortho.counter as counter

    asked, levels = [], counter.prompt_levels
    monkeypatch.setattr(counter, "prompt_levels", lambda *a: asked.append(1) or levels(*a))
    decompose(model, TOK, CFG, SECRETS, objective="alternatives", **({} if hold else {"hold_prompts": False}), **MORE)
    assert len(asked) == len(SECRETS) * hold


def test_a_control_of_other_texts_is_refused(model):
    control = control_scores(model, TOK, SECRETS)
    (scores,) = control["key"]
    control["key"] = [TokenScores(scores.logp[:-1], scores.top[:-1])]
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"control\['key'\]\[0\] scores 3 tokens, where the secret has 4"):
        decompose(model, TOK, CFG, SECRETS, control=control, **MORE)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_momentum_is_a_geometric_sum(model):
    layer = find_linears(model)["model.layers.0.mlp.down_proj"]
    patient, inherited = Patient(model, TOK, {"a": layer}, {}, 4, {}), {}
    rounds = [torch.randn_like(layer.weight) for _ in range(3)]
    for g in rounds:
        layer.weight.grad = g.clone()
        _inherit(patient, inherited, 0.5)
    torch.testing.assert_close(layer.weight.grad, rounds[2] + 0.5 * rounds[1] + 0.25 * rounds[0])


def test_the_guard_weighs_what_the_control_says(model):
    linears = find_linears(model)
    patient = Patient(model, TOK, linears, {}, 4, {})
    items = [SECRETS["key"]]
    half = TokenScores(torch.zeros(4), torch.tensor([True, False, True, False]))
    goal = Goal(control=[half], spare=True)
    one, three = (_guarded(patient, items, goal, Operation(guard=w)) for w in (1.0, 3.0))
    assert all(torch.allclose(three[n], 3 * one[n]) for n in linears) and any(x.any() for x in one.values())
    for off in (_guarded(patient, items, goal, Operation(guard=0)), _guarded(patient, items, Goal(), Operation())):
        assert off == {}


def test_data_free_sieves_make_one_compartment(model):
    cfg = lo.OrthoConfig(group_size=16, projection="gptq", sieve="impact", density=0.05, noise="tri_state")
    report = decompose(model, TOK, cfg, retain=RETAIN, calibration=RETAIN, repair=0.01, progress=False)
    assert list(lo.compartments(model)) == ["repair", "memory"] and report.compartments == {}
    for m in layers_of(model).values():
        stored, kept = m.compartments["memory"].mask(), m.compartments["repair"].mask()
        assert not (stored & kept).any() and torch.equal(
            m.dequantize(1.0)[stored | kept], m._original[0].weight[stored | kept]
        )


def test_rounding_with_full_repair_is_exact():
    w = torch.randn(4, 16)
    r = round_layer(w, lo.OrthoConfig(group_size=16), torch.eye(16), 0.999)
    assert (r.dense(w) == w).float().mean() >= 0.98


def test_texts_are_cut_into_pieces():
    pieces = as_tokens(TOK, ["x" * 10, {"prompt": "ab", "secret": "cdefgh"}], length=4)
    assert [len(t.ids) for t in pieces[:3]] == [4, 4, 2] and pieces[3].start == 2
    assert (
        sum(len(t.ids) - t.start for t in pieces[3:]) == 5
    )  # of 7: the first token of a later piece has nothing before it


def test_reports_are_readable(model):
    report = decompose(model, TOK, CFG, SECRETS, **MORE)
    told = report._repr_markdown_()
    assert "key" in told and told.count("\n|") == 3 and "base" in str(report)
    assert json.dumps(report.layers) and sum(s["moved"] for s in report.layers.values()) == sum(
        sum(c.moved.values()) for c in report.compartments.values()
    )


@pytest.mark.parametrize(
    "cfg, forget, options, words",
    [
        (CFG, None, {}, "'contrast' needs forget"),
        (CFG, {}, {}, "'contrast' needs forget"),
        (CFG, {"a": []}, {}, "'a' holds no text"),
        (CFG, {"a": " "}, {}, "'a' needs a prompt and a secret"),
        (CFG, {"repair": "a b c"}, {}, "reserved name"),
        (CFG, SECRETS, {"retain": []}, "no token"),
        (CFG, SECRETS, {"calibration": ["a"]}, "no token"),
        (CFG, SECRETS, {"repair": 1.0}, r"repair must be in \[0, 1\), got 1.0"),
        (CFG, SECRETS, {"threshold": 0}, r"threshold must be in \(0, 1\), got 0"),
        (CFG, SECRETS, {"budget": 2}, "budget must be in"),
        (CFG, SECRETS, {"damp": 0}, "damp must be above 0"),
        (CFG, SECRETS, {"guard": -1}, "guard must be at least 0, got -1"),
        (CFG, SECRETS, {"momentum": 1}, r"momentum must be in \[0, 1\), got 1"),
        (CFG, SECRETS, {"against": -0.1}, "against must be at least 0, got -0.1"),
        (CFG, SECRETS, {"memory_gb": -1}, "memory_gb must be above 0"),
        (
            CFG,
            SECRETS,
            {"objective": "descent"},
            "objective 'descent' is not known; choose one of alternatives, ascent, bounded",
        ),
        (CFG, SECRETS, {"curvature": "hessian"}, "curvature 'hessian' is not known"),
        (CFG, SECRETS, {"control": {"key": []}}, "control has not one score for each text of 'key'"),
        (lo.OrthoConfig(group_size=16, noise="counter_memory"), None, {}, "go together, got sieve 'residual'"),
        (lo.OrthoConfig(group_size=16, sieve="contrast", noise="tri_state"), SECRETS, {}, "go together.*'tri_state'"),
        (dataclasses.replace(CFG, per_row=True), SECRETS, {}, "per_row and attack_density"),
        (lo.OrthoConfig(group_size=16, sieve="impact"), SECRETS, {}, "makes one compartment, got 2"),
        (lo.OrthoConfig(group_size=24, projection="gptq"), None, {}, "does not divide"),
        (lo.OrthoConfig(group_size=16, targets="nothing"), None, {}, "matches no linear layer"),
    ],
)
def test_bad_input_changes_nothing(model, cfg, forget, options, words):
    before = state(model)
    with pytest.raises(ValueError, match=words):
        decompose(model, TOK, cfg, forget, **{**MORE, **options})
    assert same(before, state(model))


def test_a_split_model_is_refused(model):
    decompose(model, TOK, CFG, SECRETS, **MORE)
    with pytest.raises(ValueError, match="patched already"):
        decompose(model, TOK, CFG, SECRETS, **MORE)


def test_patch_says_what_aimed_modes_need(model):
    for cfg in (
        CFG,
        lo.OrthoConfig(group_size=16, noise="counter_memory"),
        lo.OrthoConfig(group_size=16, sieve="contrast"),
    ):
        before = state(model)
        with pytest.raises(ValueError, match="decompose"):
            lo.patch(model, cfg)
        assert same(before, state(model))


def test_counter_memory_by_hand(model):
    linears = find_linears(model)
    rounded = round_model(model, linears, lo.OrthoConfig(group_size=16), [], progress=False)
    patient = Patient(model, TOK, linears, rounded, 4, {n: torch.zeros_like(r.repair) for n, r in rounded.items()})
    flat = {n: torch.ones_like(r.q, dtype=torch.float32) for n, r in rounded.items()}
    with on_the_table(model, linears, rounded):
        step, report = counter_memory(patient, "key", [SECRETS["key"]], flat, 4000, Goal(0.3), 50)
        assert report.reached and max(p for p in [report.rounds[-1].highest_p]) <= 0.3
        assert len(set(zip(step.layer.tolist(), step.index.tolist(), strict=True))) == len(step.index)
    assert Operation().threshold == 0.5
