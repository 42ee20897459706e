"""What an attacker learns from scores: against transformers' own samplers, brute force, and simulation."""

import math
import zlib

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

from libortho import privacy
from libortho.data import _KINDS, draw_canaries, draw_secrets, secret_bits
from libortho.memory import TokenScores


class Words:
    "A tokenizer of single letters, for models of 256 tokens."

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [ord(c) % 256 for c in text]
        return type("Encoded", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})()


@pytest.fixture
def rng():
    return np.random.default_rng()


# --- asking often


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, None), (1.0, 5), (1.7, 40), (0.5, 1)])
def test_samplers_agree_with_transformers(temperature, top_k):
    logits, target = torch.randn(30, 64) * 3, torch.randint(64, (30,))
    warped = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    want = warped.log_softmax(1)[torch.arange(30), target]
    got = privacy.sampling_logp(logits, target, temperature, top_k)
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.allclose(got[got.isfinite()], want[want.isfinite()], atol=1e-5)


def test_the_probability_of_a_secret_is_how_often_it_is_drawn(tiny):
    "8000 drawings of two tokens from the three most probable, by transformers' own generate."
    torch.manual_seed(0)
    tiny.lm_head.weight.data *= 20  # so that the distribution is not flat
    prompt, n = torch.tensor([[5, 9, 77]]), 8000
    options = {"do_sample": True, "top_k": 3, "temperature": 0.8, "max_new_tokens": 2}
    drawn = tiny.generate(prompt.expand(n, -1), **options, pad_token_id=0, eos_token_id=None)[:, 3:]
    for secret in drawn[:3]:
        ids = torch.cat([prompt[0], secret])
        with torch.no_grad():
            logits = tiny(ids[None]).logits[0]
        p = privacy.sampling_logp(logits[2:4], secret, 0.8, 3).sum().exp().item()
        hits = int((drawn == secret).all(1).sum())
        assert stats.binomtest(hits, n, p).pvalue > 1e-6, (hits / n, p)


def test_attempts_are_the_first_number_that_does():
    for p_z in (0.9, 0.5, 0.03, 1e-3):
        for p in (0.5, 0.9, 0.99):
            n = math.ceil(10 ** privacy.log10_attempts(math.log(p_z), p) - 1e-9)
            assert 1 - (1 - p_z) ** n >= p - 1e-12 and (n == 1 or 1 - (1 - p_z) ** (n - 1) < p)


