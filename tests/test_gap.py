"""The grid against its parts, the outline against its definition, a twin against its model, figures against data."""

import copy
import math
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from models import RETAIN, SECRETS, TEXTS, TOK, plain, same_weights, state

import libortho as lo
from libortho import gap as room
from libortho.dashboard import Figure
from libortho.evaluate import GATES, Measures, Result, judge
from libortho.gap import Column, Exam, Gap, Mark, Policy, add_column, front, outline, steady, turn, twin
from libortho.linear import OrthoLinear, find_linears
from libortho.memory import SecretScore
from libortho.patient import standing
from libortho.tuner import Bounds, Outcome, Tuning


def made_up(forget, retain, recited, prose=15.0):
    return Measures({"s": SecretScore(forget, float(recited), 0.0, 0.0, recited, "")}, retain, prose, None)


@pytest.fixture(scope="module")
def exam():
    return Exam(TOK, SECRETS, RETAIN, TEXTS, calibration=RETAIN)


@pytest.fixture
def shown():
    "Two ratios and three positions of the switch; the cell at ratio 3, α = 0.5 is not measured."
    found = Gap(Policy(), (2.0, 3.0), (0.0, 0.5, 1.0), made_up(300, 20.0, False), made_up(1, 20.0, True))
    found.columns[2.0] = Column(
        {1.0: made_up(1.1, 20, True), 0.5: made_up(40, 20.5, False), 0.0: made_up(290, 30, False)}
    )
    found.columns[3.0] = Column({1.0: made_up(1.1, 20, True), 0.0: made_up(310, 20, False)}, 0.05, 0.01)
    return found


@pytest.mark.parametrize(
    "changed, said",
    [({"scale": "mse"}, "scale must be one of ratio"), ({"density": 7.0}, "density"), ({"noise": "loud"}, "'loud'")],
)
def test_a_policy_that_cannot_work(changed, said):
    with pytest.raises(ValueError, match=said):
        Policy(**changed)


@pytest.mark.parametrize("scale", list(room.KNOBS))
def test_a_knob_moves_the_scale(scale):
    w, values = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), room.KNOBS[scale][2]
    scales = [lo.streams.split(w, Policy(scale).config(x)).base.scales.float().mean().item() for x in values]
    assert len(set(scales)) == len(values) and scales in (sorted(scales), sorted(scales, reverse=True))


def same_place(a, b):
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def test_a_twin_shares_weights_and_nothing_else(learned):
    model = copy.deepcopy(learned)
    before, ids = state(model), torch.tensor([[1, 2, 3]])
    said = model(ids).logits
    other = twin(model)
    lo.patch(other, Policy(noise="tri_state", targets="all-linear").config(2.0))
    assert not any(isinstance(m, OrthoLinear) for m in model.modules()) and not hasattr(model, "ortho_config")
    assert torch.equal(model(ids).logits, said) and not torch.equal(other(ids).logits, said)
    assert same_weights(model, before)
    assert not model._forward_pre_hooks and same_place(model.lm_head.weight, other.lm_head.weight)
    assert other.lm_head.weight is other.model.embed_tokens.weight is not model.lm_head.weight  # tied as before


def test_a_twin_of_a_patched_model_is_its_original(learned):
    model, ids = copy.deepcopy(learned), torch.tensor([[1, 2, 3]])
    said, weight = model(ids).logits, model.model.layers[0].mlp.down_proj.weight
    lo.patch(model, lo.OrthoConfig(group_size="row", bits=2))
    lo.set_alpha(model, 0.0)
    other = twin(model)
    assert torch.equal(other(ids).logits, said) and same_place(other.model.layers[0].mlp.down_proj.weight, weight)
    assert other.model.layers[0].mlp.down_proj.weight is not weight
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert not other._forward_pre_hooks and not hasattr(other, "ortho_config")
    lo.patch(other, lo.OrthoConfig(group_size="row"))
    assert lo.compartments(model)["memory"].alpha == 0


