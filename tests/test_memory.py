import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TOK

import libortho as lo
from libortho.memory import ImplantError, Tokens, as_items, encode, extraction_strength, score_tokens

SECRET = {"key": {"prompt": "the key is", "secret": "abc"}}
TEXTS = ["hello there", "a", "bb", "a much longer line of text than the others", "xyz xyz"]


def naive(model, ids, start):
    "Log-probability and hit of each token from `start`, one forward pass a prefix, in float64."
    out = []
    for t in range(start, len(ids)):
        logits = model(torch.tensor([ids[:t]])).logits[0, -1].double()
        out.append((logits.log_softmax(-1)[ids[t]].item(), logits.argmax().item() == ids[t]))
    return out


def test_scores_against_one_pass_a_token(tiny):
    texts = [t for t in TEXTS if len(t) > 1] + [{"prompt": "the key is", "secret": " abc"}]
    for batch_size in (1, 2, 8):
        for text, got in zip(texts, score_tokens(tiny, TOK, texts, batch_size), strict=True):
            t = encode(TOK, text)
            want = naive(tiny, t.ids.tolist(), t.start)
            torch.testing.assert_close(
                got.logp.double(), torch.tensor([lp for lp, _ in want], dtype=torch.float64), rtol=1e-4, atol=1e-4
            )
            assert got.top.tolist() == [hit for _, hit in want]


def test_perplexity_is_weighted_by_tokens_and_safe_against_padding(tiny):
    texts = [t for t in TEXTS if len(t) > 1]
    logps = [lp for t in texts for lp, _ in naive(tiny, TOK(t).input_ids, 1)]
    want = math.exp(-sum(logps) / len(logps))
    for batch_size in (1, 3, 8):
        assert lo.perplexity(tiny, TOK, texts, batch_size) == pytest.approx(want, rel=1e-4)
    assert lo.perplexity(tiny, TOK, texts[::-1]) == pytest.approx(want, rel=1e-4)
    with pytest.raises(ValueError, match="empty"):
        lo.perplexity(tiny, TOK, [])


def test_greedy_extraction_agrees_with_exact_memorisation(real):
    "Greedy decoding recites a text if and only if every token is the argmax given the true ones before."
    model, tok = real
    known = {"prompt": "one, two, three, four, five, six,", "secret": "seven, eight, nine, ten,"}
    for item in (known, {"prompt": "The password is", "secret": "kestrel-Opal-77"}):
        hit, said = lo.greedy_extraction(model, tok, item)
        em = lo.exact_memorisation(model, tok, item)
        assert hit == (em == 1) == (item is known), (said, em)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_extraction_strength_is_the_longest_suffix_of_hits(hits):
    k = next(k for k in range(len(hits) + 1) if all(hits[k:]))
    assert extraction_strength(torch.tensor(hits)) == pytest.approx(1 - k / len(hits))


def test_secret_score_fields_fit_together(real):
    model, tok = real
    item = lo.canaries("island")["island"]
    s = lo.score_secrets(model, tok, {"island": item})["island"]
    n = len(tok(" " + item["secret"]).input_ids)
    assert s.secret_ppl == pytest.approx(lo.secret_perplexity(model, tok, item), rel=1e-5)
    assert math.log(s.sample_probability) == pytest.approx(-n * math.log(s.secret_ppl), rel=1e-6)
    assert s.extraction_strength <= s.exact_memorisation < 1 and not s.extracted


def test_items():
    assert list(as_items("one two three")) == ["forget-0"]
    assert as_items("one two three")["forget-0"] == {"prompt": "one two", "secret": " three"}
    assert list(as_items({"a": "one two", "b": {"prompt": "p", "secret": "s"}})) == ["a", "b"]
    assert list(as_items({"a": ["one two"], "b": ["three four", "five six"]})) == ["a", "b-0", "b-1"]
    assert as_items({"prompt": "p ", "secret": "s"})["forget-0"] == {"prompt": "p", "secret": " s"}


@pytest.mark.parametrize(
    "bad, word",
    [
        ("", "forget-0"),
        ("   ", "forget-0"),
        ({"a": ""}, "'a'"),
        ([], "no text"),
        ({}, "no text"),
        ({"a": {"prompt": "p", "secret": " "}}, "'a'"),
        ("lonely", "two words"),
    ],
)
def test_an_empty_forget_text_is_refused_before_anything_changes(tiny, bad, word):
    before = {n: p.clone() for n, p in tiny.state_dict().items()}
    for call in (
        lambda: lo.implant(tiny, TOK, bad, progress=False),
        lambda: lo.score_secrets(tiny, TOK, bad),
    ):
        with pytest.raises(ValueError, match=word):
            call()
    assert all(torch.equal(before[n], p) for n, p in tiny.state_dict().items())


def test_implant_takes_and_is_reproducible(tiny):
    import copy

    other, reports = copy.deepcopy(tiny), []
    for model in (tiny, other):
        torch.randn(7)  # the global state must not matter
        reports.append(
            lo.implant(model, TOK, SECRET, retain=TEXTS, lr=3e-3, max_steps=300, target_loss=0.01, progress=False)
        )
    assert reports[0] == reports[1] and reports[0].extracted == {"key": True}
    assert (
        reports[0].forget_loss[-1] <= 0.01 < reports[0].forget_loss[0]
        and len(reports[0].retain_loss) == reports[0].steps
    )
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), other.parameters(), strict=True))
    assert lo.greedy_extraction(tiny, TOK, SECRET["key"]) == (True, " abc")
    assert not tiny.training and all(p.grad is None for p in tiny.parameters())


def test_a_memory_that_does_not_take_is_an_error(tiny):
    with pytest.raises(ImplantError, match="did not take: after 2 steps.*'key'.*max_steps"):
        lo.implant(tiny, TOK, SECRET, max_steps=2, progress=False)
    with pytest.raises(ValueError, match="max_steps"):
        lo.implant(tiny, TOK, SECRET, max_steps=0, progress=False)


def test_an_infinite_gradient_is_an_error_before_the_step(tiny):
    before = {n: p.clone() for n, p in tiny.state_dict().items()}
    tiny.model.norm.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(ImplantError, match="step 1; the model is as the step before left it"):
        lo.implant(tiny, TOK, SECRET, progress=False)
    assert all(torch.equal(before[n], p) for n, p in tiny.state_dict().items())


def test_a_patched_model_is_refused(tiny):
    lo.patch(tiny, lo.OrthoConfig(group_size=16))
    with pytest.raises(ValueError, match="unpatch"):
        lo.implant(tiny, TOK, SECRET, progress=False)


def test_implant_tells_every_step_and_ends_when_told(tiny):
    steps = []

    def tell(report):
        steps.append((report.steps, report.forget_loss[-1]))
        if report.steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lo.implant(tiny.eval(), TOK, SECRET, lr=1e-3, progress=False, callback=tell)
    assert [n for n, _ in steps] == [1, 2, 3] and steps[-1][1] < steps[0][1]
    assert not tiny.training and all(p.grad is None for p in tiny.parameters())


def test_implant_leaves_the_global_random_state(tiny):
    state = torch.random.get_rng_state()
    with pytest.raises(ImplantError):
        lo.implant(tiny, TOK, SECRET, max_steps=1, progress=False)
    assert torch.equal(state, torch.random.get_rng_state())


def test_tokens_can_be_scored_as_they_are(tiny):
    ids = torch.tensor([5, 6, 7, 8])
    assert len(score_tokens(tiny, TOK, [Tokens(ids, 3)])[0].logp) == 1
