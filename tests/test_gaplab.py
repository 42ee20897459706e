"""GapLab by its controls: what is missing is fetched, a stop keeps what is done, sliders only read, errors are told."""

import copy
import html
import threading

import pytest
import torch
from models import RETAIN, SECRETS, TEXTS, TOK, ended, learned_llama, same_weights, state

import libortho as lo
from libortho import gaplab
from libortho.gap import Policy
from libortho.gaplab import gap_lab
from libortho.linear import OrthoLinear


def opened(model, control, **options):
    options = {
        "policy": Policy(noise="tri_state", targets="all-linear"),
        "ratios": (2.0, 3.5, 5.0),
        "alphas": (0.5,),
    } | options
    return gap_lab(model, TOK, SECRETS, RETAIN, control, TEXTS, calibration=RETAIN, **options)


@pytest.fixture(scope="module")
def filled(learned, control):
    lab = opened(copy.deepcopy(learned), control)
    assert lab.measure().join(60) and not lab.error
    return lab


def test_all_is_measured_and_the_model_is_as_it_was(learned, control):
    model = copy.deepcopy(learned)
    before, modules = state(model), list(model.modules())
    lab = opened(model, control)
    assert lab.gap is None and "Nothing is measured" in lab.table.value and lab.views.layout.display == "none"
    assert lab.measure().join(60) and not lab.error
    assert {x: sorted(c.alphas) for x, c in lab.gap.columns.items()} == dict.fromkeys((2.0, 3.5, 5.0), [0.0, 0.5, 1.0])
    assert [m is n for m, n in zip(model.modules(), modules, strict=True)].count(False) == 0
    assert same_weights(model, before)
    assert not model._forward_pre_hooks and lab.progress.layout.display == "none" and lab.views.layout.display is None


def test_sliders_move_the_figures_in_place(filled):
    filled.ratio.value, filled.alpha.value = 3.5, 0.0
    maps, curves = filled.maps, filled.curves
    where, secret = lambda: {(s.xanchor, s.yanchor) for s in maps.layout.shapes}, curves.data[0]
    assert where() == {(1, 0)}
    before = secret.y
    filled.ratio.value = 5.0
    assert curves.data[0] is secret and where() == {(2, 0)}
    assert secret.y != before == tuple(filled.gap.at(3.5, a).forget_ppl for a in filled.alphas)
    filled.alpha.value = 0.5
    assert where() == {(2, 1)} and "α = 0.5" in filled.table.value
    here = filled.gap.at(5.0, 0.5)
    assert f"{here.extracted:.0%}" in filled.table.value
    assert filled.gap.verdict(5.0, 0.5).reason in html.unescape(filled.table.value)


def test_moving_a_slider_runs_no_model(filled, monkeypatch):
    monkeypatch.setattr(filled.exam, "look", None, raising=False)
    for x in (2.0, 3.5, 5.0):
        filled.ratio.value = x
        assert filled.job is None and not filled.error and f"{x:g}" in filled.curves.layout.xaxis.title.text


def test_another_noise_mode_is_measured_and_the_first_is_kept(learned, control):
    lab = opened(copy.deepcopy(learned), control, ratios=(2.0, 3.5), alphas=())
    assert lab.measure().join(60)
    first = lab.gap
    lab.noise.value = "none"
    assert ended(lab) and not lab.error
    assert lab.gap is not first and lab.gap.policy.noise == "none" and len(lab.gap.columns) == 2
    assert lab.gap.at(2.0, 1.0).forget_ppl == pytest.approx(first.at(2.0, 1.0).forget_ppl)  # noise is for α = 0
    lab.noise.value = "tri_state"
    assert lab.job is None and lab.gap is first


def test_another_scale_policy_brings_its_own_knob(filled):
    filled.alpha.value = 0.0
    filled.scale.value = "three_sigma"
    assert filled.ratio.description == "three_sigma" and dict(filled.ratio.options)["1.5"] == 1.5
    filled.stop_button.click()
    assert ended(filled)
    assert "knob" not in filled.error and not filled.error
    filled.scale.value = "ratio"
    assert [v for _, v in filled.ratio.options] == [2.0, 3.5, 5.0] and filled.ratio.value == 3.5
    assert len(filled.gap.columns) == 3


def test_stop_and_go_on(learned, control, monkeypatch):
    lab = opened(copy.deepcopy(learned), control)
    reached, go_on, looks = threading.Event(), threading.Event(), []

    def look(model):
        looks.append(1)
        if len(looks) == 3:  # the model itself, the first cell, the second
            reached.set()
            assert go_on.wait(30)
        return lo.measure(model, TOK, SECRETS, RETAIN, TEXTS)

    monkeypatch.setattr(lab.exam, "look", look, raising=False)
    job = lab.measure()
    assert reached.wait(30) and lab.progress.layout.display is None
    lab.stop_button.click()
    go_on.set()
    assert job.join(30) and "stopped" in lab.status.value and not lab.error
    assert sum(len(c.alphas) for c in lab.gap.columns.values()) == 2 and len(looks) == 3
    lab.run.click()
    assert ended(lab) and len(looks) == 1 + 9  # nothing twice
    assert not gaplab._missing(lab.gap)


def held(lab, monkeypatch):
    "Let a lab's measuring wait: what says that it has begun, what lets it go on, and the looks so far."
    reached, go_on, looks = threading.Event(), threading.Event(), []

    def look(m):
        looks.append(1)
        reached.set()
        assert go_on.wait(30)
        return lo.measure(m, TOK, SECRETS, RETAIN, TEXTS)

    monkeypatch.setattr(lab.exam, "look", look, raising=False)
    return reached, go_on, looks


