"""The search: what is proposed, what is within the bounds, what is dropped, and that nothing finished is lost."""

import copy
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
from models import RETAIN, SECRETS, TEXTS, TOK, learned_llama

import libortho as lo
from libortho import tuner
from libortho.linear import OrthoLinear
from libortho.tuner import Bounds, Outcome, Space, label_of, points, search, task, try_policy, tune, tune_groups

SMALL = Space(
    noise=("none", "tri_state", "counter_memory"),
    targets=("down_proj", "all-linear"),
    scale=("max", "ratio"),
    ratio=(2.5, 3.5),
    density=(0.05,),
    projection=("nearest",),
    budget=(0.2,),
    round_density=(2e-3,),
)
LOOSE = Bounds(retain=3.0, prose=3.0, utility=3.0)


@pytest.fixture
def what(learned, control):
    return task(copy.deepcopy(learned), TOK, SECRETS, control, RETAIN, TEXTS, bounds=LOOSE, calibration=RETAIN)


def outcome(point, **kw):
    figures = {
        "left": 0.0,
        "extracted": 0.0,
        "recited": 1.0,
        "retain": 1.0,
        "prose": 1.0,
        "utility": 1.0,
        "density": 0.1,
    }
    return Outcome(point, **{**figures, "verdict": "SUCCESS: forgotten", **kw})


def test_a_point_is_whole_and_named_once():
    every = points(SMALL)
    assert len(every) == len({label_of(p) for p in every}) == 2 * 2 * 3 + 2
    assert all(("ratio" in p) == (p.get("scale") == "ratio") for p in every)
    assert all(json.loads(json.dumps(p)) == p for p in every)
    for p in every:
        cfg = tuner.config_of(p)
        assert cfg.noise == p["noise"] and cfg.targets == p["targets"]
        assert cfg.density == p.get("density", p.get("budget"))


@pytest.mark.parametrize("field, values, said", [("noise", (), "space.noise is empty"), ("scale", ("huge",), "huge"),
                                                 ("density", (7.0,), "density")])  # fmt: skip
def test_a_space_that_cannot_work(field, values, said):
    with pytest.raises(ValueError, match=said):
        Space(**{field: values})


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_bounds_that_cannot_work(value):
    with pytest.raises(ValueError, match="bounds.prose must be above 0 and finite"):
        Bounds(prose=value)


@pytest.mark.parametrize("key, value", [("retain", 1.06), ("prose", 1.06), ("utility", 1.11), ("recited", 0.5),
                                        ("retain", math.nan), ("utility", math.inf)])  # fmt: skip
def test_each_bound_binds_alone(key, value):
    good = outcome(points(SMALL)[0])
    assert good.feasible(Bounds())
    bad = outcome(points(SMALL)[0], **{key: value})
    assert not bad.feasible(Bounds()) and bad.excess(Bounds())[key] > 0
    assert all(x <= 0 for k, x in bad.excess(Bounds()).items() if k != key)


def test_what_was_dropped_is_not_feasible():
    assert not outcome(points(SMALL)[0], dropped="hopeless").feasible(Bounds())


def test_the_front_is_what_nothing_beats():
    gen = torch.Generator().manual_seed(1)
    every = [outcome(p, left=torch.rand(1, generator=gen).item(), prose=1 + torch.rand(1, generator=gen).item())
             for p in points(Space())]  # fmt: skip
    front = {label_of(o.point) for o in tuner.Tuning(every, Bounds()).front()}
    beaten = lambda a: any(b.left <= a.left and b.damage <= a.damage and b is not a for b in every)  # noqa: E731
    assert front == {label_of(o.point) for o in every if not beaten(o)} and 2 <= len(front) < 30


def test_the_best_stores_least_of_equals():
    a, b, c = points(SMALL)[:3]
    found = tuner.Tuning(
        [outcome(a, density=0.2), outcome(b, density=0.1), outcome(c, left=0.5, density=0.01)], Bounds()
    )
    assert found.best.point == b
    assert tuner.Tuning([outcome(a, prose=2.0)], Bounds()).best is None


