"""AlphaLab: what it computes, and what it does when somebody moves a slider."""

import threading

import pytest
from models import RETAIN, SECRETS, TOK, learned_llama, plain

import libortho as lo
from libortho.alphalab import (
    AlphaLab,
    alpha_lab,
    alpha_subject,
    coarse_first,
    point_at,
    say_at,
    secret_only,
    sweep,
)
from libortho.dashboard import Figure, model_lock
from libortho.linear import fingerprint, ortho_layers
from libortho.memory import say
from libortho.tokens import Point, TokenRow, alpha_figure

pytestmark = pytest.mark.filterwarnings("ignore:.*NOT gone")  # the models are too small for that
QUICK = {"repair": 1e-3, "round_density": 2e-4, "progress": False}


@pytest.fixture(scope="module")
def split():
    "A tiny model with two secrets on two switches, and one that never saw them."
    model, control = learned_llama(), learned_llama(steps=0)
    cfg = lo.OrthoConfig(projection="nearest", sieve="contrast", noise="counter_memory", density=2e-2, group_size=16)
    texts = RETAIN * 2
    lo.decompose(model, TOK, cfg, SECRETS, retain=texts, calibration=texts, **QUICK)
    return model, control


@pytest.fixture
def lab(split):
    model, control = split
    lo.set_alpha(model, 1.0)
    lab = alpha_lab(model, TOK, ["hello"], SECRETS, RETAIN, control, grid=(0.5,), n=4)
    yield lab
    finish(lab)


def finish(lab):
    "Wait for everything the lab does."
    while (job := lab.job) is not None:
        assert job.join(30)
    assert lab.live.join(30)


def alphas(model):
    return {n: c.alpha for n, c in lo.compartments(model).items() if n != "repair"}


def test_coarse_first_has_every_point_once():
    for n in range(1, 30):
        xs = [i / n for i in range(n)]
        got = coarse_first(xs)
        assert sorted(got) == xs and got[0] == xs[-1] and (n < 2 or got[1] == xs[0])
    assert coarse_first([0, 1, 2, 3, 4]) == [4, 0, 2, 1, 3] and coarse_first([]) == []


def test_a_point_is_what_measure_gives_and_nothing_moves(split):
    model, _ = split
    lo.set_alpha(model, {"key": 0.3, "door": 1.0})
    subject = alpha_subject(model, TOK, forget=SECRETS, retain=RETAIN)
    got = point_at(model, TOK, {"key": 0.0}, subject.secrets, subject.retain, batch=1)
    assert alphas(model) == {"key": 0.3, "door": 1.0}
    with lo.alpha(model, {"key": 0.0}):
        want = Point.of(lo.measure(model, TOK, SECRETS, RETAIN, RETAIN))
    assert got.secret_ppl == pytest.approx(want.secret_ppl, rel=1e-4) and got.memorisation == want.memorisation
    assert got.retain_ppl == pytest.approx(want.retain_ppl, rel=1e-4)


def test_the_lock_is_held_for_a_batch_not_for_a_point(split):
    model, _ = split
    subject, free = alpha_subject(model, TOK, forget=SECRETS, retain=RETAIN), []

    def quiet():
        def try_it():
            free.append(model_lock(model).acquire(timeout=1))
            model_lock(model).release()

        other = threading.Thread(target=try_it)
        other.start()
        other.join()

    point_at(model, TOK, None, subject.secrets, subject.retain, quiet, batch=2)
    assert free == [True] * 3  # five texts, two at a time


def test_a_sweep_leaves_out_what_is_known(split):
    subject = alpha_subject(split[0], TOK, forget=SECRETS, retain=RETAIN, grid=[0.5])
    assert [a for a, _ in sweep(subject, known={1.0})] == [0.0, 0.5]
    assert subject.position("key", 0.2) == {"key": 0.2, "door": 1.0}
    assert subject.position("", 0.2) == {"key": 0.2, "door": 0.2}
    assert subject.moved("key") == ["key"] and subject.moved("") == ["key", "door"]


