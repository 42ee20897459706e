"""TunerLab by its controls: trials come in from a search and from a file, one is loaded, a stop keeps what is done."""

import copy
import sqlite3
import threading
import time
from dataclasses import replace

import pytest
import torch
from models import RETAIN, SECRETS, TEXTS, TOK, ended, learned_llama, same_weights, state

import libortho as lo
from libortho import tunerlab
from libortho.gap import turn
from libortho.linear import OrthoLinear
from libortho.tuner import Bounds, Outcome, Space, config_of, label_of, points, search, tune
from libortho.tunerlab import load_policy, read_study, tuner_lab

LOOSE = Bounds(retain=3.0, prose=3.0, utility=3.0)
SPACE = Space(
    noise=("none", "tri_state", "counter_memory"),
    targets=("down_proj", "all-linear"),
    scale=("max",),
    density=(0.05,),
    projection=("nearest",),
    budget=(0.2,),
    round_density=(2e-3,),
)


def opened(model, control, **options):
    options = {"space": SPACE, "constraints": LOOSE, "trials": 4, "calibration": RETAIN} | options
    return tuner_lab(model, TOK, SECRETS, control, RETAIN, TEXTS, **options)


def made_up(point, **kw):
    cost = {"none": 1.0, "tri_state": 1.5, "counter_memory": 1.01}[point["noise"]]
    left = {"none": 0.9, "tri_state": 0.2, "counter_memory": 0.0}[point["noise"]]
    verdict = "SUCCESS: forgotten" if left < 0.1 else "INCONCLUSIVE: x"
    figures = dict(
        left=left, extracted=0.0, recited=1.0, retain=cost, prose=cost, utility=1.0, density=0.1, verdict=verdict
    )
    return Outcome(point, **{**figures, **kw})


@pytest.fixture
def stored(tmp_path):
    file = tmp_path / "tuner.sqlite"
    return file, search(made_up, SPACE, LOOSE, trials=6, storage=file, name="first", progress=False)


def has(lab, n, seconds=30):
    until = time.monotonic() + seconds
    while len(lab.tuning.outcomes) < n and time.monotonic() < until:
        time.sleep(0.02)
    assert len(lab.tuning.outcomes) >= n, lab.error or lab.status.value


def test_a_study_is_read_as_it_was_made(stored):
    file, made = stored
    name, outcomes = read_study(file)
    assert name.startswith("first ") and outcomes == made.outcomes


def test_the_study_at_work_last_is_read_or_the_one_named(stored):
    file, made = stored
    dropped = search(
        lambda p: made_up(p, dropped="hopeless"), SPACE, LOOSE, trials=2, storage=file, name="b", progress=False
    )
    name, outcomes = read_study(file)
    assert name.startswith("b ") and outcomes == dropped.outcomes and outcomes[0].dropped
    first = next(n for n in tunerlab_names(file) if n.startswith("first"))
    assert read_study(file, first) == (first, made.outcomes)
    search(made_up, SPACE, LOOSE, trials=7, storage=file, name="first", progress=False)
    assert read_study(file)[0] == first and len(read_study(file)[1]) == 7


def tunerlab_names(file):
    with sqlite3.connect(file) as db:
        return [n for (n,) in db.execute("select study_name from studies")]