def state(model):
    return {n: (id(m), type(m)) for n, m in model.named_modules()}, {n: p.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("point", [points(SMALL)[0], points(SMALL)[-1]], ids=["size", "surgery"])
def test_a_trial_is_what_evaluate_says_and_leaves_no_trace(what, control, point):
    before = state(what.model)
    found = try_policy(what, point, drop=False)
    after = state(what.model)
    assert before[0] == after[0] and all(torch.equal(before[1][n], p) for n, p in after[1].items())
    if point["noise"] == "counter_memory":
        lo.decompose(
            what.model, TOK, tuner.config_of(point), SECRETS, RETAIN, RETAIN, progress=False, round_density=2e-3
        )
    else:
        lo.patch(what.model, tuner.config_of(point))
    want = lo.evaluate(what.model, TOK, SECRETS, RETAIN, TEXTS, control)
    on, off = want.alphas[1.0], want.alphas[0.0]
    assert found.extracted == off.extracted and found.recited == on.extracted and found.density == want.density
    assert found.retain == pytest.approx(off.retain_ppl / on.retain_ppl, rel=1e-6)
    assert found.prose == pytest.approx(off.prose_ppl / on.prose_ppl, rel=1e-6)
    assert found.utility == pytest.approx(on.prose_ppl / want.reference.prose_ppl, rel=1e-6)
    assert found.verdict.startswith(want.verdict.outcome)
    beyond = [
        max(0, off.secrets[n].exact_memorisation - c) / (1 - c)
        for n, c in ((n, control.secrets[n].exact_memorisation) for n in SECRETS)
    ]
    assert found.left == pytest.approx(sum(beyond) / len(beyond) + off.extracted)


def test_the_proxies_drop_what_is_hopeless_and_nothing_else(what):
    keeps = try_policy(what, points(SMALL)[0])  # max + none
    assert keeps.dropped.startswith("the memory stays") and math.isnan(keeps.extracted) and keeps.remains > 1.9
    what.bounds = Bounds(utility=1e-6, hopeless=1.0)
    broken = try_policy(what, points(SMALL)[0])
    assert "on one text" in broken.dropped and math.isnan(broken.left) and broken.excess(what.bounds)["recited"] <= 0
    what.bounds = LOOSE
    assert not try_policy(what, points(SMALL)[-1]).dropped


def test_a_trial_that_fails_puts_the_model_back(what, monkeypatch):
    before = state(what.model)
    monkeypatch.setattr(tuner, "_measure", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        try_policy(what, points(SMALL)[0], drop=False)
    assert state(what.model)[0] == before[0]


def test_a_task_needs_a_memory_and_a_control(learned, control):
    with pytest.raises(ValueError, match="recites 0% of the secrets"):
        task(learned_llama(steps=0), TOK, SECRETS, control, RETAIN, TEXTS)
    with pytest.raises(ValueError, match="control has no measure of 'other'"):
        task(copy.deepcopy(learned), TOK, {"other": "one two three"}, control, RETAIN, TEXTS)
    patched = copy.deepcopy(learned)
    lo.patch(patched, lo.OrthoConfig(group_size=16))
    with pytest.raises(ValueError, match="patched already"):
        task(patched, TOK, SECRETS, control, RETAIN, TEXTS)


def table(point):
    "Outcomes that depend on the point alone."
    gen = torch.Generator().manual_seed(sum(map(ord, label_of(point))))
    left, prose = torch.rand(2, generator=gen).tolist()
    return outcome(point, left=left, prose=1 + 0.2 * prose, density=point.get("density", 1e-4))


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_proposes_the_same(sampler):
    runs = [search(table, Space(), Bounds(), 15, sampler, seed=s, progress=False) for s in (3, 3, 4)]
    assert runs[0].outcomes == runs[1].outcomes != runs[2].outcomes


def test_a_point_that_comes_again_is_not_tried_again():
    tried = []
    few = Space(noise=("none",), targets=("mlp",), scale=("max", "mse"), density=(0.1,))
    found = search(lambda p: tried.append(label_of(p)) or table(p), few, Bounds(), 12, progress=False)
    assert len(found.outcomes) == 12 and len(tried) == len(set(tried)) == 2


def test_an_interrupt_loses_no_finished_trial(tmp_path):
    whole = search(table, Space(), Bounds(), 10, seed=2, progress=False)
    count = []

    def until(point):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return table(point)

    with pytest.raises(KeyboardInterrupt):
        search(until, Space(), Bounds(), 10, storage=tmp_path / "s.sqlite", seed=2, progress=False)
    again = search(until, Space(), Bounds(), 10, storage=tmp_path / "s.sqlite", seed=2, progress=False)
    assert again.outcomes == whole.outcomes and len(count) <= 11


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from test_tuner import table
from libortho.tuner import Bounds, Space, search
count = []
def until(point):
    count.append(1)
    if len(count) == 4: os.kill(os.getpid(), signal.SIGKILL)
    return table(point)
search(until, Space(), Bounds(), 10, storage=sys.argv[1], seed=2, progress=False)
"""


def test_a_search_that_was_killed_goes_on(tmp_path):
    script = KILLED.format(paths=[str(Path(__file__).parent), *sys.path])
    code = subprocess.run([sys.executable, "-c", script, str(tmp_path / "s.sqlite")], timeout=120).returncode
    assert code == -signal.SIGKILL
    tried = []
    again = search(lambda p: tried.append(1) or table(p), Space(), Bounds(), 10, storage=tmp_path / "s.sqlite", seed=2,
                   progress=False)  # fmt: skip
    whole = search(table, Space(), Bounds(), 10, seed=2, progress=False)
    assert again.outcomes == whole.outcomes and 1 <= len(tried) <= 7
    (name,) = optuna.get_all_study_names(f"sqlite:///{tmp_path}/s.sqlite")
    states = [t.state.name for t in optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/s.sqlite").trials]
    assert states.count("FAIL") == 1 and "RUNNING" not in states


def test_the_search_looks_where_it_is_good():
    "On a table where one family is good, more of the trials go there than by chance, over several seeds."

    def one_good(point):
        good = point["noise"] == "counter_memory"
        return outcome(point, left=0.1 if good else 1.8, prose=1.0 if good else 4.0)

    share = {}
    for sampler in ("tpe", "random"):
        runs = [search(one_good, Space(), Bounds(), 25, sampler, seed=s, progress=False) for s in range(4)]
        share[sampler] = sum(o.left < 1 for r in runs for o in r.outcomes) / 100
    assert share["tpe"] > 2 * share["random"] and 0.05 < share["random"] < 0.35


def test_arguments_of_a_search():
    for kw, said in (
        ({"trials": 0}, "trials must be at least 1"),
        ({"sampler": "grid"}, "sampler must be one of tpe, random"),
    ):
        with pytest.raises(ValueError, match=said):
            search(table, SMALL, Bounds(), **kw)


def test_tuning_a_model(learned, control, tmp_path):
    "The surgery is found, the model is as it was, and a second call with the folder tries nothing."
    model = copy.deepcopy(learned)
    before, seen = state(model), []

    def run():
        options = {"calibration": RETAIN, "trials": 14, "folder": tmp_path, "on_trial": seen.append, "progress": False}
        return tune(model, TOK, SECRETS, control, RETAIN, TEXTS, SMALL, LOOSE, **options)

    found = run()
    assert found.best.point["noise"] == "counter_memory" and found.best.extracted == 0 and found.best.left < 0.2
    assert state(model)[0] == before[0] and len(seen) == 14
    assert "trials" in str(found) and "<table>" in found._repr_html_()
    began = time.perf_counter()
    assert run().outcomes == found.outcomes and len(seen) == 14 and time.perf_counter() - began < 20


def test_groups_are_locked_one_after_the_other(what):
    said = []
    sizes = Space(noise=("none", "tri_state"), scale=("max", "mse"), density=(0.05,))
    found = tune_groups(
        what, {"attention": "self_attn", "mlp": ("mlp",)}, sizes, 4, on_locked=said.append, progress=False
    )
    assert said == found.lines() and [s.split(":")[1].strip() for s in said] == ["attention", "mlp"]
    assert all(s.startswith("LOCKED: ") for s in said)
    assert not any(isinstance(m, OrthoLinear) for m in what.model.modules())
    shared = {
        "a": lo.OrthoConfig(targets="mlp", group_size=16),
        "b": lo.OrthoConfig(targets="down_proj", group_size=16),
    }
    with pytest.raises(ValueError, match="is in the groups 'a' and 'b'"):
        tuner.patch_groups(what.model, shared)
    with pytest.raises(ValueError, match="counter_memory"):
        tune_groups(what, {"a": "mlp"}, Space())
    with pytest.raises(ValueError, match="no policy of group 'mlp' is within the bounds"):
        what.bounds = Bounds(utility=1e-3, hopeless=1e9)
        tune_groups(what, {"mlp": "mlp"}, sizes, 2, progress=False)


def test_a_group_alone_is_the_policy_alone(what):
    point = points(SMALL)[0]
    configs = {"x": tuner.config_of(point)}
    alone = tuner._tried(what, point, lambda: tuner.patch_groups(what.model, configs), tuner._hopeless_group)
    same = try_policy(what, point, drop=False)
    for key in ("left", "extracted", "recited", "retain", "prose", "utility", "density", "verdict"):
        assert getattr(alone, key) == getattr(same, key)


def test_two_searches_do_not_share_a_storage_at_once(tmp_path):
    def nested(point):
        search(table, Space(), Bounds(), 3, storage=tmp_path / "s.sqlite", progress=False)

    with pytest.raises(ValueError, match="storage .* is in use by another search"):
        search(nested, Space(), Bounds(), 3, storage=tmp_path / "s.sqlite", progress=False)


def test_points_that_look_alike_are_apart():
    near = Space(noise=("none",), targets=("mlp",), scale=("max",), density=(0.3333333, 0.3333334))
    assert len(points(near)) == 2


def test_tasks_that_stop_elsewhere_are_apart(what, learned):
    keys = {what.key()}
    for model in (learned, learned_llama(steps=0)):
        what.levels = lo.control_scores(model, TOK, SECRETS)
        keys.add(what.key())
    assert len(keys) == 3