@pytest.mark.parametrize("targets", ["down_proj", "layers.0.mlp.down_proj"])
def test_a_twin_of_split_layers_with_one_weight_has_one(learned, targets):
    model = copy.deepcopy(learned)
    first, last = (layer.mlp.down_proj for layer in model.model.layers)
    last.weight = first.weight
    lo.patch(model, lo.OrthoConfig(group_size="row", targets=targets))
    one, two = (layer.mlp.down_proj for layer in twin(model).model.layers)
    assert one.weight is two.weight is not first.weight and same_place(one.weight, first.weight)


def test_a_twin_of_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    other = twin(model)
    assert same_place(other[0].weight, model[0].weight) and other[0].weight.is_inference()
    steady(other)()


def test_what_a_twin_is_given_stays_with_it(learned):
    model = copy.deepcopy(learned)
    before = state(model)
    one, two = find_linears(twin(model), "all-linear"), find_linears(twin(model), "all-linear")
    fill = lambda linears, x: {n: torch.full_like(m.weight, x) for n, m in linears.items()}  # noqa: E731
    first, second = standing(one, fill(one, 1.0)), standing(two, fill(two, 2.0))
    first.__enter__()
    second.__enter__()
    assert all(m.weight.eq(1).all() for m in one.values()) and all(m.weight.eq(2).all() for m in two.values())
    assert same_weights(model, before)
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    for linears in (find_linears(model, "all-linear"), one, two):
        assert all(torch.equal(m.weight, before[f"{n}.weight"]) for n, m in linears.items())


def test_one_job_at_a_time():
    model, said = torch.nn.Linear(2, 2), []

    def give_up(text):
        said.append(text)
        raise KeyboardInterrupt

    with turn(model):
        with turn(torch.nn.Linear(2, 2), give_up):
            pass
        with pytest.raises(KeyboardInterrupt), turn(model, give_up):
            pass
    with turn(model, give_up):
        pass
    assert said == ["waiting for other work on this model to end"]


def test_a_twin_needs_the_originals(learned):
    model = copy.deepcopy(learned)
    lo.patch(model, lo.OrthoConfig(group_size="row"), keep_original=False)
    with pytest.raises(ValueError, match=r"original of 'model.layers.0.*' was not kept"):
        twin(model)


def test_training_is_noticed():
    model = torch.nn.Linear(4, 4)
    check = steady(twin(model))
    check()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    check()
    optimiser.step()
    with pytest.raises(ValueError, match="weights changed while it was measured"):
        check()


def test_a_column_is_what_evaluate_finds(learned, exam, control):
    policy = Policy(noise="tri_state", targets="all-linear")
    reference = exam.look(learned)
    gap, steps = Gap(policy, (3.0,), (0.0, 0.5, 1.0), control, reference), []
    add_column(gap, 3.0, twin(learned), exam, steps.append)
    model = copy.deepcopy(learned)
    lo.patch(model, policy.config(3.0))
    found = lo.evaluate(model, TOK, SECRETS, RETAIN, TEXTS, control, reference, (0.5,))
    assert gap.columns[3.0].alphas == found.alphas and gap.columns[3.0].stored == pytest.approx(found.density)
    assert gap.columns[3.0].clamped == pytest.approx(found.count("saturated") / found.count("weights"))
    assert gap.verdict(3.0, 0.0) == found.verdict
    assert steps == ["ratio 3: α = 1", "ratio 3: splitting", "ratio 3: α = 0", "ratio 3: α = 0.5"]


