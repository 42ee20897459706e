"""Exports: plain folders that others read to the last bit, or an error and nothing written."""

import json
import os
import stat
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from models import with_compartments as split
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import libortho as lo
from libortho import export
from libortho.export import export_compressed_tensors, export_dense, split_layers
from libortho.linear import fingerprint, ortho_layers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALPHAS = (1.0, 0.3, 0.0, {"first": 0.5, "repair": 0.0}, None)
SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0}
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}


def llama(**sizes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**{"num_attention_heads": 2, "tie_word_embeddings": True} | SIZES | sizes)
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24)[None]).logits


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def tensors(folder):
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def dense(alpha=None, model=None, stand=None, names=("repair", "first", "second"), max_shard_size="5GB", **config):
    "A case: exports into a folder, and gives the model as it should be read."

    def run(folder):
        m = split(model() if model else llama(), names, **config)
        lo.set_alpha(m, {"first": 0.25, "second": 0.75} if stand is None else stand)
        export_dense(m, folder, alpha, max_shard_size=max_shard_size)
        if alpha is not None:
            lo.set_alpha(m, alpha)
        return m

    return run


def packed(model=None, names=("first", "second"), max_shard_size="5GB", drop_repair=False, **config):
    def run(folder):
        m = split(model() if model else llama(), names, **config)
        export_compressed_tensors(m, folder, max_shard_size=max_shard_size, drop_repair=drop_repair)
        lo.set_alpha(m, dict.fromkeys(names, 0.0))
        return m

    return run


def mixed():
    "Groups of several sizes, one of them a row, in one model; the head is its own."
    model = llama(tie_word_embeddings=False)
    sizes = {"q_proj": 8, "k_proj": 8, "v_proj": "row", "o_proj": 32, "up_proj": "tensor"}
    for name, linear in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] in sizes:
            size = sizes[name.rsplit(".", 1)[-1]]
            layer = lo.OrthoLinear.from_linear(linear, lo.OrthoConfig(group_size=size, compartment="first"))
            model.set_submodule(name, layer)
    return model


def packed_mixed(folder):
    model = mixed()
    export_compressed_tensors(model, folder)
    lo.set_alpha(model, 0.0)
    return model


def twice():
    "One layer in two places, which a fresh model has as two; and a head that is tied by hand."
    model = llama(tie_word_embeddings=False, num_hidden_layers=2)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def loaded(folder):
    "From a folder of libortho's own."
    lo.save(split(llama(), ("repair", "first")), folder.parent / "own")
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "own")
    export_dense(model, folder, {"first": 0.5})
    lo.set_alpha(model, 0.5)
    return model


def odd():
    return llama(hidden_size=36, intermediate_size=45)


CASES = {f"dense {d} {a}": dense(a, dtype=d) for d in DTYPES for a in ALPHAS if d == torch.float32 or a in (0.3, None)}
CASES |= {f"packed {b} {g}": packed(bits=b, group_size=g) for b in (2, 3, 4) for g in (16, 32, "row", "tensor")}
CASES |= {f"packed {d} {g}": packed(dtype=d, group_size=g) for d in DTYPES[1:] for g in (16, "row", "tensor")}
CASES |= {
    "dense in float64": dense(0.3, dtype=torch.float64),
    "dense of 2 bits": dense(1.0, bits=2, group_size="tensor"),
    "dense biased": dense(0.3, lambda: llama(**BIASED)),
    "dense in shards": dense(0.3, max_shard_size="4KB"),
    "dense in shards by number": dense(0.3, lambda: llama(**BIASED), max_shard_size=5000),
    "dense of one block": dense(0.3, targets=("mlp",)),
    "dense twice": dense(0.3, twice),
    "dense odd": dense(0.3, odd, group_size="row"),
    "dense loaded": loaded,
    "packed in float64": packed(dtype=torch.float64),
    "packed biased": packed(lambda: llama(**BIASED)),
    "packed in shards": packed(lambda: llama(**BIASED), max_shard_size="4KB"),
    "packed of one block": packed(targets=("mlp",)),
    "packed twice": packed(twice),
    "packed odd": packed(odd, group_size="row"),
    "packed without repair": packed(names=("repair", "first"), drop_repair=True),
    "packed mixed": packed_mixed,
}