def test_attempts_far_away_and_close_by():
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    for logp in (-1e-17, -1e-9, -0.5, -0.6931, -0.6932, -20.0, -60.0, -120.0):
        p_z = Decimal(logp).exp()
        n = Decimal("0.1").ln() / (1 - p_z).ln()
        assert math.isclose(privacy.log10_attempts(logp, 0.9), max(0.0, float(n.log10())), rel_tol=1e-9, abs_tol=1e-12)
    gap = privacy.log10_attempts(-701.0) - privacy.log10_attempts(-699.0)
    assert math.isclose(gap, 2 / math.log(10), rel_tol=1e-9)
    assert privacy.log10_attempts(0.0) == 0 and privacy.log10_attempts(-math.inf) == math.inf


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"temperature": -1}, {"top_k": 0}])
def test_samplers_that_cannot_be(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        privacy.sampling_logp(torch.randn(2, 8), torch.tensor([1, 2]), **bad)


@pytest.mark.parametrize("p", [0, 1, 1.5])
def test_certainty_takes_no_number_of_attempts(p):
    with pytest.raises(ValueError, match="p must be in"):
        privacy.log10_attempts(-1.0, p)


# --- one pass


def test_a_profile_token_by_token():
    logits, target = torch.randn(7, 50) * 4, torch.randint(50, (7,))
    logits[2, :30] = -torch.inf
    target[2] = 40
    x = privacy.token_profile(logits, target)
    for i in range(7):
        p = logits[i].double().softmax(0)
        alive = p > 0
        p, logs = p[alive], p[alive].log()
        mean = sum(a * b for a, b in zip(p.tolist(), logs.tolist(), strict=True))
        var = sum(a * (b - mean) ** 2 for a, b in zip(p.tolist(), logs.tolist(), strict=True))
        assert math.isclose(x.mean[i], mean, rel_tol=1e-4) and math.isclose(x.std[i], var**0.5, rel_tol=1e-3)
        assert math.isclose(x.logp[i], logits[i].double().log_softmax(0)[target[i]], rel_tol=1e-5, abs_tol=1e-5)


def test_profiles_do_not_depend_on_the_batch(tiny):
    items = [{"prompt": "a" * k, "secret": "bcdefg"[: 1 + k % 5]} for k in range(1, 12)] + ["a plain text", "xy"]
    alone = [privacy.profiles(tiny, Words(), [i])[0] for i in items]
    for batch_size in (1, 4, 99):
        for a, b in zip(alone, privacy.profiles(tiny, Words(), items, batch_size=batch_size), strict=True):
            assert a.text == b.text and a.secret == b.secret and a.start == b.start
            assert torch.allclose(a.logp, b.logp, atol=1e-5) and torch.allclose(a.std, b.std, atol=1e-4)
    part = alone[3].only_secret()
    assert part.text == "bcdef" and len(part.logp) == 6  # with its space
    assert math.isclose(privacy.secret_logp(alone[3])["T 1"], alone[3].logp[-6:].sum(), rel_tol=1e-4)
    assert len(alone[-2].only_secret().logp) == len(alone[-2].logp) == len("a plain text") - 1


def test_a_text_of_one_token_is_refused(tiny):
    with pytest.raises(ValueError, match="fewer than two tokens"):
        privacy.profiles(tiny, Words(), ["fine", "x"])


# --- ranking guesses


def test_candidates_behind_one_prompt_score_as_they_do_alone(tiny):
    candidates = ["one", "two words", "x", "a longer one than these", "two word"]
    for batch_size in (1, 2, 32):
        got = privacy.continuation_logp(tiny, Words(), "some prompt ", candidates, batch_size)
        for c, value in zip(candidates, got, strict=True):
            ids = torch.tensor([[ord(x) for x in "some prompt " + c]])
            with torch.no_grad():
                logp = tiny(ids).logits[0].log_softmax(1)
            want = sum(logp[i - 1, ids[0, i]].item() for i in range(len("some prompt"), ids.shape[1]))
            assert math.isclose(value, want, rel_tol=1e-4, abs_tol=1e-3)


def test_exposure_by_hand(rng):
    others = rng.normal(size=99)
    for x in (*rng.normal(size=5), 99.0, -99.0):
        rank = 1 + sum(o > x for o in others)
        assert math.isclose(privacy.exposure(x, list(others)), math.log2(100) - math.log2(rank))
    assert privacy.exposure(1.0, [1.0, 1.0, 0.0]) == math.log2(4 / 2)  # two ties: the second place
    with pytest.raises(ValueError, match="others is empty"):
        privacy.exposure(1.0, [])


def test_a_secret_like_any_other_has_one_bit_at_the_median(rng):
    draws = rng.normal(size=(2000, 64))
    found = [privacy.exposure(row[0], row[1:]) for row in draws]
    assert abs(np.median(found) - 1) < 0.15 and max(found) == 6 and min(found) == 0


def test_the_level_of_the_peers_is_what_they_get_and_never_above_the_control(tiny):
    forget = {"a": {"prompt": "some prompt", "secret": "hidden"}, "b": {"prompt": "another", "secret": "thing"}}
    peers = {"a": ["broken", "silver"], "b": ["words", "of", "all sizes"]}
    means = {n: np.mean(privacy.continuation_logp(tiny, Words(), i["prompt"], peers[n])) for n, i in forget.items()}
    for height in (-1.0, -50.0):  # a control far above the peers, and far below
        control = {n: [TokenScores(height - torch.rand(7 - (n == "b")), torch.zeros(7, dtype=bool))] for n in forget}
        found = privacy.peer_levels(tiny, Words(), forget, control, peers, spare=0.0)
        for n, (level,) in found.items():
            drop = control[n][0].logp - level.logp
            assert torch.allclose(drop, drop[0], atol=1e-4) and drop[0] >= 0 and level.top is control[n][0].top
            assert math.isclose(level.logp.sum(), means[n] if height == -1 else control[n][0].logp.sum(), rel_tol=1e-4)
        spared = privacy.peer_levels(tiny, Words(), forget, control, peers)["a"][0].logp
        assert torch.allclose(found["a"][0].logp - spared, torch.tensor(math.log(2)), atol=1e-4)


@pytest.mark.parametrize("kind", _KINDS)
def test_candidates_are_of_the_kind_and_never_the_secret(kind):
    own = {n.split("-")[0]: i for n, i in draw_canaries(4, 3).items()}[kind]["secret"]
    found = draw_secrets(kind, 300, 5, own)
    assert len(set(found)) == 300 and own not in found
    assert found == draw_secrets(kind, 300, 5, own) != draw_secrets(kind, 300, 6, own)
    first = draw_secrets(kind, 1, 5)[0]
    assert first not in draw_secrets(kind, 300, 5, first)
    assert {len(x.split()) for x in found} == {len(own.split())}


def test_the_bits_of_a_secret_are_the_sizes_of_its_lists():
    assert math.isclose(secret_bits("number"), 16 * math.log2(10))
    assert math.isclose(secret_bits("password"), math.log2(12 * 12 * 100 * 10 * 12))
    for call in (secret_bits, lambda kind: draw_secrets(kind, 3)):
        with pytest.raises(ValueError, match="kind 'riddle' is not known"):
            call("riddle")
    with pytest.raises(ValueError, match="n must be in"):
        draw_secrets("sentence", 10**6)


# --- telling members


def test_attacks_by_hand():
    logp, text = -torch.rand(23) * 9, "a text of some length, a text of some length"
    x = privacy.Profile(text, logp, torch.full((23,), -3.0), torch.full((23,), 2.0), {})
    found = {n: s[0] for n, s in privacy.membership([x]).items()}
    lowest = sorted(logp.tolist())[:4]  # a fifth of 23, rounded down
    assert math.isclose(found["loss"], sum(logp.tolist()) / 23, rel_tol=1e-5)
    assert math.isclose(found["zlib"], sum(logp.tolist()) / 23 / len(zlib.compress(text.encode())), rel_tol=1e-5)
    assert math.isclose(found["min-k"], sum(lowest) / 4, rel_tol=1e-5)
    assert math.isclose(found["min-k++"], (sum(lowest) / 4 + 3) / 2, rel_tol=1e-4)
    assert privacy.lowest_mean(torch.tensor([-1.0, -2.0])) == -2  # one token at least


def test_a_more_likely_text_scores_higher_in_every_attack():
    logits, target = torch.randn(20, 50), torch.randint(50, (20,))
    surer = logits.clone()
    surer[torch.arange(20), target] += 5
    low, high = (privacy.membership([privacy.token_profile(x, target, "text")]) for x in (logits, surer))
    assert all(high[n][0] > low[n][0] for n in privacy.ATTACKS)


def test_auc_against_every_pair(rng):
    a, b = rng.integers(0, 9, 17).tolist(), rng.integers(2, 11, 40).tolist()  # many ties
    want = sum((x > y) + (x == y) / 2 for x in a for y in b) / (17 * 40)
    found = privacy.auc(a, b)
    assert math.isclose(found.value, want) and found.low < want < found.high
    assert math.isclose(privacy.either_way(want), max(want, 1 - want))
    assert math.isclose(privacy.auc(b, a).value, 1 - want)


def test_intervals_hold_what_they_promise(rng):
    "Of 300 experiments, about 95 % of the intervals hold the truth, alone and as a difference."
    truth, alone, paired = stats.norm.cdf(0.7 / math.sqrt(2)), 0, 0
    second = stats.norm.cdf(0.7 / math.sqrt(2 + 2 * 0.25))  # the same scores with noise of variance 0.25 on each
    for _ in range(300):
        a, b = rng.normal(0.7, 1, 25), rng.normal(0, 1, 120)
        i = privacy.auc(a, b)
        alone += i.low <= truth <= i.high
        j = privacy.auc_difference(a, b, a + rng.normal(0, 0.5, 25), b + rng.normal(0, 0.5, 120))
        paired += j.low <= truth - second <= j.high
        assert j.high - j.low < i.high - i.low
    assert 260 <= alone <= 298 and 260 <= paired <= 298, (alone, paired)


def test_models_vouch_for_few_members(rng):
    "With 4 members each, Student's interval over 5 models holds its promise; DeLong's of one model does not."
    truth, several, single = stats.norm.cdf(0.7 / math.sqrt(2)), 0, 0
    for _ in range(300):
        found = [privacy.auc(rng.normal(0.7, 1, 4), rng.normal(0, 1, 120)) for _ in range(5)]
        i = privacy.over_models(found, bounds=(0, 1))
        several += i.low <= truth <= i.high
        single += found[0].low <= truth <= found[0].high
        assert i.value == pytest.approx(np.mean([x.value for x in found])) and 0 <= i.low <= i.value <= i.high <= 1
    assert 270 <= several <= 298 and single < 265, (several, single)
    assert privacy.over_models(found[:1]) is found[0]
    with pytest.raises(ValueError, match="found is empty"):
        privacy.over_models([])


def test_a_difference_of_a_model_with_itself_is_nothing(rng):
    a, b = rng.normal(size=9), rng.normal(size=30)
    same = privacy.auc_difference(a, b, a, b)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    reverse = privacy.auc_difference(a, b, -a, -b)
    assert math.isclose(reverse.value, 2 * privacy.auc(a, b).value - 1)


def test_finding_members_at_few_false_alarms(rng):
    members, others = rng.normal(1, 1, 40), rng.normal(0, 1, 200)
    for fpr in (0.01, 0.05, 0.5, 1.0):
        best = max(
            (np.mean(members > t) for t in (*others, -np.inf) if np.mean(others > t) <= fpr + 1e-12), default=0.0
        )
        assert privacy.tpr_at(members, others, fpr) == best
    assert privacy.tpr_at([1.0, 2.0], [1.0] * 100) == 0.5  # a tie with the threshold is not found
    with pytest.raises(ValueError, match="give 100 others or more"):
        privacy.tpr_at(members, others[:99])


@pytest.mark.parametrize(
    ("members", "others", "match"),
    [([1.0], [1.0, 2.0], "two members"), ([1.0, 2.0], [], "two others"), ([1.0, math.nan], [1.0, 2.0], "finite")],
)
def test_scores_that_tell_nothing(members, others, match):
    with pytest.raises(ValueError, match=match):
        privacy.auc(members, others)


def test_a_difference_needs_the_same_texts():
    with pytest.raises(ValueError, match="same texts"):
        privacy.auc_difference([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0, 3.0])