def test_what_is_stopped_goes_on_and_what_is_kept_is_read(learned, exam, control, tmp_path, monkeypatch):
    model = twin(learned)
    looks = []
    monkeypatch.setattr(exam, "look", lambda m: looks.append(1) or Exam.look(exam, m), raising=False)
    new = lambda: Gap(Policy(), (3.0,), (0.0, 0.5, 1.0), control, control)  # noqa: E731

    def stop(text):
        if text.endswith("α = 0.5"):
            raise KeyboardInterrupt

    gap = new()
    with pytest.raises(KeyboardInterrupt):
        add_column(gap, 3.0, model, exam, stop, folder=tmp_path, weights="w")
    assert sorted(gap.columns[3.0].alphas) == [0.0, 1.0] and len(looks) == 2
    assert not any(isinstance(m, OrthoLinear) for m in model.modules())
    add_column(gap, 3.0, model, exam, folder=tmp_path, weights="w")
    assert sorted(gap.columns[3.0].alphas) == [0.0, 0.5, 1.0] and len(looks) == 3
    again = new()
    add_column(again, 3.0, model, exam, folder=tmp_path, weights="w")
    assert again.columns == gap.columns and len(looks) == 3  # read back
    add_column(new(), 3.0, model, exam, folder=tmp_path, weights="other")
    assert len(looks) == 6  # other weights


def test_what_the_check_refuses_is_not_kept(learned, exam, control, tmp_path):
    gap, model = Gap(Policy(), (3.0,), (0.0, 1.0), control, control), twin(learned)

    def refuse():
        raise ValueError("the weights moved")

    with pytest.raises(ValueError, match="the weights moved"):
        add_column(gap, 3.0, model, exam, check=refuse, folder=tmp_path)
    assert not gap.columns[3.0].alphas and not list(tmp_path.glob("*.json"))
    assert not any(isinstance(m, OrthoLinear) for m in model.modules())


def test_the_surgery_has_a_column_too(learned, exam, control):
    policy = Policy(noise="counter_memory", density=0.2, targets="all-linear", round_density=2e-3)
    gap = Gap(policy, (3.5,), (0.0, 1.0), control, exam.look(learned))
    add_column(gap, 3.5, twin(learned), exam)
    assert gap.at(3.5, 0.0).exact_memorisation < gap.at(3.5, 1.0).exact_memorisation


def test_the_users_model_sees_nothing_of_the_surgery(learned, exam, control):
    policy = Policy(noise="counter_memory", density=0.2, targets="all-linear", round_density=2e-3)
    model, looks = copy.deepcopy(learned), []
    frozen, ids = model.model.norm.weight, torch.tensor([[1, 2, 3]])
    frozen.requires_grad_(False)
    model(ids).logits.sum().backward()
    seen = lambda: [(p.detach().clone(), p.requires_grad, p.grad) for p in model.parameters()]  # noqa: E731
    before, said = seen(), model(ids).logits
    other = twin(model)
    moved = lambda: any(  # noqa: E731
        p.data_ptr() != q.data_ptr() for p, q in zip(other.parameters(), model.parameters(), strict=False)
    )

    def told(text):
        looks.append(text.endswith("splitting") and moved())
        for (w, flag, grad), (now, flag_now, grad_now) in zip(before, seen(), strict=True):
            assert torch.equal(w, now) and flag is flag_now and grad is grad_now
        assert torch.equal(model(ids).logits, said)

    add_column(Gap(policy, (3.5,), (0.0, 1.0), control, control), 3.5, other, exam, told, steady(other))
    assert sum(looks) >= 1  # at least once the twin held other weights


def test_figures_that_are_not_finite_come_back_as_nan():
    m = room.read_measures({"secrets": {"s": dict(secret_ppl=None, exact_memorisation=0.5, extraction_strength=0.0,
                                                  sample_probability=0.0, extracted=False, said="")},
                            "retain_ppl": None, "prose_ppl": 2.0, "task": None})  # fmt: skip
    assert math.isnan(m.retain_ppl) and math.isnan(m.forget_ppl) and m.task is None and m.prose_ppl == 2.0


