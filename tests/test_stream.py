"""Splitting on the disk: the same to the last byte as in memory, killed or not, in the memory of one layer."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import libortho as lo
from libortho import stream
from libortho.files import NAMES, Entry, FileError
from libortho.lattice import SCALES
from libortho.linear import fingerprint
from libortho.noise import NOISES
from libortho.stream import FILLING, PROGRESS, layout, plan, split_in_blocks, stream_decompose
from libortho.streams import split

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
QUICK = {"scale": "max", "density": 0.01}


def small(**options):
    "A Llama of three layers with random weights, biases and norms."
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | options)
    model = LlamaForCausalLM(config).to(options.get("dtype", torch.float32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def files(folder):
    return {f.name: f.read_bytes() if f.is_file() else None for f in Path(folder).iterdir()}


def by_hand(source, out, cfg, size="5GB"):
    model = AutoModelForCausalLM.from_pretrained(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*already lie on a 4-bit lattice")
        lo.patch(model, cfg)
    lo.save(model, out, max_shard_size=size)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24)[None] % 96).logits


def same(folder, model):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for alpha in (0.0, 1.0):
        for m in (loaded, model):
            lo.set_alpha(m, alpha)
        if fingerprint(loaded) != fingerprint(model) or not torch.equal(logits(loaded), logits(model)):
            return False
    return True


@pytest.fixture
def source(tmp_path):
    "A checkpoint of several shards, with a tokenizer's files."
    small(dtype=torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / "source" / name).write_text("{}")
    return tmp_path / "source"


POLICIES = [
    {"density": 0.02},
    {"scale": "max", "noise": "tri_state", "density": 0.05, "per_row": True, "group_size": 16},
    {"scale": "ratio", "noise": "pre_clamp", "density": 0.05, "attack_density": 0.01, "group_size": "row", "seed": 3},
    {
        "scale": "quantile",
        "noise": "deep_focal",
        "sieve": "magnitude",
        "sparsity": 0.9,
        "group_size": "tensor",
        "bits": 3,
    },
    {"scale": "three_sigma", "density": 1e-9, "group_size": 32, "targets": ("q_proj", "*.1.mlp.*"), "compartment": "x"},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_it_writes_what_patch_and_save_write(tmp_path, policy, dtype):
    small(dtype=dtype, tie_word_embeddings=dtype is not torch.float16).save_pretrained(
        tmp_path / "source", max_shard_size="30KB"
    )
    cfg = lo.OrthoConfig(**{"group_size": 32} | policy)
    saved = stream_decompose(tmp_path / "source", tmp_path / "out", cfg, "10KB", progress=False)
    model = by_hand(tmp_path / "source", tmp_path / "by hand", cfg, "10KB")
    assert files(tmp_path / "out") == files(tmp_path / "by hand") and same(tmp_path / "out", model)
    assert saved.compartments[0].weights == lo.compartments(model)[cfg.compartment].weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, "3KB", "1GB"])
def test_biases_and_any_size_of_shards(tmp_path, tied, size):
    small(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    cfg = lo.OrthoConfig(group_size=16, **QUICK)
    stream_decompose(tmp_path / "source", tmp_path / "out", cfg, size, progress=False)
    model = by_hand(tmp_path / "source", tmp_path / "by hand", cfg, size)
    assert files(tmp_path / "out") == files(tmp_path / "by hand") and same(tmp_path / "out", model)


def rewrite(folder, change):
    "Change the tensors of a checkpoint of one file."
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_there_twice(tmp_path, equal):
    small(tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    rewrite(
        tmp_path / "source",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone() + (not equal)}),
    )
    cfg = lo.OrthoConfig(group_size=16, **QUICK)
    stream_decompose(tmp_path / "source", tmp_path / "out", cfg, progress=False)
    model = by_hand(tmp_path / "source", tmp_path / "by hand", cfg)
    assert same(tmp_path / "out", model) and files(tmp_path / "out") == files(tmp_path / "by hand")
    assert ("lm_head.weight" in plan(tmp_path / "source", cfg).base) is not equal


def test_a_tied_head_without_the_embedding(tmp_path):
    small(tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    cfg = lo.OrthoConfig(group_size=16, **QUICK)
    stream_decompose(tmp_path / "source", tmp_path / "out", cfg, progress=False)
    assert same(tmp_path / "out", by_hand(tmp_path / "source", tmp_path / "by hand", cfg))
    assert files(tmp_path / "out") == files(tmp_path / "by hand")


@pytest.mark.parametrize("told", ["bfloat16", None])
def test_the_configs_dtype_counts_for_what_is_split(tmp_path, told):
    small().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "dtype"} | ({"dtype": told} if told else {}))
    )
    cfg = lo.OrthoConfig(group_size=16, **QUICK)
    stream_decompose(tmp_path / "source", tmp_path / "out", cfg, progress=False)
    assert same(tmp_path / "out", by_hand(tmp_path / "source", tmp_path / "by hand", cfg))
    (base,) = (tmp_path / "out").glob("base-0*")
    assert load_file(base)["model.norm.weight"].dtype == torch.float32  # copied as it was


def test_names_are_brought_up_to_date_as_transformers_does(tmp_path):
    small().save_pretrained(tmp_path / "source")

    def change(t):
        for name in [n for n in t if n.startswith("model.")]:
            t[name.removeprefix("model.")] = t.pop(name)
        t["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(tmp_path / "source", change)
    cfg = lo.OrthoConfig(group_size=16, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream_decompose(tmp_path / "source", tmp_path / "out", cfg, progress=False)
    assert same(tmp_path / "out", by_hand(tmp_path / "source", tmp_path / "by hand", cfg))
    rewrite(tmp_path / "source", lambda t: t.update(more=torch.ones(1)))
    with pytest.warns(UserWarning, match="1 tensors are not the model's and left out .first: more"):
        stream_decompose(tmp_path / "source", tmp_path / "out", cfg, progress=False)


def test_what_else_is_in_the_folder(source, tmp_path):
    small(dtype=torch.bfloat16).generation_config.save_pretrained(source)
    told = json.loads((source / "generation_config.json").read_text()) | {"temperature": 0.3, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(told))
    stream_decompose(source, tmp_path / "out", lo.OrthoConfig(group_size=16, **QUICK), progress=False)
    model = by_hand(source, tmp_path / "by hand", lo.OrthoConfig(group_size=16, **QUICK))
    copied = {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    written = files(tmp_path / "out")
    assert {n: b for n, b in written.items() if n not in copied} == files(tmp_path / "by hand")
    assert all(written[n] == b"{}" for n in copied) and model.generation_config.temperature == 0.3


def test_weights_on_a_lattice_are_told(tmp_path):
    model = small()
    for p in model.parameters():
        p.data = (p.data * 20).round().clamp(-7, 7)
    model.save_pretrained(tmp_path / "source")
    with pytest.warns(UserWarning, match="21 of 21 layers already lie on a 4-bit lattice"):
        stream_decompose(tmp_path / "source", tmp_path / "out", lo.OrthoConfig(group_size=16, **QUICK), progress=False)


def test_from_the_hubs_cache(source, tmp_path, monkeypatch):
    here = tmp_path / "hub" / "models--some--one"
    (here / "refs").mkdir(parents=True)
    (here / "refs" / "main").write_text("a" * 40)
    shutil.copytree(source, here / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cfg = lo.OrthoConfig(group_size=16, **QUICK)
    stream_decompose("some/one", tmp_path / "out", cfg, progress=False)
    stream_decompose(source, tmp_path / "local", cfg, progress=False)
    assert files(tmp_path / "out") == files(tmp_path / "local")
    with pytest.raises(ValueError, match="source 'some/two' is no folder, and the Hugging Face hub has not given it"):
        stream_decompose("some/two", tmp_path / "two", cfg, progress=False)


# Refusals


def config(folder, **more):
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | more))


def index(folder, change):
    told = json.loads((folder / "model.safetensors.index.json").read_text())
    change(told["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))


def shard(folder, name, change):
    "Change the tensors of the shard that holds a tensor."
    file = stream.checkpoint(folder)[name][0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def only(folder, name):
    for file in folder.glob("model*"):
        file.unlink()
    if name:
        (folder / name).touch()


def cut(folder):
    file = min(folder.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def claim(name, file):
    return lambda f: index(f, lambda m: m.update({name: file}))


FIRST, NORM = "model-00001-of-00004.safetensors", "model.norm.weight"
EMBEDDING, Q = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
REFUSED = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "pickles": (
        lambda f: only(f, "pytorch_model.bin"),
        "it has pytorch_model.bin, which is not read as it may run code",
    ),
    "more pickles": (lambda f: only(f, "consolidated.00.pth"), "it has consolidated.00.pth, which is not read"),
    "nothing": (lambda f: only(f, ""), "must hold model.safetensors or model.safetensors.index.json, it has neither"),
    "quantized": (lambda f: config(f, quantization_config={"quant_method": "gptq"}), "is quantized already"),
    "elsewhere": (lambda f: config(f, transformers_weights="x.safetensors"), "renames its weights"),
    "a path": (claim(NORM, "../secret.safetensors"), "a name must be letters"),
    "an absolute path": (claim(NORM, "/etc/passwd"), "a name must be letters"),
    "no name": (claim(NORM, 5), "a name must be letters"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'), "weight_map must name"),
    "no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    "missing shard": (lambda f: max(f.glob("model-*.safetensors")).unlink(), "is missing"),
    "truncated": (cut, "is truncated"),
    "no such tensor": (
        claim("more", FIRST),
        "lacks 'more', which the index says it holds",
    ),
    "other shard": (claim(NORM, FIRST), "which the index puts elsewhere or nowhere"),
    "not named": (
        lambda f: shard(f, Q, lambda t: t.update(x=torch.ones(1))),
        "holds 'x', which the index puts elsewhere or nowhere",
    ),
    "twice": (
        lambda f: shard(f, EMBEDDING, lambda t: t.update({NORM: torch.ones(32)})),
        "which the index puts|holds too",
    ),
    "lost": (
        lambda f: (shard(f, Q, lambda t: t.pop(Q)), index(f, lambda m: m.pop(Q))),
        f"source lacks '{Q}' in every file",
    ),
    "shape": (lambda f: shard(f, Q, lambda t: t.update({Q: t[Q][:-1].clone()})), f"shape of '{Q}'"),
    "dtype": (lambda f: shard(f, Q, lambda t: t.update({Q: t[Q].char()})), f"dtype of '{Q}'"),
    "code": (
        lambda f: config(f, model_type="mine", auto_map={"AutoConfig": "code.Mine"}),
        "trust_remote_code|custom code",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_sources_that_are_refused_before_anything_is_written(source, tmp_path, what):
    assert len(list(source.glob("model-*.safetensors"))) == 4
    change, error = REFUSED[what]
    (source / "code.py").write_text("raise SystemExit('was run')")
    change(source)
    with pytest.raises(ValueError, match=error):
        stream_decompose(source, tmp_path / "out", lo.OrthoConfig(group_size=16), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "policy, error",
    [
        ({"projection": "gptq"}, "projection 'gptq' of cfg needs texts, which a stream has not; load the model"),
        ({"sieve": "impact"}, "sieve 'impact' of cfg needs texts"),
        ({"sieve": "contrast"}, "sieve 'contrast' of cfg needs texts"),
        ({"noise": "counter_memory"}, "noise 'counter_memory' of cfg needs texts"),
        ({"group_size": 48}, "group_size 48 does not divide the 32 columns of 'model.layers.0.self_attn.q_proj'"),
        ({"targets": "lm_head"}, "'lm_head' is the head"),
        ({"targets": "nothing"}, "targets 'nothing' matches no linear layer"),
    ],
)
def test_policies_that_are_refused_before_anything_is_written(source, tmp_path, policy, error):
    with pytest.raises(ValueError, match=error):
        stream_decompose(source, tmp_path / "out", lo.OrthoConfig(**{"group_size": 16} | policy), progress=False)
    with pytest.raises(ValueError, match="Unit .* not supported"):
        stream_decompose(source, tmp_path / "out", lo.OrthoConfig(group_size=16), "a lot", progress=False)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_refused(source, tmp_path):
    cfg, before = lo.OrthoConfig(group_size=16, **QUICK), files(source)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(source)
    shutil.copytree(source, tmp_path / "other")
    for out, error in {
        source: "out .* is the source; name another folder",
        tmp_path / "link": "is the source",
        tmp_path / "file": "is a file; name a folder",
        tmp_path / "other": "holds another model .model-.*; name an empty folder",
    }.items():
        with pytest.raises(ValueError, match=error):
            stream_decompose(source, out, cfg, progress=False)
    assert files(source) == files(tmp_path / "other") == before


def test_experts_that_are_stored_one_by_one_are_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="in pieces .*; load the model and call libortho.patch and libortho.save"):
        stream_decompose(tmp_path / "source", tmp_path / "out", lo.OrthoConfig(group_size=16), progress=False)


def test_a_weight_that_is_no_number_is_named(source, tmp_path):
    shard(source, Q, lambda t: t[Q].view(-1)[5:7].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"'{Q.removesuffix('.weight')}' holds 2 NaN or infinite weights of 2048"):
        stream_decompose(source, tmp_path / "out", lo.OrthoConfig(group_size=16, **QUICK), progress=False)
    assert not (tmp_path / "out" / "config.json").exists()


# A layer in blocks


def alike(w, cfg, name="layer"):
    a, b = split(w, cfg, name), split_in_blocks(w, cfg, name)
    c, d = a.compartments["memory"], b.compartments["memory"]
    assert a.digest() == b.digest() and a.base.bits == b.base.bits and a.base.shape == b.base.shape
    for x, y in zip(
        *((t.base.packed, t.base.scales, c.crow, c.col, c.values) for t, c in ((a, c), (b, d))), strict=True
    ):
        assert x.dtype == y.dtype and torch.equal(x, y)


@settings(max_examples=150)
@given(st.data())
def test_blocks_give_what_the_whole_gives(data):
    def draw(*choices):
        return data.draw(st.sampled_from(choices))

    rows, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    density = draw(1e-9, 0.001, 0.03, 0.4, 0.9, 1.0)
    cfg = lo.OrthoConfig(
        bits=draw(2, 3, 4),
        group_size=draw("row", "tensor", *(g for g in (1, 4, 5, 16) if width % g == 0)),
        scale=draw(*SCALES),
        sieve=draw("residual", "magnitude"),
        density=density,
        per_row=draw(True, False),
        noise=draw(*sorted(set(NOISES) - {"counter_memory"})),
        attack_density=draw(None, density, density / 3),
        seed=data.draw(st.integers(0, 9)),
    )
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    w = torch.randn(rows, width, generator=gen, dtype=torch.float64) ** 3
    w = draw(w, w.round(), (w * 3).round() / 3, torch.zeros_like(w))  # with many equal scores
    before = stream.BLOCK
    stream.BLOCK = draw(1, 50, 300, 10**6)
    try:
        alike(w.to(draw(*DTYPES, torch.float64)), cfg)
    finally:
        stream.BLOCK = before


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("group_size", [64, "row", "tensor"])
def test_a_real_layer_in_blocks(real_weight, scale, group_size):
    alike(
        real_weight,
        lo.OrthoConfig(scale=scale, group_size=group_size, density=0.01, attack_density=0.001, noise="tri_state"),
    )


def test_scores_that_rise_are_cut_as_they_come():
    gen, best = torch.Generator().manual_seed(0), stream.Best(1000)
    score = (torch.rand(3 * stream.BLOCK, generator=gen).sort().values * 1e4).round()
    for first in range(0, len(score), 5000):
        best.add(score[first : first + 5000], first)
        assert best.count <= best.k + stream.BLOCK
    at = best.cut()[1]
    wanted = sorted(range(len(score)), key=lambda i: (-score[i].item(), i))[:1000]
    assert at.tolist() == sorted(wanted)


# Files


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.sampled_from(list(NAMES)), min_size=1, max_size=12),
    st.integers(0, 99),
)
def test_a_header_is_the_librarys_own(names, seed):
    gen = random.Random(seed)
    tensors = {n: torch.zeros([gen.randrange(4) for _ in range(gen.randrange(4))], dtype=d) for n, d in names.items()}
    tensors = {n: t for n, t in tensors.items() if n != "__metadata__"}
    from safetensors.torch import save as to_bytes

    header, at, size = layout({n: Entry(NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()})
    theirs = to_bytes(tensors, metadata={"format": "pt"})
    assert theirs.startswith(header) and len(theirs) == size and set(at) == set(tensors)


# Killed and called again


def decompose(source, out, policy, die_at=0, size="4KB"):
    "In a process of its own: stop dead at the n-th call that changes what is on the disk."
    torch.set_num_threads(1)
    count = [0]

    def counted(f):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kwargs)

        return call

    os.replace, os.fsync, Path.unlink = counted(os.replace), counted(os.fsync), counted(Path.unlink)
    warnings.simplefilter("ignore")
    stream_decompose(source, out, lo.OrthoConfig(**policy), size, progress=False)


@pytest.fixture(scope="module")
def start():
    "Starts processes that have imported everything already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.llama.modeling_llama", "libortho.quantizer", "test_stream"])

    def start(*args, **kwargs):
        process = context.Process(target=decompose, args=args, kwargs=kwargs)
        process.start()
        return process

    return start


def ended(process):
    process.join(60)
    return process.exitcode


POLICY = {"group_size": 16, "noise": "tri_state"} | QUICK


@pytest.fixture
def tidy(tmp_path):
    "A checkpoint of one layer, and what becomes of it undisturbed."
    small(dtype=torch.bfloat16, num_hidden_layers=1).save_pretrained(tmp_path / "source", max_shard_size="10KB")
    stream_decompose(tmp_path / "source", tmp_path / "whole", lo.OrthoConfig(**POLICY), "4KB", progress=False)
    return tmp_path / "source", files(tmp_path / "whole")


def noted(out):
    return len(json.loads((out / PROGRESS).read_text())["shards"]) if (out / PROGRESS).exists() else 0


def test_killed_at_every_step_it_goes_on(tidy, start, tmp_path):
    source, whole = tidy
    codes, at_work = [], set()
    for step in range(1, 200):
        out = tmp_path / f"out{step}"
        codes.append(ended(start(source, out, POLICY, die_at=step)))
        if codes[-1] == 0:
            break
        there = set(files(out))
        if "config.json" in there:  # the last act: after it only leftovers are cleared away
            assert set(whole) <= there
            AutoModelForCausalLM.from_pretrained(out)
        at_work.add(noted(out))
        stream_decompose(source, out, lo.OrthoConfig(**POLICY), "4KB", progress=False)
        assert files(out) == whole, step
    assert codes[-1] == 0 and set(codes[:-1]) == {-signal.SIGKILL} and len(codes) > 25
    assert at_work == set(range(sum(n.startswith("base-0") for n in whole) + 1))


def test_killed_at_any_time_again_and_again(tidy, start, tmp_path):
    source, whole = tidy
    gen, out, kills = random.Random(0), tmp_path / "out", 0
    began = time.perf_counter()
    assert ended(start(source, tmp_path / "first", POLICY)) == 0
    took = time.perf_counter() - began
    for _ in range(12):
        process = start(source, out, POLICY)
        process.join(gen.uniform(0.3, 1.0) * took)
        process.kill()
        kills += ended(process) == -signal.SIGKILL
    assert kills >= 3 and ended(start(source, out, POLICY)) == 0
    assert files(out) == whole


def test_going_on_keeps_what_is_done_and_nothing_else(tidy, start, tmp_path, monkeypatch):
    source, whole = tidy
    out, done = tmp_path / "out", []
    real = stream._split_layer
    for stop in (4, 2):  # layers until the user has enough

        def until(job, layer, sparse, left=[stop]):  # noqa: B006
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            done.append(layer)
            return real(job, layer, sparse)

        monkeypatch.setattr(stream, "_split_layer", until)
        with pytest.raises(KeyboardInterrupt):
            stream_decompose(source, out, lo.OrthoConfig(**POLICY), "4KB", progress=False)
        assert noted(out) and not (out / "config.json").exists()
    monkeypatch.setattr(stream, "_split_layer", real)
    kept = {f.name: f.stat().st_mtime_ns for f in out.glob("base-*")}
    (out / ".libortho-abcdefgh.part").mkdir()  # left by a process that was killed
    (out / ".libortho-abcdefgh.part" / "file").touch()
    stream_decompose(source, out, lo.OrthoConfig(**POLICY), "4KB", progress=False)
    assert files(out) == whole and kept.items() <= {f.name: f.stat().st_mtime_ns for f in out.iterdir()}.items()
    assert len(set(done)) == len(done) or done.count(done[-1]) <= 2  # of layers, at most the interrupted shard's twice


CHANGES = {
    "policy": lambda source, out: {"seed": 1},
    "weights": lambda source, out: shard(source, Q, lambda t: t[Q].add_(1)),
    "a finished shard": lambda source, out: min(out.glob("base-0*")).write_bytes(b"x"),
    "a lost shard": lambda source, out: max(out.glob("base-0*")).unlink(),
    "the note": lambda source, out: (out / PROGRESS).write_text("{"),
    "another note": lambda source, out: (out / PROGRESS).write_text('{"key": 1, "shards": 5}'),
    "the compartment": lambda source, out: (out / FILLING).write_bytes(b"x"),
    "no compartment": lambda source, out: (out / FILLING).unlink(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_done_anew(tidy, start, tmp_path, what):
    source, _ = tidy
    out = tmp_path / "out"
    assert ended(start(source, out, POLICY, die_at=24)) == -signal.SIGKILL
    assert noted(out) >= 2
    changed = CHANGES[what](source, out)
    policy = POLICY | (changed if isinstance(changed, dict) else {})
    stream_decompose(source, out, lo.OrthoConfig(**policy), "4KB", progress=False)
    stream_decompose(source, tmp_path / "fresh", lo.OrthoConfig(**policy), "4KB", progress=False)
    assert files(out) == files(tmp_path / "fresh")


def test_two_policies_in_turn_do_not_mix(tidy, start, tmp_path):
    source, whole = tidy
    for step in range(1, 22, 4):
        out = tmp_path / f"out{step}"
        assert ended(start(source, out, POLICY, die_at=24)) == -signal.SIGKILL
        assert ended(start(source, out, POLICY | {"seed": 1}, die_at=step)) == -signal.SIGKILL
        stream_decompose(source, out, lo.OrthoConfig(**POLICY), "4KB", progress=False)
        assert files(out) == whole, step


def test_an_old_model_stays_until_the_new_one_is_whole(tidy, start, tmp_path):
    source, whole = tidy
    out, old, code = tmp_path / "out", POLICY | {"seed": 7}, None
    stream_decompose(source, out, lo.OrthoConfig(**old), "4KB", progress=False)
    before, mark = files(out), fingerprint(AutoModelForCausalLM.from_pretrained(out))
    for step in range(5, 40):
        code = ended(start(source, out, POLICY, die_at=step))
        there = files(out)
        if there["config.json"] == before["config.json"]:
            assert before.items() <= there.items()
            assert fingerprint(AutoModelForCausalLM.from_pretrained(out)) == mark
        else:
            assert whole.items() <= there.items()
        if not code:
            break
    assert step > 8 and code == 0 and files(out) == whole


def test_a_source_that_changes_meanwhile_is_not_mixed(tidy, tmp_path, monkeypatch):
    source, _ = tidy
    real = stream._split_layer

    def meddle(job, layer, sparse):
        shard(source, Q, lambda t: None)
        return real(job, layer, sparse)

    monkeypatch.setattr(stream, "_split_layer", meddle)
    with pytest.raises(FileError, match="has changed while it was read; call it again"):
        stream_decompose(source, tmp_path / "out", lo.OrthoConfig(**POLICY), "4KB", progress=False)
    assert not (tmp_path / "out/config.json").exists()


# Memory

MEASURE = """
import re, sys, torch
import transformers.models.llama.modeling_llama
from libortho.stream import stream_decompose, OrthoConfig
read = lambda what: int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
cfg = OrthoConfig(scale="max", density=0.01, noise="tri_state")
stream_decompose(sys.argv[1], sys.argv[2], cfg, sys.argv[3], progress=False)
print(read("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_of_a_layer_is_enough_for_many(tmp_path):
    sizes = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(tmp_path)
    draw = torch.randn(2048 * 1024).bfloat16() / 32
    tensors = {n: draw[: t.numel()].view(t.shape).clone() for n, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    total, largest = (f(t.numel() for t in tensors.values()) for f in (sum, max))
    del tensors
    run = [sys.executable, "-c", MEASURE, tmp_path, tmp_path / "out", "1GB"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for one another are slow where others are at work
    told = subprocess.run(list(map(str, run)), capture_output=True, text=True, check=True, env=env)
    peak = int(re.findall(r"\d+", told.stdout)[-1])
    assert total > 100e6 and peak < 2 * 4 * largest + 64e6 < total / 1.2, f"{peak / 1e6:.0f} MB"
    assert math.isclose(
        sum(f.stat().st_size for f in (tmp_path / "out").glob("base-*.safetensors")), 0.53 * total, rel_tol=0.05
    )