def test_files_that_cannot_be_read(stored, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.sqlite' is not there"):
        read_study(tmp_path / "nowhere.sqlite")
    assert not (tmp_path / "nowhere.sqlite").exists()
    (tmp_path / "text").write_text("a text")
    with pytest.raises(ValueError, match="no SQLite file"):
        read_study(tmp_path / "text")
    with pytest.raises(ValueError, match="study 'other' is not in .*first"):
        read_study(stored[0], "other")


def test_reading_writes_nothing(stored):
    before = stored[0].read_bytes()
    read_study(stored[0])
    assert stored[0].read_bytes() == before


def test_a_search_comes_in_trial_by_trial(learned, control):
    model = copy.deepcopy(learned)
    before, seen = state(model), []
    lab = opened(model, control)
    lab.table.observe(lambda change: seen.append(len(lab.tuning.outcomes)), "value")
    assert lab.table.value.count("<tr>") == 0 and lab.load_button.disabled
    lab.run.click()
    assert ended(lab, 120) and not lab.error
    assert sorted({*seen} - {0}) == [1, 2, 3, 4] and len(lab.pick.options) == 4
    assert lab.table.value.count("<tr>") == 1 + 4 and lab.storage.is_file()
    assert read_study(lab.storage)[1] == lab.tuning.outcomes
    assert same_weights(model, before)
    assert not any(isinstance(m, OrthoLinear) for m in model.modules())


def test_stop_keeps_what_is_finished_and_the_search_goes_on(learned, control, tmp_path, monkeypatch):
    lab = opened(copy.deepcopy(learned), control, folder=tmp_path, trials=12)
    begun, go_on, tried = threading.Event(), threading.Event(), []

    def slow(what, point, drop):
        tried.append(point)
        if len(tried) == 2:
            begun.set()
            assert go_on.wait(30)
        return made_up(point)

    monkeypatch.setattr(tunerlab, "try_policy", slow)
    job = lab.search()
    assert begun.wait(60) and not lab.attempt(lab.search) and "stop it first" in lab.error
    lab.stop_button.click()
    assert "stopping after the trial" in lab.status.value
    go_on.set()
    assert job.join(30) and "stopped; what is finished is kept" in lab.status.value and not lab.error
    n = len(lab.tuning.outcomes)  # a point that came again is not tried again
    assert read_study(tmp_path / "tuner.sqlite")[1] == lab.tuning.outcomes and 2 <= n < 12 and len(tried) == 2
    again = opened(copy.deepcopy(learned), control, folder=tmp_path, trials=12)
    again._repr_mimebundle_()
    assert ended(again) and not again.error
    assert again.tuning.outcomes == lab.tuning.outcomes and len(tried) == 2  # shown, not begun
    again.run.click()
    assert ended(again) and not again.error
    assert again.tuning.outcomes[:n] == lab.tuning.outcomes and len(again.tuning.outcomes) == 12


def test_only_the_trials_of_this_very_search_are_shown(learned, control, tmp_path):
    about = {"space": SPACE, "constraints": LOOSE, "calibration": RETAIN, "folder": tmp_path}
    made = tune(copy.deepcopy(learned), TOK, SECRETS, control, RETAIN, TEXTS, trials=2, progress=False, **about)
    other = copy.deepcopy(learned)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.01)

    def shown(model, **options):
        lab = opened(model, control, folder=tmp_path, **options)
        lab._repr_mimebundle_()
        assert ended(lab) and not lab.error
        return lab

    same = shown(copy.deepcopy(learned))
    assert same.tuning.outcomes == made.outcomes and not same.load_button.disabled
    for lab in (shown(other), shown(copy.deepcopy(learned), constraints=replace(LOOSE, retain=2.0))):
        assert not lab.tuning.outcomes and lab.load_button.disabled and lab.table.value.count("<tr>") == 0
        assert "No trial of this search yet" in lab.table.value and str(tmp_path) in lab.table.value
    search(made_up, SPACE, LOOSE, trials=3, storage=tmp_path / "tuner.sqlite", name="later", progress=False)
    again = shown(copy.deepcopy(learned), trials=3)
    assert again.tuning.outcomes == made.outcomes
    again.run.click()
    assert ended(again) and again.tuning.outcomes[:2] == made.outcomes and len(again.tuning.outcomes) == 3


def test_a_search_need_not_wait_to_be_told_what_is_there(learned, control, tmp_path, monkeypatch):
    search(made_up, SPACE, LOOSE, trials=2, storage=tmp_path / "tuner.sqlite", name="other", progress=False)
    monkeypatch.setattr(tunerlab, "try_policy", lambda what, point, drop: made_up(point))
    lab = opened(copy.deepcopy(learned), control, folder=tmp_path)
    with turn(lab.setup.model):
        lab._repr_mimebundle_()
        look, search_job = lab.job, lab.search()
        assert look.join(30) and not search_job.join(0.3) and "waiting for other work" in lab.status.value
    assert search_job.join(60) and not lab.error and len(lab.tuning.outcomes) == 4


@pytest.mark.parametrize("close", [False, True])
def test_a_search_and_a_load_wait_for_their_turn(learned, control, close):
    lab = opened(copy.deepcopy(learned), control)
    lab.show([made_up(points(SPACE)[0])])
    for begin in (lab.search, lab.load):
        with turn(lab.setup.model):
            job = begin()
            assert not job.join(0.3) and "waiting for other work on this model" in lab.status.value
            assert not any(isinstance(m, OrthoLinear) for m in lab.setup.model.modules())
            lab.close() if close else lab.stop_button.click()
            assert job.join(10) and not lab.error
    assert lab.loaded is None


def test_a_file_is_watched_while_it_grows(stored):
    file, made = stored
    lab = tuner_lab(storage=file, constraints=LOOSE, trials=8)
    lab._repr_mimebundle_()
    has(lab, 6)
    lab.pick.value = 2
    search(made_up, SPACE, LOOSE, trials=8, storage=file, name="first", progress=False)
    has(lab, 8)
    assert lab.pick.value == 2 and lab.tuning.outcomes[:6] == made.outcomes
    job = lab.job
    lab.stop_button.click()
    assert job.join(10) and not lab.error


def test_the_best_is_picked_and_another_can_be(stored):
    lab = tuner_lab(storage=stored[0], constraints=LOOSE)
    lab.show(stored[1].outcomes)
    best = lab.tuning.best
    assert lab.tuning.outcomes[lab.pick.value].point == best.point and label_of(best.point) in lab.chosen.value
    named = {t.name: t for t in lab.figure.data}
    other = next(i for i, o in enumerate(lab.tuning.outcomes) if o.point != best.point)
    lab.pick.value = other
    assert list(named["chosen"].customdata) == [other] and named["chosen"].x[0] == lab.tuning.outcomes[other].left
    assert len(named["success"].x) == sum(o.verdict.startswith("SUCCESS") for o in lab.tuning.outcomes)