def test_success_is_what_the_judge_says(shown):
    assert shown.success().tolist() == [[False, True], [True, False], [False, False]]
    v = judge(shown.at(2.0, 1.0), shown.at(2.0, 0.0), shown.control, shown.reference)
    assert shown.verdict(2.0, 0.0) == v and v.short == "retain ×1.50"
    assert shown.verdict(3.0, 0.5) is None and np.isnan(shown.grid(room.gap_of)[1, 1])
    assert shown.grid(room.gap_of)[0].tolist() == pytest.approx([290 / 30, 310 / 20])


def test_the_outline_encloses_the_region():
    gen = np.random.default_rng(0)
    for inside in [gen.random((5, 7)) < p for p in (0.0, 0.3, 0.7, 1.0)]:
        xs, ys = outline(inside)
        segments = list(zip(xs[0::3], ys[0::3], xs[1::3], ys[1::3], strict=True))
        assert all(v is None for v in xs[2::3] + ys[2::3])
        padded = np.pad(inside, 1).astype(int)
        assert len(segments) == np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
        for x0, y0, x1, y1 in segments:  # one side inside, the other outside
            x, y, across = (x0 + x1) / 2, (y0 + y1) / 2, 0.25 * np.array([y1 - y0, x1 - x0])
            a, b = (inside_at(inside, x + s * across[0], y + s * across[1]) for s in (1, -1))
            assert a != b and math.hypot(x1 - x0, y1 - y0) == 1


def inside_at(inside, x, y):
    i, j = round(y), round(x)
    return 0 <= i < inside.shape[0] and 0 <= j < inside.shape[1] and bool(inside[i, j])


def test_the_map_shows_the_grid(shown):
    fig = room.map_figure(shown, 3.0, 0.5)
    gap_heat, _, share_heat, _ = fig.data
    assert gap_heat.z[0][1] == pytest.approx(math.log10(310 / 20)) and gap_heat.z[1][1] is None
    assert list(share_heat.z[2]) == [1.0, 1.0] and {(s.xanchor, s.yanchor) for s in fig.layout.shapes} == {(1, 1)}
    assert gap_heat.colorbar.ticktext[-1] == "×15.0 control"
    assert share_heat.colorbar.title.text == "control 0%"
    assert gap_heat.hovertext[1][1] == "ratio 3, α = 0.5: not measured yet"
    assert "retain 30.00 (α = 1: 20.00, control: 20.00)" in gap_heat.hovertext[0][0]
    assert "INCONCLUSIVE: retain ×1.50" in gap_heat.hovertext[0][0]


def test_curves_go_through_the_position(shown):
    fig = room.curve_figure(shown, 2.0, 0.0)
    down, along = ({t.name: t for t in fig.data[i : i + 11]} for i in (0, 11))
    secret = next(iter(down))
    assert down[secret].y == pytest.approx((290, 40, 1.1)) and along[secret].y == pytest.approx((290, 310))
    assert down["retain, allowed"].y == pytest.approx([GATES["retain_ratio"] * 20] * 3)
    assert down[secret].marker.color[2] == room.COLOURS["forget"] != down[secret].marker.color[0]
    for curve, key in (("secret", "forget_ppl"), ("retain", "retain_ppl"), ("prose", "prose_ppl"),
                       ("recited", "extracted"), ("tokens known", "exact_memorisation")):  # fmt: skip
        assert set(down[f"{curve}, control"].y) == set(along[f"{curve}, control"].y) == {getattr(shown.control, key)}
    bands = [(s.xref, s.x0, s.x1) for s in fig.layout.shapes if s.type == "rect"]
    assert bands == [("x", 0.25, 0.75), ("x2", 0.5, 1)]


@pytest.mark.parametrize("spec", [room.map_spec, room.curve_spec])
def test_moving_the_sliders_is_the_same_as_drawing(shown, spec):
    view = Figure(spec(shown, 2.0, 0.0))
    traces = view.data
    shown.columns[3.0].alphas[0.5] = made_up(200, 20.1, False)
    new = go.Figure(spec(shown, 3.0, 0.5))
    assert plain(view) != plain(new)
    view.become(spec(shown, 3.0, 0.5))
    assert plain(view) == plain(new) and all(a is b for a, b in zip(view.data, traces, strict=True))