def test_say_at_leaves_the_switches_and_knows_the_secret(split):
    model, _ = split
    subject = alpha_subject(model, TOK, forget=SECRETS, retain=RETAIN)
    says, secret, recited = say_at(subject, {"key": 1.0, "door": 1.0}, "the key is", 8)
    assert recited and says.text.startswith(" abc") and secret.text == " abc" and min(secret.p) > 0.5
    says, secret, recited = say_at(subject, {"key": 0.0}, "the key is ", 8)
    assert recited is False and alphas(model) == {"key": 0.0, "door": 1.0}
    assert says.text == say(model, TOK, "the key is", 8)
    assert say_at(subject, {"key": 1.0}, "hello", 2)[1:] == (None, None)
    assert secret_only(TokenRow("", ["a", "b"], [float("nan"), 0.5])).pieces == ["b"]


def test_bad_arguments_are_told_before_anything_moves(split):
    model, control = split
    before = fingerprint(model)
    bad = {
        "needs a prompt and a secret": {"forget": {"key": {"prompt": "x", "secret": " "}}},
        "retain holds no text": {"forget": SECRETS, "retain": []},
        "the prompt is empty": {"prompts": [""]},
        "control must be the never-memorised model or its measures, got str": {"control": "smollm2"},
        "no measure of 'key'": {"forget": SECRETS, "control": Point({}, {}, 1.0)},
        "no measure of 'door'": {
            "forget": SECRETS,
            "control": lo.measure(control, TOK, {"key": SECRETS["key"]}, RETAIN),
        },
        "grid must be": {"grid": [1.5]},
    }
    for message, kwargs in bad.items():
        with pytest.raises(ValueError, match=message):
            alpha_lab(model, TOK, **kwargs)
    with pytest.raises(ValueError, match="call patch"):
        alpha_lab(control, TOK)
    assert fingerprint(model) == before


def test_a_slider_changes_the_text_and_the_switch(lab, split):
    model, _ = split
    lab.begin()
    finish(lab)
    assert "recited word for word" in lab.text.value and not lab.error
    lab.controls.sliders["key"].value = 0.0
    finish(lab)
    assert "not recited" in lab.text.value and alphas(model) == {"key": 0.0, "door": 1.0}
    assert lab.controls.master.value == 0.5  # the mean
    lab.controls.master.value = 1.0
    finish(lab)
    assert "recited word for word" in lab.text.value and alphas(model) == {"key": 1.0, "door": 1.0}
    assert {w.value for w in lab.controls.sliders.values()} == {1.0}


def test_many_wishes_end_where_the_sliders_are(lab, split):
    lab.begin()
    for a in (0.1, 0.9, 0.3, 0.7, 0.2):
        lab.controls.sliders["door"].value = a
    finish(lab)
    assert alphas(split[0]) == lab.alphas == {"key": 1.0, "door": 0.2} and not lab.error


def test_curves_with_the_control_and_a_line_that_follows(lab, split):
    lab.begin()
    finish(lab)
    assert sorted(lab.points[""]) == [0.0, 0.5, 1.0]
    want = alpha_figure(lab.points[""], lab.level, [1.0], None, "all switches")
    assert lab.figure.data[0].y == want.data[0].y and [t.name for t in lab.figure.data] == [t.name for t in want.data]
    assert any(t.name == "control" and t.y[0] for t in lab.figure.data)
    lab.controls.sliders["key"].value = 0.25
    finish(lab)
    assert [s.x0 for s in lab.figure.layout.shapes if s.name == "switch"] == [0.25, 1.0]
    lab.controls.moves.value = "key"
    finish(lab)
    assert sorted(lab.points["key"]) == [0.0, 0.5, 1.0]
    assert [s.x0 for s in lab.figure.layout.shapes if s.name == "switch"] == [0.25]
    assert lab.points["key"][0.0].recited(["door"])  # the other one stays on
    assert alphas(split[0]) == {"key": 0.25, "door": 1.0}
    points = lab.points[""][0.5]
    lab.controls.moves.value = ""
    finish(lab)
    assert lab.points[""][0.5] is points  # not computed again
    layer = next(iter(ortho_layers(split[0]).values()))
    was = layer.scales.clone()
    try:
        layer.scales.mul_(2)
        lab.controls.compute.click()
        finish(lab)
        assert lab.points[""][0.5].retain_ppl != points.retain_ppl  # of other weights
    finally:
        layer.scales.copy_(was)


