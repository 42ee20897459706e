import json

import pytest
import torch

import libortho as lo
from libortho import evaluate as _  # noqa: F401
from libortho.evaluate import (
    Measures,
    check_control,
    check_measured,
    dumps,
    html_page,
    judge,
    number,
    text_table,
    tofu_configs,
    write_text,
)
from libortho.linear import OrthoLinear
from libortho.memory import SecretScore
from libortho.plots import plot_alpha, plot_damage, plot_forget_retain

FORGET = lo.canaries("coca-cola")


def made_up(ppl=1.0, extracted=1.0, retain=20.0, prose=15.0):
    return Measures({"s": SecretScore(ppl, extracted, extracted, 0.0, bool(extracted), "")}, retain, prose, None)


ON, CONTROL, GONE = made_up(), made_up(300, 0.0), made_up(250, 0.0)


@pytest.mark.parametrize(
    "on, off, control, float_, valid, outcome, words",
    [
        (ON, GONE, CONTROL, ON, True, "SUCCESS", "gone"),
        (ON, GONE, None, ON, False, "INVALID", "no control"),
        (ON, GONE, ON, ON, False, "INVALID", "control"),
        (GONE, GONE, CONTROL, ON, False, "INVALID", "no memory"),
        (ON, ON, CONTROL, ON, True, "INCONCLUSIVE", "memory stays"),
        (ON, made_up(250, 0.0, retain=21.1), CONTROL, ON, True, "INCONCLUSIVE", "retain is damaged"),
        (ON, made_up(250, 0.0, retain=20.9), CONTROL, ON, True, "SUCCESS", "gone"),
        (ON, made_up(250, 0.0, prose=16), CONTROL, ON, True, "INCONCLUSIVE", "prose is damaged"),
        (ON, made_up(250, 0.0, retain=float("nan")), CONTROL, ON, True, "INCONCLUSIVE", "retain is damaged"),
        (ON, made_up(250, 0.0, retain=float("inf")), CONTROL, ON, True, "INCONCLUSIVE", "retain is damaged"),
        (ON, GONE, CONTROL, made_up(prose=13), True, "INCONCLUSIVE", "worse than the float"),
        (ON, made_up(99_999, 0.0), CONTROL, ON, True, "SUCCESS", "overshoot"),
    ],
)
def test_gates(on, off, control, float_, valid, outcome, words):
    v = judge(on, off, control, float_)
    assert (v.valid, v.outcome) == (valid, outcome) and words in v.reason, v


def test_what_is_no_control_is_refused():
    model = torch.nn.Linear(2, 2)
    for control, other in ((CONTROL, model), (torch.nn.Linear(2, 2), model), (CONTROL, None)):
        check_control(control, other)
    check_measured(CONTROL, ["s"])
    for wrong, said in (
        (None, "got NoneType; forgetting means nothing"),
        ("a-name", "got str"),
        (model, "itself; pass a"),
    ):
        with pytest.raises(ValueError, match=f"control .*{said}"):
            check_control(wrong, model)
    with pytest.raises(ValueError, match="control has no measure of 'other'; pass measure"):
        check_measured(CONTROL, ["s", "other"])
    with pytest.raises(ValueError, match="control must be the measures .* got NoneType; pass measure"):
        check_measured(None, ["s"])


@pytest.fixture(scope="module")
def taught(real):
    "A copy of the real model that knows the Coca-Cola secret, and the control's measures."
    import copy

    model, tok = copy.deepcopy(real[0]), real[1]
    control = lo.measure(model, tok, FORGET, texts=lo.prose(n=1))
    lo.implant(model, tok, FORGET, retain=lo.retain_facts("calibration"), progress=False)
    return model, tok, control


def test_a_real_memory_on_a_switch(taught):
    "Evaluate finds the memory at α = 1 and the damage at α = 0, and leaves switches and model as they were."
    model, tok, control = taught
    assert control.extracted == 0 and control.forget_ppl > 50
    lo.patch(
        model,
        lo.OrthoConfig(group_size="row", scale="three_sigma", sieve="magnitude", density=0.05, targets="down_proj"),
    )
    lo.set_alpha(model, 0.5)
    result = lo.evaluate(model, tok, FORGET, texts=lo.prose(n=1), control=control, alphas=(0.5,))
    assert sorted(result.alphas) == [0.0, 0.5, 1.0] and lo.compartments(model)["memory"].alpha == 0.5
    assert result.reference.extracted == result.alphas[1.0].extracted == 1 and result.verdict.valid
    assert (
        result.alphas[0.0].retain_ppl > 2 * result.alphas[1.0].retain_ppl
        and "retain is damaged" in result.verdict.reason
    )
    assert result.density == pytest.approx(0.05, rel=1e-3)
    data = json.loads(result.to_json())
    assert (
        data["verdict"]["outcome"] == "INCONCLUSIVE"
        and data["alphas"]["0"]["extracted"] == 0
        and data["control"]["extracted"] == 0
    )
    for text in (str(result), result._repr_html_()):
        assert "α = 0.5" in text and "control" in text and "VALID" in text
    lo.unpatch(model)
    with pytest.raises(ValueError, match="no split layers"):
        lo.evaluate(model, tok, FORGET)


