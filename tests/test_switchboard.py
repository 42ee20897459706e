import json
from dataclasses import asdict

import pytest
import torch
from models import CFG, MORE, SECRETS, TOK

import libortho as lo
from libortho import switchboard
from libortho.evaluate import Measures
from libortho.memory import SecretScore
from libortho.plots import plot_leaks, plot_policies, plot_where
from libortho.switchboard import LeakRow, Trial, criteria, leak_matrix, run_trials, successes, summary


def score(known, ppl=None):
    "A secret that is known word for word, or is not."
    return SecretScore(ppl or (1.0 if known else 200.0), 1.0 if known else 0.1, float(known), 0.0, known, "")


def measures(known, retain=20.0, prose=15.0):
    return Measures({n: score(k) for n, k in known.items()}, retain, prose, None)


def good_trial(seed=0):
    "A trial in which everything went well."
    names = {f"a-{seed}": True, f"b-{seed}": True}
    off = lambda *gone: {n: n not in gone for n in names}  # noqa: E731
    a, b = names
    states = {"on": measures(off()), a: measures(off(a)), b: measures(off(b)), "off": measures(off(a, b))}
    leaks = [LeakRow(gone, {n: score(k) for n, k in off(*gone).items()}) for gone in ((), (a,), (b,), (a, b))]
    report = {
        "config": asdict(lo.SURGERY),
        "weights": 1000,
        "repaired": 0,
        "layers": {"l.0.up_proj": {"weights": 1000, "stored": 2}},
        "seconds": {"base": 20.0},
        "compartments": {n: {"seconds": 9.0, "moved": {"l.0.up_proj": 1}} for n in names},
    }
    never = measures(off(a, b))
    return Trial(
        seed,
        {n: {"prompt": "p", "secret": "s"} for n in names},
        never,
        measures(off()),
        states,
        leaks,
        {"1": states["on"], "0.5": measures(off()), "0": states["off"]},
        report,
        25,
        dict.fromkeys(names, 5e-5),
    )


def test_a_good_trial_meets_every_criterion():
    trials = [good_trial(0), good_trial(1)]
    assert all(c.holds for c in criteria(trials)), [c.row() for c in criteria(trials) if not c.holds]
    assert successes(trials) == {n: [] for t in trials for n in t.secrets}
    assert "4 of 4 secrets succeed" in summary(trials)


@pytest.mark.parametrize(
    "spoil, what, in_success",
    [
        (lambda t: t.states.update(on=measures({"a-0": False, "b-0": True})), "α=1 extracted", True),
        (lambda t: t.states.update({"a-0": measures({"a-0": True, "b-0": True})}), "one off: it is extracted", True),
        (lambda t: t.states.update({"a-0": measures({"a-0": False, "b-0": False})}), "one off: lowest", True),
        (lambda t: t.states.update({"a-0": measures({"a-0": False, "b-0": True}, 21)}), "one off: facts", True),
        (lambda t: t.states.update({"a-0": measures({"a-0": False, "b-0": True}, 20, 15.3)}), "one off: prose", True),
        (lambda t: t.densities.update({"a-0": 2e-4}), "density", True),
        (lambda t: t.surgery["compartments"]["a-0"].update(seconds=61.0), "seconds for a compartment", False),
        (lambda t: t.surgery["seconds"].update(base=61.0), "seconds to put", False),
        (lambda t: t.states.update(off=measures({"a-0": False, "b-0": False}, 22)), "all off: facts", False),
        (
            lambda t: t.sweep.update({"0.5": measures({"a-0": False, "b-0": True}), "0": t.states["on"]}),
            "largest fall",
            True,
        ),
        (lambda t: t.states["a-0"].secrets.update({"a-0": score(False, 5000.0)}), "one off: secret perplexity", True),
        (lambda t: t.states["a-0"].secrets.update({"a-0": score(False, 2.0)}), "one off: secret perplexity", True),
        (lambda t: t.leaks[3].scores.update({"a-0": score(True)}), "leaks: secrets extracted while off", False),
        (lambda t: t.leaks[2].scores.update({"a-0": score(False)}), "leaks: secrets lost while on", False),
        (lambda t: setattr(t, "reference", measures({"a-0": True, "b-0": True}, 20, 13.0)), "α=1 prose", False),
        (
            lambda t: t.states["a-0"].secrets["a-0"].__dict__.update(exact_memorisation=0.2),
            "one off: exact memorisation above",
            True,
        ),
    ],
)
def test_what_goes_wrong_is_seen(spoil, what, in_success):
    trial = good_trial()
    spoil(trial)
    failed = [c.what for c in criteria([trial]) if not c.holds]
    assert any(f.startswith(what) for f in failed), failed
    assert any(successes([trial]).values()) == in_success


def test_trials_round_trip_and_are_taken_up(tmp_path, monkeypatch):
    assert Trial.from_json(good_trial(3).to_json()) == good_trial(3)
    done = []
    monkeypatch.setattr(switchboard, "run_trial", lambda seed, **k: done.append(seed) or good_trial(seed))
    first = run_trials((0, 1), tmp_path)
    assert run_trials((0, 1, 2), tmp_path)[:2] == first and done == [0, 1, 2]
    assert sorted(json.loads(p.read_text())["seed"] for p in tmp_path.glob("trial-*.json")) == [0, 1, 2]
    run_trials((0,), tmp_path, at_control=False)
    assert done == [0, 1, 2, 0], "a trial with other options was read back"


def test_leak_matrix_of_a_small_model(model):
    lo.decompose(model, TOK, CFG, SECRETS, **MORE)
    lo.set_alpha(model, {"door": 0.3})
    rows = leak_matrix(model, TOK, SECRETS, progress=False)
    assert [r.off for r in rows] == [(), ("key",), ("door",), ("key", "door")]
    assert all(s.extracted == (n not in r.off) for r in rows for n, s in r.scores.items() if len(r.off) < 2)
    assert lo.compartments(model)["door"].alpha == 0.3  # the switches are where they were
    with pytest.raises(ValueError, match="no compartment 'attic'; it has key, door"):
        leak_matrix(model, TOK, {"attic": "a b"})


def test_figures_of_a_trial():
    trial = good_trial()
    row = trial.result()
    assert plot_leaks(trial.leaks).axes and plot_policies([row, row]).axes
    moved = {n: c["moved"] for n, c in trial.surgery["compartments"].items()}
    assert len([a for a in plot_where(moved, ["l.0.up_proj", "l.1.up_proj"]).axes if a.get_title()]) == 2
    assert row.verdict.valid and row.verdict.outcome == "SUCCESS" and row.density == 0.002


def test_drawn_canaries_differ():
    drawn = [i for seed in range(25) for i in lo.draw_canaries(4, seed).values()]
    assert len({i["prompt"] + i["secret"] for i in drawn}) == 100
    assert lo.draw_canaries(6, 3) == lo.draw_canaries(6, 3) and len(lo.draw_canaries(6, 3)) == 6
    assert all("{" not in i["prompt"] + i["secret"] for i in drawn) and torch.initial_seed() is not None