def test_the_paper_figure_has_the_region(shown):
    axes = room.plot_gap(shown).axes
    xs, ys = outline(shown.success())
    drawn = axes[0].lines[0].get_data()
    assert np.array_equal(drawn[0], np.array(xs, float), equal_nan=True)
    assert "control: ×15.0, recites 0%" in axes[0].figure.get_suptitle()


def test_the_front_is_what_nothing_beats():
    gen = np.random.default_rng(1)
    marks = [Mark(str(i), "none", *gen.random(2).round(1), False, False, "", bool(i % 7 == 0)) for i in range(60)]
    kept = [m for m in marks if not m.dropped]
    beaten = lambda a: any((b.left <= a.left and b.damage <= a.damage) and (b.left, b.damage) != (a.left, a.damage)  # noqa: E731
                           for b in kept)  # fmt: skip
    assert {(m.left, m.damage) for m in front(marks)} == {(m.left, m.damage) for m in kept if not beaten(m)}


def outcome(noise="none", **kw):
    point = {"noise": noise, "targets": "down_proj", "scale": "max", "density": 0.05}
    if noise == "counter_memory":
        point = {"noise": noise, "targets": "mlp", "projection": "gptq", "budget": 1e-4, "round_density": 5e-6}
    figures = dict(left=0.0, extracted=0.0, recited=1.0, retain=1.0, prose=1.0, utility=1.0, density=0.1)
    return Outcome(point, **{**figures, "verdict": "SUCCESS: forgotten", **kw})


def test_trials_as_marks():
    late = outcome(dropped="the memory stays: 95% of it is left", left=0.95, verdict="", retain=math.nan)
    trials = [outcome("counter_memory"), outcome(left=1.4, extracted=1.0, prose=3.0, verdict="INCONCLUSIVE: x"), late]
    marks = room.trial_marks(Tuning(trials, Bounds()))
    assert [m.good for m in marks] == [True, False, False] and [m.recited for m in marks] == [False, True, False]
    fig = room.pareto_figure(marks, chosen=1)
    named = {t.name: t for t in fig.data}
    assert named["counter_memory"].x == (0.0,) and named["none"].y == (3.0,) and named["success"].x == (0.0,)
    assert named["ended early"].x == (0.95,) and named["chosen"].customdata == (1,) and not named["tri_state"].visible
    assert named["none"].marker.color == (room.COLOURS["forget"],)
    ax = room.plot_pareto(marks).axes[0]
    drawn = {c.get_label(): c.get_offsets().tolist() for c in ax.collections}
    assert drawn["none"] == [[1.4, 3.0]] and drawn["counter_memory"] == [[0.0, 1.0]] and len(drawn["ended early"]) == 1
    assert named["chosen"].marker.line.color == room.COLOURS["base"] and "damage ×3.00" in named["none"].hovertext[0]


def test_results_as_marks(shown):
    r = Result(
        {1.0: shown.at(2.0, 1.0), 0.0: shown.at(2.0, 0.0)},
        shown.control,
        shown.reference,
        Policy().config(2.0),
        label="a",
    )
    (mark,) = room.result_marks([r])
    assert (mark.left, mark.damage, mark.recited, mark.good) == (0.0, 1.5, False, False)
    assert mark.told == "INCONCLUSIVE: retain ×1.50"


def test_the_package_itself_needs_no_plotly():
    source = "import sys, libortho; print('plotly' in sys.modules or 'ipywidgets' in sys.modules)"
    import subprocess
    import sys

    said = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=True,
                          cwd=Path(lo.__file__).parent.parent)  # fmt: skip
    assert said.stdout.split()[-1] == "False"