READER = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
found = {}
for folder in Path(sys.argv[1]).glob("*/export"):
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        found[folder.parent.name] = model(torch.arange(24)[None]).logits, {k: list(v) for k, v in told.items()}
assert "libortho" not in sys.modules
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    "All cases, exported, and read by a process that has no libortho: folder, model, its logits, theirs, what was told."
    root, found = tmp_path_factory.mktemp("exports"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBORTHO_BACKEND", "reference")
        for i, (name, run) in enumerate(CASES.items()):
            folder = root / str(i) / "export"
            folder.parent.mkdir()
            model = run(folder)
            found[name] = folder, model, logits(model)
    done = subprocess.run([sys.executable, "-c", READER, root, root / "logits.pt"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    theirs = torch.load(root / "logits.pt")
    return {name: (folder, model, ours, *theirs[folder.parent.name]) for name, (folder, model, ours) in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_others_read_the_same_model_to_the_last_bit(read, name):
    _, _, ours, theirs, told = read[name]
    assert theirs.dtype == ours.dtype and torch.equal(theirs, ours)
    assert not any(told.values()), told  # no key missing, none too many


def test_what_the_cases_hold_differs(read):
    seen = [read[n][2] for n in CASES if n.startswith("dense torch.float32")]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    _, model, without, *_ = read["packed without repair"]
    with lo.alpha(model, {"repair": 1.0}):
        assert not torch.equal(logits(model), without)


def schemes(folder):
    "By layer, as compressed-tensors understands the config."
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(told).config_groups.values()
    return {name: group for group in groups for name in group.targets}, told


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("packed")])
def test_their_decompressor_gives_our_base(read, name):
    folder, model, *_ = read[name]
    layers, stored, (by_name, told) = split_layers(model), tensors(folder), schemes(folder)
    assert set(by_name) == set(layers) and "lm_head" in told["ignore"] and not set(told["ignore"]) & set(layers)
    for n, layer in layers.items():
        parts = {k: stored.pop(f"{n}.{k}") for k in ("weight_packed", "weight_scale", "weight_shape")}
        got = PackedQuantizationCompressor.decompress(parts, by_name[n])["weight"]
        assert torch.equal(parts["weight_packed"], pack_to_int32(layer.base.integers(), 4))
        assert parts["weight_scale"].dtype == got.dtype == layer.dtype
        assert torch.equal(got, layer.base.dequantize().to(layer.dtype))
    assert not any(n.rpartition(".")[0] in layers and not n.endswith(".bias") for n in stored)


def test_each_setting_is_a_config_group(read):
    folder, model, *_ = read["packed mixed"]
    by_name, told = schemes(folder)
    assert {(g.weights.strategy, g.weights.group_size) for g in by_name.values()} == {("group", 8), ("channel", None)}
    assert len(told["config_groups"]) == 2 and set(told["ignore"]) == {
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }


def test_a_plain_checkpoint_is_as_transformers_would_write_it(tmp_path):
    for sizes in ({}, BIASED):
        plain, here = tmp_path / f"plain {len(sizes)}", tmp_path / f"here {len(sizes)}"
        model = llama(**sizes)
        model.save_pretrained(plain)
        export_dense(split(model), here)
        assert set(files(here)) == set(files(plain))
        config = json.loads((plain / "config.json").read_text())
        assert json.loads((here / "config.json").read_text()) == config and "quantization_config" not in config
        shapes = [{n: (t.dtype, t.shape) for n, t in tensors(folder).items()} for folder in (plain, here)]
        assert shapes[0] == shapes[1]


def test_shards_have_the_names_transformers_expects(read):
    for name in ("dense in shards", "packed in shards"):
        folder = read[name][0]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shards = sorted(f.name for f in folder.glob("*.safetensors"))
        assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        assert len(shards) > 3 and set(index["weight_map"].values()) == set(shards)
        assert index["weight_map"] == {n: f.name for f in folder.glob("*.safetensors") for n in load_file(f)}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())


def test_one_rebuilt_weight_at_a_time(tmp_path, monkeypatch):
    made = []

    def rebuild(*args):
        assert not any(ref() is not None for ref in made)
        w = reconstruct(*args)
        made.append(weakref.ref(w))
        return w

    reconstruct = export.reconstruct
    monkeypatch.setattr(export, "reconstruct", rebuild)
    model = split(llama())
    export_dense(model, tmp_path)
    assert len(made) == len(ortho_layers(model)) == 7


def test_the_model_is_as_it_was(tmp_path):
    model = split(llama())
    lo.set_alpha(model, {"first": 0.25})
    before = fingerprint(model), {n: layer.alphas for n, layer in ortho_layers(model).items()}
    export_dense(model, tmp_path / "dense", 0.0)
    export_compressed_tensors(model, tmp_path / "packed")
    assert before == (fingerprint(model), {n: layer.alphas for n, layer in ortho_layers(model).items()})


def test_nothing_of_the_switches_is_told(tmp_path):
    model = split(llama(), ("first", "second"))
    export_dense(model, tmp_path / "dense", 0.0)
    export_compressed_tensors(model, tmp_path / "packed")
    written = b"".join(files(tmp_path).values())
    assert not any(word in written for word in (b"first", b"second", b"libortho", b"alpha"))


def test_a_tokenizer_and_the_umask(tmp_path, real):
    real[1].save_pretrained(tmp_path / "plain")
    before = os.umask(0o027)
    try:
        export_dense(split(llama()), tmp_path / "here", tok=real[1])
    finally:
        os.umask(before)
    here = files(tmp_path / "here")
    assert {n: here[n] for n in files(tmp_path / "plain")} == files(tmp_path / "plain")
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "here").iterdir()} == {0o640}


