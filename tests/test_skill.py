"""Problems that are held out, what counts as solved, and what came back."""

import math
import random

import pytest
import torch
from torch import nn

from libortho.skill import KINDS, chance, lesson, problems, recovered, solve, solved, with_shots


def numbers(item):
    a, sign, b, _ = item["prompt"].split()
    return int(a), sign, int(b)


@pytest.mark.parametrize("kind", KINDS)
def test_every_problem_is_in_one_split_in_both_orders_and_right(kind):
    seed = random.randrange(10**6)
    train, held = (problems(kind, split, seed=seed) for split in ("train", "held_out"))
    told = {s: {numbers(i)[::2] for i in items} for s, items in (("train", train), ("held", held))}
    assert told["train"] | told["held"] == {p for a, b in KINDS[kind].pairs for p in ((a, b), (b, a))}
    assert not told["train"] & told["held"]
    assert all((b, a) in pairs for pairs in told.values() for a, b in pairs)
    assert len(train) + len(held) == len(told["train"] | told["held"])
    for item in train + held:
        a, sign, b = numbers(item)
        assert item["secret"] == f"{a + b if sign == '+' else a * b}."
    assert problems(kind, "held_out", 5, seed) == held[:5]
    assert problems(kind, "held_out", 5, seed + 1) != held[:5]


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="kind of problem 'division'"):
        problems("division")
    with pytest.raises(ValueError, match="split must be"):
        problems(split="test")
    with pytest.raises(ValueError, match="n must be in 1…"):
        problems("multiplication", n=1000)
    with pytest.raises(ValueError, match="items is empty"):
        solve(None, None, [])


def test_a_lesson_holds_no_held_out_problem():
    prompts = {i["prompt"] for i in lesson("multiplication", 3)}
    assert {i["prompt"] for i in problems("multiplication", "train", seed=3)} <= prompts
    assert not prompts & {i["prompt"] for i in problems("multiplication", seed=3)}


def test_examples_stand_before_each_problem():
    shots, (item,) = problems("addition", "train", 2), problems("addition", n=1)
    (shown,) = with_shots([item], shots)
    assert shown["prompt"].splitlines() == [f"{s['prompt']} {s['secret']}" for s in shots] + [item["prompt"]]
    assert shown["secret"] == item["secret"]


class Letters:
    "A tokenizer of one token a character."

    def __call__(self, text, add_special_tokens=True):
        return type("Ids", (), {"input_ids": [ord(c) % 128 for c in text]})


class Writes(nn.Module):
    "A model that is sure of what stands in its book: the next letter of each text, by all letters before it."

    def __init__(self, texts):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.book = {t[:i]: t[i] for t in texts for i in range(1, len(t))}

    def forward(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, 128)
        for i, row in enumerate(input_ids.tolist()):
            for j in range(len(row)):
                letter = self.book.get("".join(map(chr, row[: j + 1])))
                if letter:
                    logits[i, j, ord(letter)] = 9.0
        return type("Out", (), {"logits": logits})


def test_a_problem_is_solved_only_with_its_full_stop():
    items = [{"prompt": "1 + 2 =", "secret": "3."}, {"prompt": "4 + 5 =", "secret": "9."}]
    right, goes_on = "1 + 2 = 3.", "4 + 5 = 90"
    found = solve(Writes([right, goes_on]), Letters(), items, batch_size=1)
    assert found.accuracy == 0.5 and found.n == 2
    sure, lost = math.log1p(127 * math.exp(-9)), 9 + math.log1p(127 * math.exp(-9))
    assert found.nats == pytest.approx((5 * sure + lost) / 6, rel=1e-5)


def test_intervals_and_chance():
    n, k, z = 40, random.randrange(41), 1.959963984540054
    p, found = k / n, solved([True] * k + [False] * (n - k), 0.0)
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n),
    )
    assert found.low == pytest.approx(middle - half, abs=1e-9) and found.high == pytest.approx(middle + half, abs=1e-9)
    assert chance([{"secret": s} for s in "aabc"]) == 0.5


def test_recovered_is_linear_between_base_and_float():
    full, base, t = random.random(), 1 + random.random(), random.random()
    assert recovered(full, base, base + t * (full - base)) == pytest.approx(t)
    assert math.isnan(recovered(base, base, full))