def test_curves_stop_and_go_on(lab):
    one = threading.Event()
    draw = lab.draw
    lab.draw = lambda: (draw(), one.set() if lab.points.get("") else None)
    lab.begin()
    assert one.wait(30)
    lab.stop_button.click()
    finish(lab)
    assert "stopped" in lab.status.value and not lab.error and 1 <= len(lab.points[""]) < 3
    lab.controls.compute.click()
    finish(lab)
    assert len(lab.points[""]) == 3


def test_an_empty_prompt_is_a_sentence_that_goes(lab):
    lab.controls.prompt.value = " "
    finish(lab)
    assert lab.error == "the prompt is empty; type a few words for the model to continue"
    assert "role='alert'" in lab.status.value
    lab.controls.choice.value = "hello"
    finish(lab)
    assert not lab.error and lab.controls.prompt.value == "hello" and "hello …" in lab.text.value


def test_an_error_of_the_curves_is_told(lab, monkeypatch):
    def broken(*args):
        raise ValueError("layer 3 holds nan; split it again")

    monkeypatch.setattr("libortho.alphalab.point_from", broken)
    lab.sweep()
    finish(lab)
    assert lab.error == "layer 3 holds nan; split it again" and lab.progress.layout.display == "none"


def test_without_secrets_there_are_sliders_and_no_curves(split):
    lab = AlphaLab(split[0], TOK, ["hello"], n=3).begin()
    finish(lab)
    assert lab.figure not in lab.children[1].children[1].children and lab.controls.compute.layout.display == "none"
    assert "hello …" in lab.text.value and not lab.points and lab.job is None


def test_it_begins_when_it_is_shown_and_once(lab):
    assert not lab.begun and lab.job is None and not lab.points
    lab._repr_mimebundle_()
    job = lab.job
    assert lab.begun and job is not None
    lab._repr_mimebundle_()
    assert lab.job in (job, None)


def test_every_control_has_a_label_and_one_switch_needs_no_master(split):
    model = learned_llama(steps=0)
    lo.patch(model, lo.OrthoConfig(sieve="residual", density=0.05, group_size=16))
    controls = AlphaLab(model, TOK, ["hello"]).controls
    assert controls.master.layout.display == controls.moves.layout.display == "none"
    assert all(w.description for w in controls)


def test_one_figure_becomes_the_other():
    view = Figure()
    on = Point({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, 3.0)
    points = {1.0: on, 0.0: Point({"a": 9.0, "b": 8.0}, {"a": 0.0, "b": 0.0}, 3.1)}
    for fig in (alpha_figure({}), alpha_figure(points, points[0.0], [0.5]), alpha_figure(points, None, [])):
        view.become(fig)
        assert plain(view) == plain(fig)


def test_prompts_that_begin_alike_are_all_offered(split):
    model, _ = split
    long = ["a prompt that is long enough to be cut off, " + end for end in ("first", "second", "third")]
    offered = alpha_subject(model, TOK, [*long, "key"], forget=SECRETS).prompts
    assert set(offered.values()) == {*long, "key", *(i["prompt"] for i in SECRETS.values())}
    assert offered["key"] == SECRETS["key"]["prompt"]


def test_a_model_is_not_its_own_control(split):
    with pytest.raises(ValueError, match="control is the model itself"):
        alpha_subject(split[0], TOK, forget=SECRETS, control=split[0])