def test_a_switch_that_another_moves_meanwhile_does_not_matter(tmp_path, monkeypatch):
    model = split(llama())
    export_dense(model, tmp_path / "still", 0.3)
    lo.set_alpha(model, 0.3)
    make = export.write_recipes

    def move(file, recipes):
        lo.set_alpha(model, 1.0)
        make(file, recipes)

    monkeypatch.setattr(export, "write_recipes", move)
    export_dense(model, tmp_path / "moved")
    assert files(tmp_path / "moved") == files(tmp_path / "still")


# What is refused


def tiny_scale():
    model = split(llama(), dtype=torch.float16)
    next(iter(ortho_layers(model).values())).scales[3, 1] = 1e-9
    return model


def strange_scales():
    model = split(llama())
    ortho_layers(model)["model.layers.0.mlp.up_proj"].scales = torch.ones(1, 2, dtype=torch.bfloat16)
    return model


def without_values():
    model = split(llama())
    model.model.norm.weight = torch.nn.Parameter(torch.empty(32, device="meta"))
    return model


def complex_buffer():
    model = split(llama())
    model.model.register_buffer("turns", torch.zeros(2, dtype=torch.complex64))
    return model


def one():
    return split(llama())


def mended():
    return split(llama(), ("repair", "first"))


BOTH = (export_dense, export_compressed_tensors)
REFUSED = [
    *((call, llama, {}, "model has no split layers; call patch") for call in BOTH),
    *(
        (call, lambda: lo.OrthoLinear.from_linear(torch.nn.Linear(64, 4)), {}, "a config, got OrthoLinear")
        for call in BOTH
    ),
    *((call, one, {"tok": "gpt2"}, "tok must be a tokenizer or None, got 'gpt2'") for call in BOTH),
    *(
        (
            call,
            one,
            {"max_shard_size": size},
            r"max_shard_size must be a size such as '5GB', or a number of bytes, got ",
        )
        for call in BOTH
        for size in ("lots", "5", "-1GB", "nanGB", 0, -1, None, float("nan"), float("inf"))
    ),
    *((call, without_values, {}, "model has no values for 'model.norm.weight', on the meta device") for call in BOTH),
    *((call, complex_buffer, {}, "model has 'model.turns' in torch.complex64") for call in BOTH),
    (export_dense, one, {"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
    (export_dense, one, {"alpha": float("nan")}, r"alpha must be in \[0, 1\], got nan"),
    (export_dense, one, {"alpha": {"first": -1}}, r"alpha of 'first' must be in \[0, 1\], got -1"),
    (export_dense, one, {"alpha": {"third": 1}}, "compartment 'third' is not known; there is 'first', 'second'"),
    (
        export_compressed_tensors,
        mended,
        {},
        r"model has [0-9,]+ weights in 'repair', which INT4 cannot hold; drop_repair=True",
    ),
    (
        export_compressed_tensors,
        tiny_scale,
        {},
        "a scale in 'model.*q_proj' that torch.float16 does not hold; call model.bfl",
    ),
    (
        export_compressed_tensors,
        strange_scales,
        {},
        "scales of 1 × 2 in 'model.*up_proj', of 64 × 32 weights; .* export_dense",
    ),
]


@pytest.mark.parametrize("call, model, options, error", REFUSED)
def test_bad_wishes_are_refused_before_anything_is_written(tmp_path, call, model, options, error):
    with pytest.raises(ValueError, match=error):
        call(model(), tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("there", ["plain", "own", "dense", "packed", "file"])
def test_only_an_empty_folder_is_written_to(tmp_path, call, there):
    folder, model = tmp_path / "folder", llama()
    if there == "plain":
        model.save_pretrained(folder)
    split(model)
    if there == "file":
        folder.write_text("x")
    elif there != "plain":
        {"own": lo.save, "dense": export_dense, "packed": export_compressed_tensors}[there](model, folder)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="is a file; name a folder|is not empty, it holds '.*'; name an empty folder"):
        call(model, folder)
    assert files(tmp_path) == before


def test_own_models_are_not_saved_over_an_export(tmp_path):
    model = split(llama())
    export_dense(model, tmp_path)
    with pytest.raises(ValueError, match="holds another model .model.safetensors.; name an empty folder"):
        lo.save(model, tmp_path)


@pytest.fixture
def locked(tmp_path):
    model = split(llama(), ("repair", "first", "second"))
    lo.save(model, tmp_path / "own", lock={"second": "key"})
    return model, AutoModelForCausalLM.from_pretrained(tmp_path / "own")


def test_a_locked_compartment_is_not_exported_and_that_is_said(locked, tmp_path):
    whole, model = locked
    for alpha in (None, 0.3, {"first": 1.0}):
        with pytest.warns(UserWarning, match="the export is without 'second', still locked; unlock") as caught:
            export_dense(model, tmp_path / f"without {alpha}", alpha)
        assert caught[0].filename == __file__
    lo.set_alpha(whole, {"first": 0.3, "second": 0.0})
    export_dense(whole, tmp_path / "off")
    assert files(tmp_path / "without 0.3") == files(tmp_path / "off")
    with pytest.raises(
        ValueError, match="alpha names 'second', which is locked; unlock.model, 'second', key. opens it"
    ):
        export_dense(model, tmp_path / "named", {"second": 0.0})
    assert not (tmp_path / "named").exists()
    lo.unlock(model, "second", "key")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_dense(model, tmp_path / "open", 1.0)
        export_dense(whole, tmp_path / "whole", 1.0)
    assert files(tmp_path / "open") == files(tmp_path / "whole")


def test_at_0_a_lock_does_not_matter(locked, tmp_path):
    whole, model = locked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, m in enumerate((whole, model)):
            export_compressed_tensors(m, tmp_path / f"packed {i}", drop_repair=True)
            export_dense(m, tmp_path / f"dense {i}", 0.0)
    assert files(tmp_path / "packed 0") == files(tmp_path / "packed 1")
    assert files(tmp_path / "dense 0") == files(tmp_path / "dense 1")


# What a crash leaves


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("at", ["first shard", "last shard", "config", 0, "last"])
def test_a_crash_leaves_nothing_that_loads(tmp_path, monkeypatch, call, at):
    model, count = split(llama()), [0]
    call(model, tmp_path / "whole", max_shard_size="6KB")
    total, shards = len(files(tmp_path / "whole")), len(list((tmp_path / "whole").glob("*.safetensors")))
    assert shards > 2
    place, last = {
        "first shard": ("write_recipes", 0),
        "last shard": ("write_recipes", shards - 1),
        "config": ("_config", 0),
    }.get(at, ("replace", total - 1 if at == "last" else at))
    owner = os if place == "replace" else export
    really = getattr(owner, place)

    def fail(*args):
        count[0] += 1
        if count[0] == last + 1:
            raise OSError("no space left on device")
        return really(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, fail)
        with pytest.raises(OSError, match="no space left"):
            call(model, tmp_path / "new", max_shard_size="6KB")
    left = os.listdir(tmp_path / "new")
    assert not any(n.startswith(".") or n == "config.json" for n in left) and len(left) == (place == "replace" and last)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    if not left:
        call(model, tmp_path / "new", max_shard_size="6KB")
        assert files(tmp_path / "new") == files(tmp_path / "whole")


def test_a_process_that_dies_leaves_no_model_and_no_rest(tmp_path, monkeypatch):
    def die(stage, config, write=Path.write_text):
        write(stage, config)
        if stage.name == "config.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", die)
        patch.setattr(export.shutil, "rmtree", lambda *args, **options: None)  # the dead clear nothing away
        with pytest.raises(KeyboardInterrupt):
            export_dense(split(llama()), tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".libortho-") and {"config.json", "model.safetensors"} <= set(files(left))
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    export_dense(split(llama()), tmp_path)
    assert set(files(tmp_path)) == {"config.json", "generation_config.json", "model.safetensors"}


def test_of_two_at_a_time_one_is_refused(tmp_path):
    model, told = split(llama()), []

    def run(call):
        try:
            call(model, tmp_path / "new")
        except ValueError as e:
            told.append(str(e))

    threads = [threading.Thread(target=run, args=(call,)) for call in BOTH]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(told) == 1 and "is not empty" in told[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "new")
