"""Stories: every step leads to the whole of its figure, and the page is safe, small and the same each time."""

import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest

from libortho.evaluate import Measures
from libortho.gap import Column, Gap, Policy, curve_spec
from libortho.memory import SecretScore
from libortho.stories import Story, gap_story, leaves, ruler_story, story
from libortho.streams import OrthoConfig
from libortho.weights import dissect, figure_ruler, ruler


def made_up(forget, retain, recited):
    return Measures({"s": SecretScore(forget, float(recited), 0.0, 0.0, recited, "")}, retain, 15.0, None)


@pytest.fixture
def gap():
    found = Gap(Policy(), (2.0, 3.5, 5.5), (0.0, 0.5, 1.0), made_up(300, 20.0, False), made_up(1, 20.0, True))
    for i, x in enumerate(found.xs[:2]):
        cells = {a: made_up(310 ** (1 - a), 20.0 * (1.5 - 0.5 * i) ** (1 - a), a > 0.6 * i) for a in found.alphas}
        found.columns[x] = Column(cells, 0.05, 0.01)
    return found


def put(into, path, value):
    for key in (keys := path.split("."))[:-1]:
        into = into.setdefault(key, {})
    into[keys[-1]] = value


def after(figure, i):
    "What plotly shows after a step: data and layout, as `Plotly.update` is documented."
    shown = json.loads(figure.to_json())
    changes, look = figure.layout.sliders[0].steps[i].args
    for key, values in changes.items():
        assert len(values) == len(shown["data"])
        for trace, value in zip(shown["data"], values, strict=True):
            put(trace, key, value)
    for key, value in look.items():
        put(shown["layout"], key, value)
    return shown


def told(data):
    "Leaves that say something: null is as good as nothing."
    return {k: json.loads(json.dumps(v)) for k, v in leaves(data).items() if v is not None}


def test_every_step_leads_to_its_figure_from_wherever_one_comes(gap):
    figure = gap_story(gap, 0.0)
    for i, x in enumerate(gap.xs[:2]):
        shown, whole = after(figure, i), curve_spec(gap, x, 0.0)
        for trace, wanted in zip(shown["data"], whole["data"], strict=True):
            assert told(trace) == told(wanted)
        assert told(shown["layout"])["xaxis.title.text"] == whole["layout"]["xaxis"]["title"]["text"]
        assert shown["layout"]["shapes"] == json.loads(json.dumps(whole["layout"]["shapes"]))
    titles = [after(figure, i)["layout"]["title"]["text"] for i in range(2)]
    assert "retain ×1.50" in titles[0] and "SUCCESS" in titles[1]


def test_what_is_not_measured_is_not_in_the_story(gap):
    assert [s.label for s in gap_story(gap).layout.sliders[0].steps] == ["2", "3.5"]
    with pytest.raises(ValueError, match="no column measured"):
        gap_story(Gap(gap.policy, gap.xs, gap.alphas, gap.control, gap.reference))


def test_a_layer_under_its_ratio(real_weight):
    w = real_weight[:40]
    look = {"group_size": "row", "scale": "ratio", "density": 0.02}
    rulers = {f"{r:g}": ruler(dissect(w, OrthoConfig(scale_args={"r": r}, **look))) for r in (2.0, 3.5, 7.0)}
    figure = ruler_story(rulers, "ratio R", "3.5")
    assert figure.layout.sliders[0].active == 1
    for i, r in enumerate(rulers.values()):
        shown = after(figure, i)
        heights = [0 if y is None else y for y in shown["data"][0]["y"]]
        assert heights == r.weights.tolist() and sum(heights) == w.numel()
        assert shown["layout"]["title"]["text"] == figure_ruler(r).layout.title.text
    assert len(Story(figure, "a layer")._repr_html_()) < 60_000


def test_packed_arrays_are_unpacked():
    z = np.array([[1.0, np.nan], [3.0, 4.0]])
    packed = go.Figure(go.Heatmap(z=z)).to_plotly_json()["data"][0]
    assert packed["z"]["shape"] == "2, 2" and leaves(packed)["z"] == [[1.0, None], [3.0, 4.0]]


def test_positions_must_be_of_one_figure():
    bar = {"data": [{"type": "bar", "y": [1]}], "layout": {}}
    with pytest.raises(ValueError, match="start must be one of a, b, got 'c'"):
        story({"a": bar, "b": bar}, "x", "c")
    with pytest.raises(ValueError, match="positions have 0 to 1 traces"):
        story({"a": bar, "b": {"data": [], "layout": {}}}, "x", "a")


def test_text_cannot_leave_the_page():
    wicked = "</script><script>alert(1)</script>"
    bar = {"data": [{"type": "bar", "y": [1], "name": wicked}], "layout": {}}
    page = Story(story({"a": bar, wicked: bar}, "x", "a"), '"><b>')._repr_html_()
    assert page.count("<script") == page.count("</script") == 1 and "<b>" not in page
    assert page == Story(story({"a": bar, wicked: bar}, "x", "a"), '"><b>')._repr_html_()
    assert re.search(r"cdn\.plot\.ly/plotly-[\d.]+\.min\.js", page)
