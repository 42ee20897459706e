"""Tokens and their colours, and the curves, against plain references."""

import html
import math
import re

import pytest
import torch
from models import RETAIN, SECRETS, TOK, learned_llama

import libortho as lo
from libortho.evaluate import GATES
from libortho.memory import say, score_tokens
from libortho.tokens import (
    LEVELS,
    Point,
    TokenRow,
    alpha_figure,
    alpha_story,
    continue_row,
    level,
    pieces_of,
    point_from,
    token_row,
    token_rows,
    tokens_html,
    tokens_table,
)

MULTIBYTE = "Tromsø 🧪, don't\n  né"


@pytest.fixture(scope="module")
def llama():
    model = learned_llama()
    lo.patch(model, lo.OrthoConfig(sieve="residual", density=0.05, noise="none", group_size=16))
    return model


def test_pieces_are_the_text_in_real_and_small_vocabularies(real):
    tok = real[1]
    for text in (MULTIBYTE, "plain words", "🧪🧪", " leading"):
        ids = tok(text).input_ids
        pieces = pieces_of(tok, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text and not any("\ufffd" in p for p in pieces)
    assert pieces_of(TOK, TOK("abc").input_ids) == ["a", "b", "c"]
    assert pieces_of(tok, tok("🧪").input_ids[:1]) == [""]  # half a character is no text


def test_a_row_holds_each_tokens_probability(llama):
    item = SECRETS["key"]
    row = token_row(llama, TOK, item, "now")
    ids = torch.tensor([TOK(row.text).input_ids])
    with torch.no_grad():
        p = llama(ids).logits[0].double().softmax(-1)
    start = len(item["prompt"])
    assert row.text == "the key is abc" and all(math.isnan(x) for x in row.p[:start])
    want = [p[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])]
    assert row.p[start:] == pytest.approx(want, abs=1e-5)


def test_rows_at_two_positions_differ_and_the_switch_stays(llama):
    with lo.alpha(llama, 0.25):
        on, off = token_rows(llama, TOK, SECRETS["key"])
        assert lo.compartments(llama)["memory"].alpha == 0.25
    assert (on.label, off.label) == ("α = 1", "α = 0") and on.pieces == off.pieces and on.p != off.p


def test_a_continuation_is_greedy_and_can_be_cut(llama):
    row = continue_row(llama, TOK, "the key is", 6)
    assert row.text == say(llama, TOK, "the key is", 6)
    ids = TOK("the key is").input_ids
    for piece, p in zip(row.pieces, row.p, strict=True):  # one pass a token, without a cache
        with torch.no_grad():
            here = llama(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        assert p == pytest.approx(here.max().item(), abs=1e-5)
        ids = [*ids, here.argmax().item()]
        assert TOK.decode(ids[-1:]) == piece
    asked = []
    cut = continue_row(llama, TOK, "the key is", 6, enough=lambda: asked.append(1) or len(asked) == 2)
    assert cut.pieces == row.pieces[:2]


def test_a_prompt_that_cannot_be_continued(llama):
    with pytest.raises(ValueError, match="the prompt is empty"):
        continue_row(llama, TOK, " \n")
    room = llama.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"has {room} tokens and 20 more .* reads {room}; shorten it"):
        continue_row(llama, TOK, "x" * room)


def test_colours_have_steps_and_an_alternative_in_words():
    row = TokenRow("α = 1", ["given", " a", "\n", "", "b"], [math.nan, 0.95, 0.5, 0.02, 0.0])
    page = tokens_html([row])
    shown = re.findall(r"<span class='(lo-[^']*)' title='([^']*)'>([^<]*)</span>", page)
    assert shown == [
        ("lo-given", "given", "given"),
        ("lo-p lo-p0", "probability 0.95", " a"),
        ("lo-p lo-p1", "probability 0.5", "↵"),
        ("lo-p lo-p3", "probability 0.02", "·"),
        ("lo-p lo-p4", "probability 0", "b"),
    ]
    assert all(html.escape(text) in page for _, text in LEVELS) and "α = 1: given a" in page
    assert "lo-legend" not in tokens_html([row], legend=False).split("</style>")[1]
    assert [level(p) for p in (1, 0.9, 0.899, 0.5, 0.1, 0.0999, 0.01, 0.009, 0)] == [0, 0, 1, 1, 2, 3, 3, 4, 4]