def test_compare_keeps_what_is_finished_and_the_model(taught):
    model, tok, control = taught
    configs = tofu_configs(
        ("max", "three_sigma"), ("none", "post_clamp"), (0.05,), targets="model.layers.29.mlp.down_proj"
    )
    seen, before = [], {n: p.clone() for n, p in model.state_dict().items()}

    def on_row(c):
        seen.append(len(c.rows))
        if len(c.rows) == 3:
            lo.evaluate.__globals__["patch"] = interrupted

    real_patch = lo.evaluate.__globals__["patch"]

    def interrupted(*args):
        raise KeyboardInterrupt

    try:
        c = lo.compare(model, tok, configs, FORGET, control, texts=lo.prose(n=1), on_row=on_row, progress=False)
    finally:
        lo.evaluate.__globals__["patch"] = real_patch
    assert seen == [1, 2, 3] and len(c.rows) == 3 and c.interrupted and c.valid
    assert [r.label for r in c.rows] == list(configs)[:3]
    assert c.rows[0].alphas[1.0] is c.rows[1].alphas[1.0], "the same weights were measured twice"
    assert not any(isinstance(m, OrthoLinear) for m in model.modules())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    data = json.loads(c.to_json())
    assert data["interrupted"] and len(data["rows"]) == 3 and data["float"]["extracted"] == 1
    page = html_page(c, {"damage": plot_damage(c), "trade-off": plot_forget_retain(c), "alpha": plot_alpha(c.rows[0])})
    assert (
        page.count("data:image/png;base64,") == 3
        and "http" not in page
        and all(label in page for label in list(configs)[:3])
    )


def test_a_failure_in_one_configuration_leaves_the_model_unpatched(taught):
    model, tok, control = taught
    bad = {"bad": lo.OrthoConfig(group_size=100, targets="down_proj")}
    with pytest.raises(ValueError, match="group_size 100"):
        lo.compare(model, tok, bad, FORGET, control, reference=control, progress=False)
    assert not any(isinstance(m, OrthoLinear) for m in model.modules())


def test_a_failure_while_measuring_leaves_the_model_unpatched(taught):
    model, tok, control = taught
    configs = {"good": lo.OrthoConfig(targets="model.layers.3.mlp.down_proj")}
    with pytest.raises(ValueError, match="text 0 of 1 is empty"):
        lo.compare(model, tok, configs, FORGET, control, texts=[""], reference=control, progress=False)
    assert not any(isinstance(m, OrthoLinear) for m in model.modules())


def test_an_interrupt_while_a_row_is_written_keeps_the_row(taught):
    model, tok, control = taught

    def on_row(c):
        raise KeyboardInterrupt

    configs = {"only": lo.OrthoConfig(targets="model.layers.3.mlp.down_proj")}
    c = lo.compare(
        model, tok, configs, FORGET, control, texts=lo.prose(n=1), reference=control, on_row=on_row, progress=False
    )
    assert len(c.rows) == 1 and c.interrupted


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"forget": {"a": ""}}, "'a'"),
        ({"forget": []}, "no text"),
        ({"retain": []}, "retain"),
        ({"texts": []}, "texts"),
        ({"texts": [""]}, "text 0 of 1 is empty"),
        ({"texts": ["hello there", ""]}, "text 1 of 2 is empty"),
        ({"retain": [""]}, "text 0 of 1 is empty"),
    ],
)
def test_measure_refuses_empty_input(real, kwargs, word):
    with pytest.raises(ValueError, match=word):
        lo.measure(*real, **{"forget": FORGET, **kwargs})


def test_the_grid():
    grid = tofu_configs()
    assert len(grid) == 50 and list(grid)[0] == "max + none @ 0.05" and "ratio 3.5 + deep_focal @ 0.005" in grid
    assert {c.group_size for c in grid.values()} == {"row"} and {c.sieve for c in grid.values()} == {"magnitude"}
    assert tofu_configs(("ratio",), ("none",), (0.1,), ratio=3.0)["ratio 3 + none @ 0.1"].scale_args == {"r": 3.0}


def test_a_wrong_target_is_told_before_the_implant(monkeypatch):
    monkeypatch.setitem(lo.tofu.__globals__, "implant", lambda *a, **k: pytest.fail("the implant was started"))
    with pytest.raises(ValueError, match="up_porj"):
        lo.tofu(tofu_configs(targets="up_porj"), progress=False)


def test_json_is_strict_and_files_are_whole(tmp_path):
    assert json.loads(dumps({"a": [float("nan"), float("inf"), 1.5, ("x",)]})) == {"a": [None, None, 1.5, ["x"]]}
    path = tmp_path / "deep" / "x.json"
    write_text(path, "first")
    write_text(path, "second")
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_numbers_and_tables():
    assert [number(x) for x in (1.0, 99.994, 12345.6, 3e9, float("inf"))] == ["1.00", "99.99", "12,346", "3e+09", "inf"]
    lines = text_table(("a", "long head", "z"), [("x", "1", "end"), ("yy", "22", "e")]).splitlines()
    assert len({line.index("e") for line in lines[2:]}) == 1 and lines[0].startswith("a ")
