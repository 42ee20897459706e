"""LatticeLab: its controls moved as a hand would, on small random models."""

import copy
import json
import threading

import ipywidgets as W
import numpy as np
import pytest
import torch
from torch import nn

from libortho import latticelab
from libortho.dashboard import Figure, Plotly
from libortho.latticelab import (
    RECONSTRUCTED,
    Bench,
    LatticeLab,
    Recent,
    lattice_lab,
    round_in_pieces,
    weight_layers,
)
from libortho.linear import patch
from libortho.streams import OrthoConfig, split
from libortho.weights import blocks, dissect, health, residuals, rounded, ruler

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def big():
    "Two layers that are sampled with a budget of 4,000 weights."
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 96))


def numbers(lab):
    "The table beside the pictures, as words."
    text = lab.numbers.value.replace("</td>", "").replace("</tr>", "").split("<td")
    cells = [c.split(">", 1)[1].split("<")[0] for c in text[1:]]
    return dict(zip(cells[::2], cells[1::2], strict=True))


def settled(lab, seconds=20):
    "The lab, when its background work is done."
    if job := lab.job:
        assert job.join(seconds)
    return lab


def test_layers_are_all_but_the_head(tiny):
    names = list(weight_layers(tiny))
    assert len(names) == 14 and "lm_head" not in names and LAYER in names
    patch(tiny, OrthoConfig(group_size=16))
    assert list(weight_layers(tiny)) == names
    assert list(weight_layers(nn.Linear(4, 4))) == ["layer"]
    with pytest.raises(ValueError, match="model must have a linear layer besides its head, got a ReLU"):
        lattice_lab(nn.ReLU())


def test_every_control_changes_what_is_shown(tiny):
    lab = lattice_lab(tiny, OrthoConfig(density=0.05, group_size=16))
    assert lab.shown.whole and lab.job is None
    for control, value in (
        (lab.layer, LAYER),
        (lab.scale, "ratio"),
        (lab.ratio, 2.0),
        (lab.bits, 3),
        (lab.group, "row"),
        (lab.density, 0.2),
        (lab.sieve, "magnitude"),
        (lab.noise, "tri_state"),
    ):
        before = lab.numbers.value, lab.figures[0].to_json(), lab.figures[2].to_json()
        control.value = value
        after = lab.numbers.value, lab.figures[0].to_json(), lab.figures[2].to_json()
        assert not lab.error and all(x != y for x, y in zip(before, after, strict=True)), control.description
    cfg = lab.config()
    assert (cfg.scale, cfg.scale_args, cfg.bits, cfg.group_size) == ("ratio", {"r": 2.0}, 3, "row")
    stats = split(tiny.get_submodule(LAYER).weight, cfg, LAYER).stats
    assert numbers(lab)["stored"].startswith(f"{stats['stored']} ")
    assert numbers(lab)["moved by the noise"].startswith(f"{stats['moved']} ")
    assert numbers(lab)["clamped"] == f"{stats['saturated'] / stats['weights']:.3%}"


def test_figures_are_kept_and_only_filled(tiny):
    lab = lattice_lab(tiny)
    before = list(lab.figures), [t.uid for f in lab.figures for t in f.data]
    lab.scale.value = "max"
    assert (list(lab.figures), [t.uid for f in lab.figures for t in f.data]) == before
    assert "max" in lab.figures[0].layout.title.text
    reference = ruler(dissect(tiny.model.layers[0].self_attn.q_proj.weight, lab.config()))
    assert [int(y) for y in lab.figures[0].data[0].y if y == y] == [n for n in reference.weights if n]


def test_ratio_is_grey_where_it_does_not_apply(tiny):
    lab = lattice_lab(tiny)
    assert lab.scale.value == "mse" and lab.ratio.disabled
    lab.scale.value = "ratio"
    assert not lab.ratio.disabled
    lab.scale.value = "quantile"
    assert lab.ratio.disabled and lab.config().scale_args == {}
    assert lattice_lab(tiny, OrthoConfig(scale="ratio", scale_args={"r": 9.0})).config().scale_args == {"r": 9.0}


def test_only_groups_that_fit_are_offered():
    model = nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 48), nn.Linear(48, 5))
    lab = lattice_lab(model, OrthoConfig(group_size=128))
    assert lab.group.options == (16, 32, 64, 128, "row", "tensor") and lab.group.value == 128
    lab.layer.value = "2"
    assert lab.group.options == (16, "row", "tensor") and lab.group.value == "row" and not lab.error
    assert lab.rows.value == (0, 5) and lab.columns.value == (0, 48)