def test_a_click_picks(stored):
    lab = tuner_lab(storage=stored[0], constraints=LOOSE)
    lab.show(stored[1].outcomes)
    trace = next(t for t in lab.figure.data if t.name == "tri_state")
    lab._clicked(trace, type("Points", (), {"point_inds": [0]}), None)
    assert lab.pick.value == trace.customdata[0]
    lab._clicked(trace, type("Points", (), {"point_inds": []}), None)
    assert lab.pick.value == trace.customdata[0] and not lab.error


@pytest.mark.parametrize("noise", ["tri_state", "counter_memory"])
def test_a_policy_is_loaded(learned, control, noise, monkeypatch):
    model = copy.deepcopy(learned)
    lab = opened(model, control)
    point = next(p for p in points(SPACE) if p["noise"] == noise and p["targets"] == "all-linear")
    lab.show([made_up(point)])
    lo.patch(model, lo.OrthoConfig(group_size="row"))  # an earlier split is undone
    lab.load_button.click()
    assert ended(lab) and not lab.error
    assert lab.loaded.point == point and model.ortho_config == config_of(point) and "Loaded:" in lab.said.value
    same = copy.deepcopy(learned)
    load_policy(same, TOK, point, SECRETS, calibration=RETAIN)
    assert lo.linear.fingerprint(model) == lo.linear.fingerprint(same)
    assert all(c.alpha == 1 for c in lo.compartments(model).values())


class Enough(Exception):
    pass


@pytest.mark.parametrize("noise", ["tri_state", "counter_memory"])
def test_what_the_callback_raises_leaves_the_model_plain(learned, noise):
    model, told = copy.deepcopy(learned), []
    lo.patch(model, lo.OrthoConfig(group_size="row"))
    point = next(p for p in points(SPACE) if p["noise"] == noise)

    def stop():
        told.append(1)
        raise Enough

    with pytest.raises(Enough):
        load_policy(model, TOK, point, SECRETS, calibration=RETAIN, callback=stop)
    assert told == [1] and not hasattr(model, "ortho_config")
    assert not any(isinstance(m, OrthoLinear) for m in model.modules())
    assert same_weights(model, learned.state_dict())


def test_loading_stops_after_a_round(learned, control, monkeypatch):
    lab = opened(copy.deepcopy(learned), control)
    lab.show([made_up(next(p for p in points(SPACE) if p["noise"] == "counter_memory"))])
    reached, go_on, rounds, decompose = threading.Event(), threading.Event(), [], tunerlab.decompose

    def held(*args, callback=None, **options):
        def after(found):
            rounds.append(found)
            reached.set()
            assert go_on.wait(30)
            callback(found)

        return decompose(*args, callback=after, **options)

    monkeypatch.setattr(tunerlab, "decompose", held)
    job = lab.load()
    assert reached.wait(30) and not lab.attempt(lab.search) and "stop it first" in lab.error
    lab.stop_button.click()
    assert "after the round at work" in lab.status.value and "trial" not in lab.status.value
    go_on.set()
    assert job.join(30) and not lab.error and len(rounds) == 1 and lab.loaded is None
    assert "the model is plain" in lab.said.value
    model = lab.setup.model
    assert not any(isinstance(m, OrthoLinear) for m in model.modules())
    assert same_weights(model, learned.state_dict())


def test_a_control_model_is_measured_and_sets_the_level(learned):
    lab = opened(copy.deepcopy(learned), learned_llama(steps=0), trials=1)
    assert lab.search().join(60) and not lab.error
    assert set(lab.setup.levels) == set(SECRETS) and lab.setup.control.extracted == 0


def test_errors_are_sentences(learned, control, stored):
    lab = opened(learned_llama(steps=0), control)
    assert lab.search().join(60) and lab.error.startswith("model recites 0% of the secrets")
    assert not lab.attempt(lab.load) and lab.error.startswith("no trial is picked")
    watched = tuner_lab(storage=stored[0])
    assert watched.load_button.disabled and not watched.attempt(watched.load) and "no model" in watched.error
    stored[0].unlink()
    assert watched.search().join(10) and "is not there" in watched.error


def test_a_failed_load_is_told(learned, control):
    lab = opened(copy.deepcopy(learned), control)
    point = replace(made_up(points(SPACE)[0]), point={**points(SPACE)[0], "targets": "nowhere"})
    lab.show([point])
    assert lab.load().join(30) and "matches no linear layer" in lab.error and lab.loaded is None


@pytest.mark.parametrize(
    "options, said",
    [
        ({"trials": 0}, "trials must be at least 1"),
        ({"sampler": "best"}, "sampler must be tpe or random"),
        ({"control": None}, "control must be the never-memorised model"),
        ({"forget": None}, "forget is missing"),
        ({"model": None}, "model is missing"),
        ({"storage": "a", "folder": "b"}, "pass one of them"),
    ],
)
def test_arguments_that_cannot_work(learned, control, options, said):
    with pytest.raises(ValueError, match=said):
        tuner_lab(**{"model": learned, "tok": TOK, "forget": SECRETS, "control": control} | options)