def test_labs_on_one_model_take_turns(learned, control, monkeypatch):
    model = copy.deepcopy(learned)
    first, second = (opened(model, control, ratios=(3.5,), alphas=()) for _ in range(2))
    reached, go_on, _ = held(first, monkeypatch)
    at_work = first.measure()
    assert reached.wait(30)
    waiting = second.measure()
    assert not waiting.join(0.3) and "waiting for other work on this model" in second.status.value
    second.stop_button.click()
    assert waiting.join(10) and second.known is None and not second.error
    elsewhere = opened(copy.deepcopy(learned), control, ratios=(3.5,), alphas=())
    assert elsewhere.measure().join(60) and elsewhere.gap.at(3.5, 0.0)  # another model
    waiting = second.measure()
    go_on.set()
    assert at_work.join(60) and waiting.join(60) and second.gap.columns == first.gap.columns


def test_a_closed_lab_stops_its_work(learned, control, monkeypatch):
    lab = opened(copy.deepcopy(learned), control)
    reached, go_on, looks = held(lab, monkeypatch)
    job = lab.measure()
    assert reached.wait(30)
    lab.close()
    go_on.set()
    assert job.join(30) and len(looks) == 1 and not lab.error


def test_the_sliders_ratio_comes_first(learned, control):
    lab, order = opened(copy.deepcopy(learned), control), []
    lab.ratio.value = 5.0
    add = gaplab.add_column
    with pytest.MonkeyPatch.context() as m:
        m.setattr(gaplab, "add_column", lambda gap, x, *rest: order.append(x) or add(gap, x, *rest))
        assert lab.measure().join(60)
    assert order == [5.0, 3.5, 2.0]


def test_other_weights_are_measured_anew(learned, control):
    model = copy.deepcopy(learned)
    lab = opened(model, control, ratios=(3.5,), alphas=())
    assert lab.measure().join(60)
    before = lab.gap.at(3.5, 0.0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    assert lab.measure().join(60) and not lab.error
    assert lab.gap.at(3.5, 0.0) != before


def test_training_meanwhile_is_told(learned, control, monkeypatch):
    model = copy.deepcopy(learned)
    lab, looks = opened(model, control), []

    def look(m):
        looks.append(1)
        if len(looks) == 3:
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
        return lo.measure(m, TOK, SECRETS, RETAIN, TEXTS)

    monkeypatch.setattr(lab.exam, "look", look, raising=False)
    assert lab.measure().join(60) and lab.error.startswith("the model's weights changed")
    assert len(lab.gap.columns[3.5].alphas) == 1


def test_a_folder_is_read_back(learned, control, tmp_path, monkeypatch):
    first = opened(copy.deepcopy(learned), control, folder=tmp_path)
    assert first.measure().join(60)
    second = opened(copy.deepcopy(learned), control, folder=tmp_path)
    monkeypatch.setattr(second.exam, "look", None, raising=False)
    assert second.measure().join(60) and not second.error
    assert second.gap.columns == first.gap.columns


def test_a_patched_model_and_a_model_as_control(learned):
    model = copy.deepcopy(learned)
    lo.patch(model, lo.OrthoConfig(group_size="row"))
    lo.set_alpha(model, 0.5)
    lab = opened(model, learned_llama(steps=0), ratios=(3.5,), alphas=())
    assert lab.measure().join(60) and not lab.error
    assert lab.gap.control.extracted == 0 and set(lab.exam.levels) == set(SECRETS)
    assert (
        isinstance(model.model.layers[0].mlp.down_proj, OrthoLinear) and lo.compartments(model)["memory"].alpha == 0.5
    )


def test_it_begins_when_it_is_shown(learned, control):
    lab = opened(copy.deepcopy(learned), control, ratios=(3.5,), alphas=())
    assert lab.job is None
    lab._repr_mimebundle_()
    assert ended(lab) and lab.gap.at(3.5, 0.0)
    lab._repr_mimebundle_()
    assert lab.job is None  # once is enough


def test_an_error_is_a_sentence(learned, control):
    lab = opened(copy.deepcopy(learned), control, policy=Policy(targets="nowhere"), ratios=(3.5,))
    assert lab.measure().join(60)
    assert lab.error.startswith("targets 'nowhere' matches no linear layer") and "role='alert'" in lab.status.value
    lab.targets.value = "mlp"
    assert ended(lab) and not lab.error


@pytest.mark.parametrize(
    "options, said",
    [
        ({"control": None}, "control must be the never-memorised model"),
        ({"retain": []}, "retain is empty"),
        ({"texts": []}, "texts is empty"),
        ({"forget": []}, "forget holds no text"),
        ({"forget": {"other": "one two"}}, "control has no measure of 'other'"),
        ({"ratios": (0.0,)}, "r of scale 'ratio'"),
        ({"ratios": ()}, "ratios is empty"),
        ({"alphas": (2.0,)}, r"alphas must be in \[0, 1\]"),
    ],
)
def test_arguments_that_cannot_work(learned, control, options, said):
    options = {"forget": SECRETS, "retain": RETAIN, "control": control, "texts": TEXTS} | options
    with pytest.raises(ValueError, match=said):
        gap_lab(learned, TOK, **options)


def test_the_model_is_no_control(learned):
    with pytest.raises(ValueError, match="control is the model itself"):
        gap_lab(learned, TOK, SECRETS, RETAIN, learned, TEXTS)