def test_a_bad_layer_is_told_in_words_and_no_old_picture_stays(tiny):
    with torch.no_grad():
        tiny.get_submodule(LAYER).weight[3, 4] = torch.inf
    lab = lattice_lab(tiny)
    assert not lab.error and lab.views.layout.visibility is None
    lab.layer.value = LAYER
    assert lab.error.startswith(f"'{LAYER}' holds 1 NaN or infinite weights of 2048")
    assert lab.error.replace("'", "&#x27;") in lab.status.value and lab.views.layout.visibility == "hidden"
    lab.layer.value = "model.layers.0.mlp.up_proj"
    assert not lab.error and lab.views.layout.visibility is None


def test_a_layer_without_values_is_told(tiny):
    lab = lattice_lab(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta")))
    lab.layer.value = "1"
    assert lab.error == "layer '1' has no values (device meta); load the model onto a device first"


def test_the_model_stays_as_it_is(tiny):
    before = copy.deepcopy(tiny.state_dict())
    lab = lattice_lab(tiny)
    for noise in lab.noise.options:
        lab.noise.value = noise
    assert all(torch.equal(x, y) for x, y in zip(before.values(), tiny.state_dict().values(), strict=True))


def test_a_split_model_shows_the_weight_that_was_kept(tiny):
    lab = lattice_lab(tiny, OrthoConfig(group_size=16))
    plain = lab.numbers.value
    patch(tiny, OrthoConfig(group_size=16, noise="tri_state", scale="max", density=0.03))
    lab = lattice_lab(tiny)  # the controls stand as the model was split
    assert (lab.group.value, lab.noise.value, lab.scale.value) == (16, "tri_state", "max")
    assert lab.density.value == pytest.approx(0.03)
    assert lattice_lab(tiny, OrthoConfig(group_size=16)).numbers.value == plain


def test_a_split_model_without_its_weights_says_so(tiny):
    cfg = OrthoConfig(group_size=16, density=0.03)
    patch(tiny, cfg, keep_original=False)
    lab = lattice_lab(tiny)
    assert RECONSTRUCTED in lab.numbers.value
    layer = tiny.get_submodule(lab.layer.value)
    assert torch.equal(lab.shown.lattice.w, layer.dequantize(1.0))
    layer.set_alpha(0.0)  # where the switches stand does not matter
    assert torch.equal(lattice_lab(tiny).shown.lattice.w, layer.dequantize(1.0))


def test_a_config_of_surgery_is_no_obstacle(tiny):
    tiny.ortho_config = OrthoConfig(sieve="contrast", noise="counter_memory", projection="gptq", sparsity=0.99)
    lab = lattice_lab(tiny)
    assert (lab.sieve.value, lab.noise.value) == ("residual", "none") and lab.density.value == pytest.approx(0.01)


def test_impact_is_offered_where_inputs_are_known(tiny):
    assert "impact" not in lattice_lab(tiny).sieve.options
    first, *_ = weight_layers(tiny)
    h = {first: torch.rand(32) + 0.1}
    lab = lattice_lab(tiny, OrthoConfig(group_size=16), h=h)
    lab.sieve.value = "impact"
    assert not lab.error and "output error, rounded" in numbers(lab)
    expected = split(tiny.get_submodule(first).weight, lab.config(), first, h[first]).compartments["memory"].mask()
    assert torch.equal(lab.shown.storage, expected)
    lab.layer.value = LAYER
    assert "needs h" in lab.error


def test_a_sample_first_and_all_rows_after(big):
    lab = lattice_lab(big, OrthoConfig(noise="tri_state", density=0.1), budget=4000)
    assert numbers(lab)["looked at"] == "62 of 256 rows" and numbers(lab)["clamped"].startswith("≈")
    assert "62 of 256 rows" in lab.figures[0].layout.title.text
    settled(lab)
    exact = health(dissect(big[0].weight, lab.config(), "0"))
    assert lab.shown.whole and numbers(lab) == dict(exact.rows()) and not lab.error
    assert all("all 256 rows" in f.layout.title.text for f in lab.figures)
    lab.density.value = 0.2
    assert "62 of 256 rows" in lab.figures[0].layout.title.text
    assert numbers(settled(lab)) == dict(health(dissect(big[0].weight, lab.config(), "0")).rows())


def test_the_last_wish_is_what_stays(big):
    lab = lattice_lab(big, budget=4000)
    for ratio in (2.0, 3.0, 4.0, 5.0):
        lab.scale.value, lab.ratio.value = "ratio", ratio
    lab.layer.value = "2"
    settled(lab)
    assert numbers(lab) == dict(health(dissect(big[2].weight, lab.config(), "2")).rows())


def test_the_work_behind_can_be_stopped(big):
    lab = lattice_lab(big, budget=4000)
    job = lab.job
    lab.stop_button.click()
    assert job.join(20) and not lab.shown.whole and "stopped" in lab.status.value and not lab.error
    assert numbers(lab)["looked at"] == "62 of 256 rows"


def test_an_error_in_the_work_behind_is_told(big):
    rows = set(LatticeLab(big, budget=4000).shown.rows.tolist())
    with torch.no_grad():
        big[0].weight[next(r for r in range(256) if r not in rows), 0] = torch.nan  # the sample does not see it
    lab = lattice_lab(big, budget=4000)
    assert not lab.error
    assert settled(lab).error.startswith("'0' holds 1 NaN or infinite weights")


class Gate:
    "Where the work behind waits, until it is let go on."

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()

    def before(self, make):
        def waits(a, *args):
            if a.whole and threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.go.wait(20)
            return make(a, *args)

        return waits


def hand_on_slider(lab):
    lab.mask.value, lab.rows.value = "clamped", (0, 20)


def hand_on_map(lab):
    lab.mask.value = "clamped"
    lab.figures[1].layout.update(yaxis3={"range": [19.5, -0.5]})


@pytest.mark.parametrize("hand", [hand_on_slider, hand_on_map])
def test_a_mask_and_a_window_chosen_during_the_work_behind_stay(big, monkeypatch, hand):
    gate = Gate()
    monkeypatch.setattr(latticelab, "residuals", gate.before(residuals))
    lab = lattice_lab(big, budget=4000)
    assert gate.reached.wait(20) and not lab.shown.whole
    hand(lab)
    gate.go.set()
    settled(lab)
    assert (lab.mask.value, lab.rows.value) == ("clamped", (0, 20)) and lab.shown.whole and not lab.error
    heat, title = lab.figures[1].data[0], lab.figures[1].layout.title.text
    assert title.startswith("Beyond the clamp") and "all 256 rows" in title
    whole = dissect(big[0].weight, lab.config(), "0")
    assert np.allclose(heat.z, 100 * blocks(whole, "clamped", (0, 20), (0, 64)).share) and len(heat.y) == 20
    assert tuple(lab.figures[1].layout.yaxis3.range) == (19.5, -0.5)


def test_the_sample_is_not_drawn_over_all_rows(big, monkeypatch):
    gate = Gate()
    monkeypatch.setattr(latticelab, "residuals", gate.before(residuals))
    lab = lattice_lab(big, budget=4000)
    job = lab.job

    def slow(a, *args):
        made = blocks(a, *args)
        if threading.current_thread() is threading.main_thread():
            gate.go.set()
            job.join(0.5)  # time to draw all rows, if nothing keeps it from that
        return made

    assert gate.reached.wait(20)
    monkeypatch.setattr(latticelab, "blocks", slow)
    lab.mask.value = "clamped"
    assert job.join(20) and lab.shown.whole and not lab.error
    title = lab.figures[1].layout.title.text
    assert title.startswith("Beyond the clamp") and "all 256 rows" in title


def test_another_layer_chosen_during_the_work_behind_is_no_error(big, monkeypatch):
    gate, errors = Gate(), []
    monkeypatch.setattr(latticelab, "ruler", gate.before(ruler))
    lab = lattice_lab(big, budget=4000)
    job = lab.job
    assert gate.reached.wait(20)
    monkeypatch.setattr(lab, "fail", errors.append)

    def go_on(_):  # the work behind wakes while the sliders are on their way to the other layer
        gate.go.set()
        assert job.join(20)

    lab.columns.observe(go_on, "value")
    lab.layer.value = "2"
    settled(lab)
    assert errors == [] and not lab.error
    assert numbers(lab) == dict(health(dissect(big[2].weight, lab.config(), "2")).rows())
    assert "all 96 rows" in lab.figures[1].layout.title.text and lab.columns.value == (0, 256)


def test_all_that_is_sent_to_a_page_is_json(big, monkeypatch):
    unseen, kind = [], type(W.HTML().comm)
    publish = kind.publish_msg

    def strict(self, msg_type, data=None, *args, **more):
        try:
            json.dumps(data, allow_nan=False)
        except ValueError as e:
            unseen.append(f"{msg_type}: {e}")
        return publish(self, msg_type, data, *args, **more)

    monkeypatch.setattr(kind, "publish_msg", strict)
    lab = lattice_lab(big, OrthoConfig(noise="tri_state"), budget=4000)
    lab.stop_button.click()  # some rows stay unseen
    gap = next(r for r in range(256) if r not in lab.shown.rows)
    for change in (
        lambda: setattr(lab.rows, "value", (gap, gap + 1)),
        lambda: setattr(lab.scale, "value", "max"),
        lambda: setattr(lab.layer, "value", "2"),
    ):
        change()
        for figure in lab.figures:
            figure.send_state()  # what a page that comes late is given
    settled(lab)
    assert unseen == [] and not lab.error


def test_zoom_by_slider_by_mouse_and_out(tiny):
    lab = lattice_lab(tiny, OrthoConfig(group_size=16, density=0.1))
    lab.layer.value = LAYER
    heat, layout = lab.figures[1].data[0], lab.figures[1].layout
    lab.rows.value, lab.columns.value = (4, 12), (10, 30)
    assert heat.z.shape == (8, 20) and heat.customdata.shape == (8, 20, 4)
    assert (heat.z == 100 * lab.shown.storage[4:12, 10:30].numpy()).all()
    layout.update(xaxis3={"range": [11.6, 15.5]}, yaxis3={"range": [9.5, 5.5]})
    assert lab.columns.value == (12, 16) and lab.rows.value == (6, 10) and heat.z.shape == (4, 4)
    assert layout.xaxis3.range == (11.5, 15.5)
    lab.whole.click()
    assert heat.z.shape == (32, 64) and lab.rows.value == (0, 32) and layout.xaxis3.range == (-0.5, 63.5)
    layout.update(xaxis3={"range": [-50, 500]})
    assert lab.columns.value == (0, 64) and not lab.error


def test_zoomed_in_every_control_still_works(tiny):
    lab = lattice_lab(tiny, OrthoConfig(group_size=16, density=0.1, noise="tri_state"))
    lab.rows.value = (0, 7)
    for mask in lab.mask.options:
        lab.mask.value = mask
        assert lab.figures[1].data[0].z.shape[0] == 7 and not lab.error
    assert lab.figures[1].layout.title.text.startswith("Moved by the noise")
    lab.density.value = 0.5
    moved = (lab.shown.p != lab.shown.lattice.q)[:7].numpy()
    assert (lab.figures[1].data[0].z == 100 * moved).all()
    lab.layer.value = LAYER
    assert lab.rows.value == (0, 32)


def test_weights_that_were_trained_meanwhile_are_fitted_anew(tiny):
    bench, cfg = Bench(tiny), OrthoConfig(group_size=16)
    first = bench.sampled(LAYER, cfg)
    assert bench.sampled(LAYER, cfg).lattice is first.lattice
    with torch.no_grad():
        tiny.get_submodule(LAYER).weight.mul_(2)
    again = bench.sampled(LAYER, cfg)
    assert torch.equal(again.lattice.w, 2 * first.lattice.w) and torch.equal(again.lattice.q, first.lattice.q)


def test_rounding_in_pieces_is_rounding():
    w, steps = torch.randn(50, 48, generator=torch.Generator().manual_seed(0)), []
    for cfg in (OrthoConfig(group_size=16), OrthoConfig(group_size="row"), OrthoConfig(group_size="tensor")):
        a, b = round_in_pieces(w, cfg, "x", steps.append, 7 * 48), rounded(w, cfg)
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    assert steps == [i / 50 for i in range(0, 50, 7)] * 2


def test_recent_keeps_the_last_few():
    kept, made = Recent(2), []
    for x in (1, 2, 1, 3, 1, 2):
        kept((x,), lambda x=x: made.append(x))
    assert made == [1, 2, 3, 2]


def test_every_control_has_a_label(tiny):
    for control in lattice_lab(tiny).controls:
        assert control.description
        assert getattr(control, "continuous_update", False) is False


def test_the_program_is_sent_once_and_nothing_drawn_before_it_is_lost(tiny):
    lab = lattice_lab(tiny)
    assert len(Plotly().program) > 1_000_000
    assert all(isinstance(f, Figure) and len(str(f._esm)) < 2000 for f in lab.figures)
    lab.scale.value = "max"
    assert "max" in lab.figures[0]._widget_layout["title"]["text"]
    for figure in lab.figures:
        figure._handle_custom_msg({"event": "ready"}, [])
    lab.scale.value = "three_sigma"
    assert "max" in lab.figures[0]._widget_layout["title"]["text"]  # the browser hears of changes by itself
    assert "three_sigma" in lab.figures[0].layout.title.text
