import math

import pytest
from models import TOK
from scipy.stats import ks_2samp
from test_memory import naive

from libortho.benchmark import AnswerScores, answers, forget_quality, model_utility, rouge_recall, score_answers
from libortho.memory import encode

ITEM = {
    "prompt": "who is it",
    "secret": "old tom",
    "perturbed_answer": ["new tom", "a cat"],
    "paraphrased_answer": "tom, old",
}


def per_token_p(model, prompt, answer):
    t = encode(TOK, {"prompt": prompt, "secret": " " + answer})
    logs = [lp for lp, _ in naive(model, t.ids.tolist(), t.start)]
    return math.exp(sum(logs) / len(logs))


def test_scores_against_their_formulas(tiny):
    p = {a: per_token_p(tiny, "who is it", a) for a in ("old tom", "new tom", "a cat", "tom, old")}
    s = score_answers(tiny, TOK, [ITEM], generate=False)
    assert s.truth_ratio[0] == pytest.approx((p["new tom"] + p["a cat"]) / 2 / p["tom, old"], rel=1e-4)
    assert s.probability[0] == pytest.approx(p["old tom"], rel=1e-4) and s.rouge == [] and math.isnan(s.mean("rouge"))
    choice = {k: v for k, v in ITEM.items() if k != "paraphrased_answer"}
    s = score_answers(tiny, TOK, [choice], generate=False)
    wrong = p["new tom"] + p["a cat"]
    assert s.probability[0] == pytest.approx(p["old tom"] / (p["old tom"] + wrong), rel=1e-4)
    assert s.truth_ratio[0] == pytest.approx(wrong / 2 / p["old tom"], rel=1e-4)
    plain = score_answers(tiny, TOK, [{"prompt": "who is it", "secret": "old tom"}], generate=False)
    assert plain.truth_ratio == [] and math.isnan(plain.truth)


def test_answers_do_not_depend_on_the_batch(tiny):
    items = [{"prompt": p, "secret": "x" * n} for p, n in (("a", 3), ("a longer prompt", 30), ("mid", 7))]
    together = answers(tiny, TOK, items, at_least=2)
    assert together == [answers(tiny, TOK, [i], at_least=2)[0] for i in items]
    assert len(together[0]) <= 4 < len(together[1])


@pytest.mark.parametrize(
    "said, reference, want",
    [("the red fox", "the fox", 1), ("fox the", "the fox", 0.5), ("", "a", 0), ("The FOX!", "the fox", 1)],
)
def test_rouge_recall(said, reference, want):
    assert rouge_recall(said, reference) == want


def made(probability, rouge, truth):
    return AnswerScores([probability], [1.0], [1.0], [rouge] if rouge is not None else [], truth, 1.0)


def test_utility_and_quality():
    assert model_utility([made(0.5, 0.5, [0.5]), made(0.25, None, [])]) == pytest.approx(4 / (2 + 2 + 2 + 4))
    a, b = made(1, 1, [0.1, 0.2, 0.9]), made(1, 1, [0.3, 0.4, 0.5])
    assert forget_quality(a, b) == ks_2samp([0.1, 0.2, 0.9], [0.3, 0.4, 0.5]).pvalue and forget_quality(a, a) == 1
    assert made(1, 1, [0.5, 3.0]).truth == 0.25


def test_bad_input(tiny):
    with pytest.raises(ValueError, match="items is empty"):
        score_answers(tiny, TOK, [])
    with pytest.raises(ValueError, match="no wrong answers"):
        forget_quality(made(1, 1, []), made(1, 1, []))
