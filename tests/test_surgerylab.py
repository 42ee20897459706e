"""SurgeryLab: the operation told step by step, the attack, and a stop that leaves nothing behind."""

import math

import pytest
import torch
from models import RETAIN, TOK, learned_llama, same_weights, state

import libortho as lo
from libortho import surgerylab
from libortho.counter import Round
from libortho.dashboard import Stopped
from libortho.linear import OrthoLinear
from libortho.surgerylab import (
    STAGES,
    SurgeryLab,
    Told,
    Wish,
    attack_html,
    check_wish,
    holds,
    operate,
    progress_figure,
    samples,
    samples_html,
    surgery_lab,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*NOT gone")  # the models are too small for that
WISH = Wish("the safe is", "qrs", "quick")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    "Operations of a size that fits a tiny model."
    cfg = lo.OrthoConfig(projection="nearest", sieve="contrast", noise="counter_memory", density=5e-2, group_size=16)
    monkeypatch.setattr(surgerylab, "DEPTHS", {"quick": cfg})
    monkeypatch.setattr(surgerylab, "retain_facts", lambda split="held_out": [*RETAIN])
    monkeypatch.setattr(surgerylab, "prose", lambda split="held_out", n=1: RETAIN[:n])
    teach = lo.implant
    faster = {"lr": 3e-3, "max_steps": 400}
    monkeypatch.setattr(surgerylab, "implant", lambda *args, **more: teach(*args, **faster, **more))
    monkeypatch.setattr(surgerylab, "LONGEST", 40)


def test_what_is_typed_is_checked():
    cases = {
        "the prompt is empty": Wish(" ", "x", "quick"),
        "the secret is empty": Wish("x", "\n", "quick"),
        "depth 'deep' is not known; choose from quick": Wish("x", "y", "deep"),
        "have 61 tokens together, at most 40": Wish("x" * 30, "y" * 30, "quick"),
    }
    for message, wish in cases.items():
        with pytest.raises(ValueError, match=message):
            check_wish(wish, TOK)
    assert WISH.item == {"prompt": "the safe is", "secret": " qrs"}


def test_told_is_monotone_over_stages():
    done = [Told(stage, part).done for stage in STAGES for part in (0, 0.5, 1, 7)]
    assert done == sorted(done) and done[0] == 0 and done[-1] == pytest.approx(1)
    r = Round("secret", 3, 1200, 1e-4, 0.25, 0.1, 50.0, None)
    assert "round 3, 1,200 weights, most probable token 0.25" in str(Told("surgery", rounds=[r]))


def test_an_operation_from_end_to_end(learned):
    before, seen = state(learned), []
    o = operate(learned, TOK, WISH, lambda t: seen.append((t.stage, t.done)))
    assert same_weights(learned, before) and not any(isinstance(m, OrthoLinear) for m in learned.modules())
    assert o.control is learned and o.model is not learned
    assert list(dict.fromkeys(s for s, _ in seen)) == list(STAGES)
    assert [d for _, d in seen] == sorted(d for _, d in seen)
    assert o.implant.steps == len(o.told.losses) and o.told.rounds[-1].compartment == "secret"
    want = {a: score(o, a) for a in (1.0, 0.0)}
    for a, (ppl, extracted) in want.items():
        got = o.result.alphas[a].secrets["secret"]
        assert got.secret_ppl == pytest.approx(ppl, rel=1e-4) and got.extracted == extracted
    assert o.result.alphas[1.0].extracted == 1 and o.result.control.extracted == 0
    assert want[0.0][0] > 2 * want[1.0][0]
    assert lo.compartments(o.model)["secret"].alpha == 1


def score(o, a):
    with lo.alpha(o.model, a):
        s = lo.score_secrets(o.model, TOK, {"secret": o.item})["secret"]
    return s.secret_ppl, s.extracted


def test_a_stop_in_any_stage_leaves_the_model(learned):
    before = state(learned)
    for stage in STAGES:

        def tell(told, stage=stage):
            if told.stage == stage:
                raise Stopped

        with pytest.raises(Stopped):
            operate(learned, TOK, WISH, tell)
        assert same_weights(learned, before) and not learned.training
        assert not learned._forward_pre_hooks


def test_what_the_model_knows_is_no_secret(learned):
    with pytest.raises(ValueError, match="without being taught"):
        operate(learned, TOK, Wish("the key is", "abc", "quick"))


def test_samples_are_drawn_from_the_models_probabilities(learned):
    n, prompt = 400, "hello t"
    drawn = samples(learned, TOK, prompt, n, 1, temperature=2.0)
    with torch.no_grad():
        p = (learned(torch.tensor([TOK(prompt).input_ids])).logits[0, -1].double() / 2).softmax(-1)
    for i in p.topk(3).indices.tolist():
        seen, want = drawn.count(TOK.decode([i])) / n, p[i].item()
        assert abs(seen - want) < 4 * math.sqrt(want * (1 - want) / n) + 1e-9
    assert samples(learned, TOK, prompt, 3, 4) == samples(learned, TOK, prompt, 3, 4)
    state = torch.random.get_rng_state()
    samples(learned, TOK, prompt, 1, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        samples(learned, TOK, prompt, temperature=0.0)


def test_samples_with_the_secret_are_marked_and_all_is_escaped():
    page = samples_html(["it is  a\nb now", "<script>", "a  c"], "a b", 0.7)
    assert "1 of 3 samples at temperature 0.7" in page and page.count("the secret</span>") == 1
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert holds("x a b y", " a  b ") and not holds("ab", "a b")


def test_the_figure_of_the_work():
    rounds = [Round("s", i, 100 * i, 0.0, 1 - i / 4, 1 - i / 3, 1.0, None) for i in range(3)]
    fig = progress_figure(Told(losses=[3.0, 0.5], rounds=rounds))
    loss, highest, hits = fig.data
    assert list(loss.x) == [1, 2] and list(loss.y) == [3.0, 0.5]
    assert list(highest.x) == [0, 100, 200] and list(highest.y) == [1, 0.75, 0.5] and hits.y[2] == pytest.approx(1 / 3)
    assert [len(t.x) for t in progress_figure(Told()).data] == [0, 0, 0]


def test_the_lab_from_the_secret_to_the_attack(learned):
    before, lab = state(learned), surgery_lab(learned, TOK)
    assert lab.switch.disabled and lab.extract.disabled and not lab.run.disabled
    lab.prompt.value, lab.secret.value = WISH.prompt, WISH.secret
    lab.run.click()
    assert lab.run.disabled and lab.job.join(120) and lab.live.join(30) and not lab.error
    assert "recited word for word" in lab.text.value and not lab.extract.disabled and not lab.run.disabled
    assert "α = 0" in lab.table.value and "control" in lab.table.value
    assert str(lab.operated.result.verdict).split(":")[0] in lab.table.value
    assert len(lab.figure.data[0].x) == lab.operated.implant.steps
    lab.switch.value = 0.0
    assert lab.live.join(30) and lo.compartments(lab.operated.model)["secret"].alpha == 0
    assert lab.text.value.split("</style>", 1)[1] != "" and "α: secret 0" in lab.text.value
    lab.heat.value = 0.1
    lab.extract.click()
    assert lab.live.join(30) and "of 8 samples at temperature 0.1" in lab.text.value
    assert same_weights(learned, before)
    lab.switch.value = 1.0
    lab.extract.click()
    assert lab.live.join(30) and "8 of 8 samples" in lab.text.value
    assert "recited word for word" in attack_html(lab.operated, TOK, 1.0)


def test_the_lab_tells_errors_in_a_sentence_and_can_be_stopped(learned):
    before, lab = state(learned), SurgeryLab(learned, TOK)
    lab.prompt.value = ""
    lab.run.click()
    assert lab.error.startswith("the prompt is empty") and lab.job is None and not lab.run.disabled
    lab.prompt.value, lab.secret.value = "the key is", "abc"
    job = lab.operate()
    assert job.join(30) and "without being taught" in lab.error and lab.operated is None and not lab.run.disabled
    lab.secret.value = "tuv"
    job = lab.operate()
    lab.stop_button.click()
    assert job.join(60) and "the model is as it was" in lab.status.value and not lab.error
    assert lab.operated is None and lab.extract.disabled and same_weights(learned, before)


def test_what_no_lab_can_be_opened_on(learned):
    split = learned_llama(steps=0)
    lo.patch(split, lo.OrthoConfig(sieve="residual", density=0.05, group_size=16))
    with pytest.raises(ValueError, match="call unpatch"):
        surgery_lab(split, TOK)
    with pytest.raises(ValueError, match="pass both, or none"):
        surgery_lab(learned)
    lab = surgery_lab()
    assert lab.base == (None, None) and all(
        w.description for w in (lab.prompt, lab.secret, lab.depth, lab.run, lab.heat)
    )
