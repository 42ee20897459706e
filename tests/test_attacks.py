"""Attacks on a tiny model with random weights, against independent references."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from models import with_compartments
from scipy import stats

import libortho as lo
from libortho import attacks as at
from libortho.linear import OrthoLinear, fingerprint, ortho_layers
from libortho.privacy import area
from libortho.streams import compress


class Letters:
    "A tokenizer of single characters: codes 1 … 255, padding 0."

    pad_token_id, eos_token_id = 0, 0

    def __call__(self, text, return_tensors=None, padding=False, padding_side="right", add_special_tokens=True):
        from transformers import BatchEncoding

        rows = [[ord(c) % 256 for c in t] for t in ([text] if isinstance(text, str) else text)]
        if return_tensors is None:
            return BatchEncoding({"input_ids": rows[0] if isinstance(text, str) else rows})
        n = max(map(len, rows))
        fill = [[0] * (n - len(r)) for r in rows]
        ids = [f + r if padding_side == "left" else r + f for f, r in zip(fill, rows, strict=True)]
        seen = [[int(x > 0) for x in r] for r in ids]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)})

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["".join(chr(int(i)) for i in r) for r in rows]


TOK = Letters()
SECRETS = {"one": {"prompt": "the code is", "secret": "4 7 1 9"}, "two": {"prompt": "he hid it", "secret": "in a well"}}

split = partial(with_compartments, names=("repair", "first", "second"), noise="tri_state")


def logits(model, text="the code is"):
    with torch.no_grad():
        return model(TOK([text], return_tensors="pt").input_ids).logits


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.3, {"first": 0.0}, {"first": 0.5, "second": 0.25}])
def test_the_copy_is_the_model_at_alpha_and_leaves_it_alone(tiny, alpha):
    model = split(tiny)
    before = fingerprint(model)
    plain = at.dense_copy(model, alpha)
    assert not any(isinstance(m, OrthoLinear) for m in plain.modules()) and not hasattr(plain, "ortho_config")
    assert not any(a.data_ptr() == b.data_ptr() for a in plain.parameters() for b in model.parameters())
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and all(p.requires_grad for p in plain.parameters())
    assert fingerprint(model) == before
    with lo.alpha(model, alpha):
        assert torch.allclose(logits(plain), logits(model), atol=1e-5)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert fingerprint(model) == before


def test_the_copy_of_a_plain_model_is_a_copy(tiny):
    plain = at.dense_copy(tiny)
    assert plain is not tiny and torch.equal(logits(plain), logits(tiny))


def test_recovery():
    gen = np.random.default_rng(0)
    for off, gain, r in gen.uniform(0.1, 0.5, (20, 3)):
        assert at.recovery(off + r * gain, off, off + gain) == pytest.approx(r)
    assert math.isnan(at.recovery(0.5, 0.5, 0.55)) and at.recovery(0.0, 0.5, 1.0) == -1


def test_relearning_learns_and_is_repeatable(tiny):
    runs = [
        at.relearn(at.dense_copy(tiny), TOK, list(SECRETS.values()), SECRETS, 5e-3, 150, progress=False) for _ in "ab"
    ]
    assert runs[0] == runs[1] and set(runs[0]) == set(SECRETS)
    curves = list(runs[0].values())
    assert len({len(c) for c in curves}) == 1 and all(c[0] < 0.5 and c[-1] >= 0.99 for c in curves)
    assert max(at.steps_to(c) for c in curves) == len(curves[0]) - 1 < 150, "it stops when all are back"
    with pytest.raises(ValueError, match="dense_copy"):
        at.relearn(split(tiny), TOK, ["abc"], SECRETS)
    with pytest.raises(ValueError, match="at least one text"):
        at.relearn(at.dense_copy(tiny), TOK, [], SECRETS)


def test_training_on_one_secret_watches_the_other(tiny):
    curves = at.relearn(at.dense_copy(tiny), TOK, [SECRETS["one"]], {"two": SECRETS["two"]}, 1e-2, 3, progress=False)
    assert list(curves) == ["two"] and len(curves["two"]) == 4


def test_batches_take_every_text_before_any_comes_again():
    for n, size, steps in ((5, 2, 7), (3, 4, 5), (1, 1, 3)):
        batches = at._batches(n, size, steps, 0)
        assert len(batches) == steps and {len(b) for b in batches} == {min(n, size)}
        flat = sum(batches, [])
        assert all(sorted(flat[i : i + n]) == list(range(n)) for i in range(0, len(flat) - n + 1, n))


def test_normal_float_has_the_published_levels():
    "QLoRA, appendix E: the sixteen values, here to four places."
    want = "-1 -.6962 -.5251 -.3949 -.2844 -.1848 -.0911 0 .0796 .1609 .2461 .3379 .4407 .5626 .7230 1"
    assert torch.allclose(at.normal_float(4), torch.tensor([float(x) for x in want.split()]), atol=6e-5)
    assert len(at.normal_float(3)) == 8 and (at.normal_float(3) == 0).sum() == 1


@pytest.mark.parametrize("group_size", [8, "row", "tensor"])
def test_round_to_takes_the_nearest_level(group_size):
    gen = torch.Generator().manual_seed(1)
    w = torch.randn(6, 24, generator=gen)
    w[0] = 0
    levels = torch.rand(9, generator=gen).mul(2).sub(1).sort().values
    levels = torch.cat([torch.tensor([-1.0]), levels, torch.tensor([1.0])])
    blocks = {8: w.reshape(-1, 8), "row": w, "tensor": w.reshape(1, -1)}[group_size]
    top = blocks.abs().amax(1, keepdim=True)
    choice = (levels[:, None, None] * top).expand(-1, *blocks.shape)
    best = (choice - blocks).abs().argmin(0)
    want = choice.gather(0, best[None])[0].reshape(w.shape)
    got = at.round_to(w, levels, group_size)
    assert torch.allclose((got - w).abs(), (want - w).abs(), atol=1e-6) and torch.isfinite(got).all()
    assert group_size == "tensor" or got[0].abs().max() < 1e-6, "a block of zeros stays one"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_prune_cuts_the_smallest(share):
    w = torch.randn(17, 13, generator=torch.Generator().manual_seed(2))
    got, k = at.prune(w, share), int(share * w.numel())
    order = np.argsort(w.abs().flatten().numpy())
    assert not got.flatten()[order[:k]].any() and torch.equal(got.flatten()[order[k:]], w.flatten()[order[k:]])
    with pytest.raises(ValueError, match="0.3 cuts 30 %"):
        at.prune(w, 30)


def test_attacks_on_weights_change_the_copy_only(tiny):
    names = ["nearest, rows", "NF4, blocks of 64", "pruned, 30 %"]
    at.CHANGES["NF4, blocks of 16"] = lambda w: at.round_to(w, at.normal_float(), 16)
    try:
        for name in [names[0], "NF4, blocks of 16", names[2]]:
            copied = at.dense_copy(tiny)
            at.attack_weights(copied, TOK, name)
            a, b = (m.model.layers[0].mlp.up_proj.weight for m in (tiny, copied))
            assert 0 < (a - b).norm() < 0.6 * a.norm()
            assert torch.equal(tiny.model.embed_tokens.weight, copied.model.embed_tokens.weight)
    finally:
        del at.CHANGES["NF4, blocks of 16"]
    with pytest.raises(ValueError, match="not known.*NF4"):
        at.attack_weights(tiny, TOK, "NF3")


def test_a_gptq_attack_needs_texts_and_rounds(tiny):
    copied, cfg = at.dense_copy(tiny), lo.OrthoConfig(group_size=16, projection="gptq")
    at.requantise(copied, TOK, cfg, ["some text to calibrate on, long enough for a Hessian", "and another one"])
    w = copied.model.layers[1].mlp.down_proj.weight
    assert all(len(g.unique()) <= 15 for g in w.reshape(-1, 16))


def test_templates_ask_for_what_is_not_given():
    for item in (*lo.draw_canaries(8, 3).values(), *lo.canaries().values()):
        for name, make in at.PROMPTS.items():
            prompt, rest = make(item)
            assert rest.strip() and item["secret"].strip().endswith(rest.strip()), name
            assert at.longest_run(prompt, rest) < 1, f"{name} gives away what is asked for"
            given = len(at.words_of(item["secret"])) - len(at.words_of(rest))
            assert (given > 0) == name.endswith("given")
    assert at.as_question("The key is") == "Question: What is the key?\nAnswer:"


def test_longest_run_against_brute_force():
    gen = np.random.default_rng(0)
    for _ in range(200):
        a, b = (gen.integers(0, 3, gen.integers(1, 9)).astype(str).tolist() for _ in "ab")
        runs = [
            k
            for k in range(len(b) + 1)
            for i in range(len(b) - k + 1)
            for j in range(len(a) - k + 1)
            if a[j : j + k] == b[i : i + k]
        ]
        assert at.longest_run(" ".join(a), ", ".join(b).upper()) == max(runs) / len(b)


def test_continuations_do_not_depend_on_the_batch(tiny):
    prompts = ["a", "the code is", "he hid"]
    together = at.say_all(tiny, TOK, prompts, 6)
    assert (
        together
        == [at.say_all(tiny, TOK, [p], 6)[0] for p in prompts]
        == at.say_all(tiny, TOK, prompts, 6, batch_size=2)
    )
    ids = TOK(["the code is"], return_tensors="pt").input_ids
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, tiny(ids).logits[:, -1:].argmax(-1)], 1)
    assert together[1] == TOK.batch_decode(ids[:, 11:])


def test_samples_are_seeded_and_leave_the_generator_alone(tiny):
    state = torch.get_rng_state()
    draws = [at.say_all(tiny, TOK, ["a", "bc"], 5, 3, 1.5, seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert draws[0] == draws[1] != draws[2] and [len(d) for d in draws[0]] == [3, 3]
    with pytest.raises(ValueError, match="above 0"):
        at.ask_often(tiny, TOK, SECRETS, temperature=0.0)


def test_a_model_that_learned_it_is_caught_by_asking(tiny):
    knows = at.dense_copy(tiny)
    at.relearn(knows, TOK, list(SECRETS.values()), SECRETS, 1e-2, 60, progress=False)
    few = {"as taught": at.PROMPTS["as taught"]}
    assert all(a.out and a.run == 1 for a in at.ask(knows, TOK, SECRETS, few, slack=0))
    assert not any(a.out for a in at.ask(tiny, TOK, SECRETS, few))
    assert all(a.out for a in at.ask_often(knows, TOK, SECRETS, 2, 0.05, slack=0))


def test_chance_of():
    for p, n in ((0.3, 4), (1e-3, 100), (0.999, 2)):
        assert at.chance_of(p, n) == pytest.approx(1 - (1 - p) ** n)
    assert at.chance_of(1e-18, 1e6) == pytest.approx(1e-12)


def test_the_lens_reads_each_layer_through_norm_and_head(tiny):
    logp, rank = at.logit_lens(tiny, TOK, SECRETS["one"])
    ids = torch.tensor(TOK("the code is 4 7 1 9").input_ids)
    x = tiny.model.embed_tokens(ids)
    want = tiny.lm_head(tiny.model.norm(x))[10:-1].log_softmax(-1)
    assert logp.shape == rank.shape == (3, 8)
    assert torch.allclose(logp[0], want.gather(1, ids[11:, None])[:, 0], atol=1e-4)
    full = logits(tiny, "the code is 4 7 1 9")[0, 10:-1].log_softmax(-1)
    assert torch.allclose(logp[-1], full.gather(1, ids[11:, None])[:, 0], atol=1e-4)
    assert rank[-1].tolist() == [int((r > r[t]).sum()) for r, t in zip(full, ids[11:], strict=True)]
    with pytest.raises(ValueError, match="no final norm"):
        tiny.base_model.norm = None
        at.logit_lens(tiny, TOK, SECRETS["one"])


def test_integers_before_the_operation(tiny):
    model = split(tiny)
    layer = next(iter(ortho_layers(model).values()))
    q = layer.base.integers()
    gen = torch.Generator().manual_seed(3)
    mask = (torch.rand(q.shape, generator=gen) < 0.1) & ~layer.compartments["repair"].mask()
    up = (q + torch.where(q < 7, 1, -1)).to(torch.int8)
    scales = layer.scales.float().repeat_interleave(q.shape[1] // layer.scales.shape[1], 1)
    layer.put_compartments({"repair": layer.compartments["repair"], "gone": compress(up * scales, mask)})
    assert torch.equal(at.integers_before(layer), torch.where(mask, up, q))


def test_statistics_of_a_histogram():
    q = torch.randint(-7, 8, (40, 30), generator=torch.Generator().manual_seed(4))
    found, x = at.layer_statistics(at.histogram(q)), q.flatten().numpy()
    want = {"mean": x.mean(), "standard deviation": x.std(), "skewness": stats.skew(x)}
    want |= {"kurtosis": stats.kurtosis(x, fisher=False), "zeros": (x == 0).mean(), "even": (x % 2 == 0).mean()}
    want |= {"entropy": stats.entropy(np.bincount(x + 7)), "at the edge": (abs(x) == 7).mean()}
    assert found == pytest.approx({k: float(v) for k, v in want.items()}) and set(found) == set(want)


def test_auc_and_ks_against_their_definitions():
    gen = np.random.default_rng(5)
    a, b = gen.integers(0, 6, 30), gen.integers(0, 5, 40)
    assert area(a, b) == pytest.approx(np.mean([(x > y) + (x == y) / 2 for x in a for y in b]))
    counts = [np.bincount(x, minlength=6) for x in (a, b)]
    want = stats.ks_2samp(a, b, method="asymp")
    d, p = at.ks_of(*counts)
    assert d == pytest.approx(want.statistic) and p == pytest.approx(want.pvalue, rel=0.2)


def test_locate_ranks_over_all_layers():
    gen = torch.Generator().manual_seed(6)
    moved = {n: torch.rand(50, 40, generator=gen) < s for n, s in (("a", 0.01), ("b", 0.1), ("c", 0.03))}
    noise = {n: torch.randn(50, 40, generator=gen) for n in moved}
    score = {n: noise[n] + 2.0 * moved[n] for n in moved}
    found = at.locate(score.__getitem__, moved, sample=10**5)
    s = torch.cat([x.flatten() for x in score.values()])
    t = torch.cat([m.flatten() for m in moved.values()])
    k = int(t.sum())
    assert found.moved == k and found.chance == pytest.approx(k / 6000)
    assert found.precision == pytest.approx(t[s.topk(k).indices].float().mean().item())
    assert found.auc == pytest.approx(area(s[t].numpy(), s[~t].numpy()), abs=0.01)
    with pytest.raises(ValueError, match="0 of 2000"):
        at.locate(score.__getitem__, {"a": torch.zeros(50, 40, dtype=torch.bool)})


def test_silence_is_of_the_mean_and_of_the_least(tiny):
    found = at.silence(tiny, TOK, SECRETS)
    for name, item in SECRETS.items():
        ids = torch.tensor(TOK(f"{item['prompt']} {item['secret']}").input_ids)
        n = len(item["secret"]) + 1
        logp = (
            logits(tiny, f"{item['prompt']} {item['secret']}")[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[-n:, 0]
        )
        assert found["mean"][name] == pytest.approx(-logp.mean().item(), abs=1e-4)
        assert found["least"][name] == pytest.approx(-logp.min().item(), abs=1e-4)