def test_nothing_from_a_model_is_html():
    bad = "<img src=x onerror='alert(1)'>\""
    page = tokens_html([TokenRow(bad, [bad, bad], [0.5, math.nan])]) + tokens_table([TokenRow(bad, [bad], [0.5])])
    assert "<img" not in page and page.count("&lt;img") >= 4
    label = re.search(r'aria-label="([^"]*)"', page).group(1)  # the quote in the text does not end the attribute
    assert html.unescape(label) == f"{bad}: {bad}{bad}"


def test_points_against_measure(llama):
    retain = [*RETAIN, "one more"]
    scores = dict(zip(SECRETS, score_tokens(llama, TOK, list(SECRETS.values())), strict=True))
    got = point_from(scores, score_tokens(llama, TOK, retain))
    want = Point.of(lo.measure(llama, TOK, SECRETS, retain, RETAIN))
    assert got.secret_ppl == pytest.approx(want.secret_ppl, rel=1e-5)
    assert got.memorisation == want.memorisation and got.retain_ppl == pytest.approx(want.retain_ppl, rel=1e-4)
    assert got.recited(["key"]) == lo.score_secrets(llama, TOK, SECRETS)["key"].extracted
    assert got.mean_ppl(SECRETS) == pytest.approx(math.sqrt(math.prod(got.secret_ppl.values())))


POINTS = {
    0.0: Point({"a": 100.0, "b": 400.0}, {"a": 0.1, "b": 0.2}, 10.3),
    1.0: Point({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, 10.0),
    0.5: Point({"a": 4.0, "b": 9.0}, {"a": 1.0, "b": 0.5}, 10.1),
}
CONTROL = Point({"a": 50.0, "b": 200.0}, {"a": 0.0, "b": 0.0}, 30.0)


def test_the_figure_shows_curves_control_bands_and_the_switch():
    fig = alpha_figure(POINTS, CONTROL, [0.25])
    bold = fig.data[0]
    assert list(bold.x) == [0, 0.5, 1] and list(bold.y) == pytest.approx([200, 6, 1])
    assert list(bold.marker.symbol) == ["circle-open", "circle", "circle"]  # "a" is still recited at 0.5
    levels = [t for t in fig.data if t.name == "control"]
    assert [t.y[0] for t in levels] == [pytest.approx(100), 30]
    wanted = [s for s in fig.layout.shapes if s.name == "wanted"]
    assert (wanted[0].y0, wanted[0].y1) == pytest.approx((100 / GATES["overshoot"], 100 * GATES["overshoot"]))
    assert wanted[1].y1 == pytest.approx(10 * GATES["retain_ratio"])
    assert [s.x0 for s in fig.layout.shapes if s.name == "switch"] == [0.25]
    assert fig.layout.yaxis.type == fig.layout.yaxis2.type == "log"


def test_the_figure_of_one_switch_and_of_nothing():
    fig = alpha_figure(POINTS, CONTROL, [0.0, 1.0, 1.0], ["b"], "b, others on")
    assert list(fig.data[0].y) == pytest.approx([400, 9, 1]) and fig.data[0].marker.symbol[1] == "circle-open"
    assert [s.x0 for s in fig.layout.shapes if s.name == "switch"] == [0.0, 1.0]
    assert "b, others on" in fig.layout.xaxis2.title.text
    empty = alpha_figure({})
    assert len(empty.data) > 0 and not empty.layout.shapes


def test_the_story_steps_through_the_positions():
    fig = alpha_story(POINTS, {0.0: "<nothing>", 0.5: "half", 1.0: "all"}, CONTROL)
    (slider,) = fig.layout.sliders
    assert [s.label for s in slider.steps] == ["0", "0.5", "1"] and slider.active == 2
    first = slider.steps[0].args[0]
    line = next(i for i, s in enumerate(fig.layout.shapes) if s.name == "switch")
    assert first == {f"shapes[{line}].x0": 0.0, f"shapes[{line}].x1": 0.0, "title.text": "α = 0: &lt;nothing&gt;"}
    assert fig.layout.title.text == "α = 1: all" and fig.layout.shapes[line].x0 == 1.0
