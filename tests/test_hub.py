"""Saving and loading: the same to the last bit, or an error that names the file."""

import copy
import json
import shutil
import struct
import subprocess
import sys
from functools import partial

import pytest
import torch
from models import with_compartments
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import libortho as lo
from libortho.files import FileError, Saved, config_digest, sha256
from libortho.hub import base_tensors
from libortho.linear import fingerprint, ortho_layers

KEYS = {"first": "one", "second": "two"}
split = partial(with_compartments, names=("repair", "first", "second"), noise="tri_state")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24)[None] % 256).logits


def same(a, b, alphas=(1.0, 0.3, 0.0)):
    "The same logits to the last bit, wherever the switches stand."
    for alpha in alphas:
        for m in (a, b):
            lo.set_alpha(m, alpha)
        if not torch.equal(logits(a), logits(b)) or fingerprint(a) != fingerprint(b):
            return False
    return True


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_loaded_is_what_was_saved(tiny, tmp_path, dtype, bits):
    model = split(tiny, bits=bits, dtype=dtype, noise="tri_state" if bits == 4 else "none")
    lo.set_alpha(model, {"first": 0.25, "second": 0.0})
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for name, layer in ortho_layers(model).items():
        assert ortho_layers(loaded)[name].alphas == layer.alphas == {"repair": 1.0, "first": 0.25, "second": 0.0}
    assert loaded.dtype == dtype and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(loaded)) and same(model, loaded)
    assert not loaded.training and not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))


def test_a_layer_with_a_bias_and_a_head_of_its_own(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    split(model).save_pretrained(tmp_path)
    assert same(model, load(tmp_path))


def test_a_layer_in_two_places_and_a_weight_that_only_the_user_tied(tiny, tmp_path):
    tiny.config.tie_word_embeddings = False
    tiny.lm_head.weight = tiny.model.embed_tokens.weight
    tiny.all_tied_weights_keys = {}
    model = split(tiny)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    lo.export_base(model, tmp_path / "bare")
    lo.save(model, tmp_path / "whole")
    loaded = load(tmp_path / "whole")
    for alpha in (1.0, 0.3, 0.0):
        for m in (model, loaded):
            lo.set_alpha(m, alpha)
        assert torch.equal(logits(model), logits(loaded))
    written = b"".join(files(tmp_path / "bare").values())
    values = model.model.layers[0].mlp.up_proj.compartments["first"].values
    assert values[:4].numpy().tobytes() not in written


def test_in_many_shards(tiny, tmp_path):
    model = split(tiny)
    saved = lo.save(model, tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("base-0*.safetensors"))) > 5 and same(model, load(tmp_path))
    assert set(saved.files) | {"config.json", "generation_config.json", "README.md"} == set(files(tmp_path))


def test_a_new_model_replaces_the_old_one(tiny, tmp_path):
    model = split(tiny)
    lo.save(model, tmp_path, max_shard_size="2KB")
    lo.save(model, tmp_path, leave_out=["first"])
    loaded = load(tmp_path)
    assert list(lo.compartments(loaded)) == ["repair", "second"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # a base and two compartments
    before = files(tmp_path)
    lo.save(model, tmp_path, leave_out=["first"])
    assert files(tmp_path) == before  # the same bytes


@pytest.mark.parametrize(
    "options, error",
    [
        ({"leave_out": ["third"]}, "leave_out names 'third'; the model has 'first', 'repair', 'second'"),
        ({"lock": {"third": "x"}}, "lock names 'third'"),
        ({"lock": {"first": ""}}, "the key of 'first' must be a text that is not empty"),
        ({"lock": {"first": b"x"}}, "the key of 'first' must be a text that is not empty, got bytes"),
        ({"max_shard_size": "lots"}, "max_shard_size must be a size such as '5GB'"),
        ({"lock": {"repair": "x"}}, "lock names 'repair', which is part of the base"),
        ({"leave_out": ["repair"]}, "leave_out names 'repair'"),
        ({"leave_out": ["first"], "lock": {"first": "x"}}, "lock names 'first', which is left out"),
    ],
)
def test_bad_wishes_are_refused_before_anything_is_written(tiny, tmp_path, options, error):
    with pytest.raises(ValueError, match=error):
        lo.save(split(tiny), tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


def test_another_models_folder_is_not_written_over(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="holds another model .model.safetensors.; name an empty folder"):
        lo.save(split(tiny), tmp_path)
    assert files(tmp_path) == before


def test_what_save_pretrained_is_told_is_heeded(saved, tmp_path):
    model, _ = saved
    for wrong in ({"state_dict": {"a": torch.zeros(1)}}, {"variant": "fp16"}, {"push_to_hub": True}):
        with pytest.raises(ValueError, match=f"{list(wrong)[0]} is not for save_pretrained of a split model"):
            model.save_pretrained(tmp_path / "x", **wrong)
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", max_shard_size=None, leave_out=["first"])
    assert list(lo.compartments(load(tmp_path / "x"))) == ["repair", "second"]


def test_a_save_that_fails_leaves_nothing(saved, monkeypatch):
    model, folder = saved
    before = files(folder)
    monkeypatch.setattr("libortho.hub.commit", lambda *a: 1 / 0)
    lo.set_alpha(model, 0.5)
    with pytest.raises(ZeroDivisionError):
        lo.save(model, folder, lock=KEYS)
    assert files(folder) == before


def test_a_save_that_fails_beside_a_plain_config_leaves_nothing(saved, tmp_path, monkeypatch):
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("libortho.hub.commit", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lo.save(saved[0], folder)
    assert files(folder).keys() == {"config.json"}


def test_a_name_does_not_stay_when_its_file_is_gone(tiny, tmp_path):
    lo.patch(tiny, lo.OrthoConfig(group_size=16, density=0.1, compartment="patient-smith"))
    lo.save(tiny, tmp_path / "model")
    one(tmp_path / "model", "compartment*").unlink()
    with pytest.warns(UserWarning, match="is not there"):
        loaded = load(tmp_path / "model")
    lo.export_base(loaded, tmp_path / "bare")
    assert b"patient-smith" not in b"".join(files(tmp_path / "bare").values())


def test_a_compiled_model_is_saved_as_itself(saved, tmp_path):
    lo.save(torch.compile(saved[0]), tmp_path / "x")
    assert same(saved[0], load(tmp_path / "x"))
    with pytest.raises(ValueError, match="model must be a transformers model, got ModuleList"):
        lo.save(torch.nn.ModuleList([saved[0]]), tmp_path / "y")


def test_a_plain_model_is_saved_as_ever(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and torch.equal(logits(load(tmp_path)), logits(tiny))


@pytest.fixture
def saved(tiny, tmp_path):
    model = split(tiny)
    lo.save(model, tmp_path / "model")
    return model, tmp_path / "model"


def one(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def rewrite(folder, pattern, change):
    "Change a file's tensors and forge its digest in the config, as someone would who wants it to be read."
    file = one(folder, pattern)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    forge(folder, file)


def forge(folder, file):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["files"][file.name] = [file.stat().st_size, sha256(file)]
    config["quantization_config"]["digest"] = config_digest(config)
    (folder / "config.json").write_text(json.dumps(config))


Q = "model.layers.0.mlp.up_proj"


def poke(key, i, value):
    def change(tensors):
        tensors[key].view(-1)[i] = value

    return change


WRONG = {
    "shape of the base": (
        "base-0*",
        lambda t: t.update({f"{Q}.packed": t[f"{Q}.packed"][:-1].clone()}),
        "shape of '.*packed'",
    ),
    "dtype of the base": (
        "base-0*",
        lambda t: t.update({f"{Q}.packed": t[f"{Q}.packed"].char()}),
        "dtype of '.*packed'",
    ),
    "dtype of scales": ("base-0*", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].half()}), "dtype of '.*scales'"),
    "scale": ("base-0*", poke(f"{Q}.scales", 3, float("nan")), "a scale of '.*' is not finite"),
    "one too many": ("base-0*", lambda t: t.update(more=torch.zeros(1)), "holds 'more', which the model does not have"),
    "one too few": ("base-0*", lambda t: t.pop(f"{Q}.packed"), f"lacks '{Q}.packed'"),
    "rows": ("compartment-01*", poke(f"{Q}.crow", 1, 10**6), "crow does not run"),
    "backwards": ("compartment-01*", poke(f"{Q}.crow", -2, -5), "crow does not run"),
    "columns": ("compartment-01*", poke(f"{Q}.col", 0, 32), "a column lies outside 0 … 31"),
    "negative": ("compartment-01*", poke(f"{Q}.col", 0, -1), "a column lies outside"),
    "order": ("compartment-01*", lambda t: t[f"{Q}.col"].copy_(t[f"{Q}.col"].flip(0)), "columns do not rise"),
    "value": ("compartment-01*", poke(f"{Q}.values", 0, float("inf")), "a value is not finite"),
    "no layer": ("compartment-01*", lambda t: t.update({"x.values": torch.zeros(1)}), "holds 'x.values'"),
    "no columns": ("compartment-01*", lambda t: t.pop(f"{Q}.col"), "shape of '.*values'|lacks '.*col'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_content_that_cannot_be(saved, what):
    pattern, change, error = WRONG[what]
    rewrite(saved[1], pattern, change)
    with pytest.raises(FileError, match=error) as e:
        load(saved[1])
    assert str(saved[1]) in str(e.value)


@pytest.mark.parametrize("pattern", ["base-0*", "compartment-01*"])
@pytest.mark.parametrize("how", ["flip", "truncate", "lengthen", "empty"])
def test_bytes_that_changed(saved, pattern, how):
    file = one(saved[1], pattern)
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[-1] ^= 1
    data = {"flip": data, "truncate": data[:-1], "lengthen": data + b"x", "empty": b""}[how]
    file.write_bytes(data)
    with pytest.raises(FileError, match=file.name):
        load(saved[1])
    forge(saved[1], file)
    if how != "flip":  # a changed value with a forged digest is a value like any other
        with pytest.raises(FileError, match=file.name):
            load(saved[1])


def with_header(file, change):
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = change(data[8 : 8 + n].decode()).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + n :])


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda h: h.replace('"shape":[', '"shape":[1099511627776,', 1), "cannot have"),
        (lambda h: h.replace('"dtype":"', '"dtype":"X', 1), "dtype of .* must be one of"),
        (lambda h: h.rstrip()[:-1] + "," + h[1:], "has the key .* twice"),
        (lambda h: h.replace("{", "[", 1), "not valid JSON"),
        (lambda h: "[" * 100_000, "not valid JSON"),
        (lambda h: h.replace('"data_offsets":[', '"data_offsets":[-', 1), "lists of whole numbers"),
        (lambda h: h.replace('"data_offsets":', '"data":', 1), "must have dtype, shape and data_offsets"),
    ],
)
@pytest.mark.parametrize("pattern", ["base-0*", "compartment-01*"])
def test_headers_that_lie(saved, pattern, change, error):
    file = one(saved[1], pattern)
    with_header(file, change)
    forge(saved[1], file)
    with pytest.raises(FileError, match=error) as e:
        load(saved[1])
    assert file.name in str(e.value)


def in_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    config["quantization_config"]["digest"] = config_digest(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda q: q.update(format=2), "format 2 is newer than this libortho reads .1.; pip install --upgrade"),
        (lambda q: q.update(format="1"), "format must be a whole number from 1, got '1'"),
        (lambda q: q["layers"].update({Q: [4, 64, 3]}), "gives scales of 64 × 3 for a weight of 64 × 32"),
        (lambda q: q["layers"].update({"model.norm": [4, 1, 1]}), "'model.norm', which is no linear layer"),
        (lambda q: q["layers"].pop(Q), "which the model does not have"),
        (lambda q: q["compartments"][1].update(file="../../secret"), "a name must be letters"),
        (lambda q: q["compartments"][1].update(alpha=float("nan")), "alpha must be in"),
        (lambda q: q["compartments"][1].update(name="second"), "two compartments have the same name"),
        (lambda q: q.update(index="/etc/passwd"), "a name must be letters"),
        (lambda q: q.pop("index"), "index is missing"),
    ],
)
def test_configs_that_lie(saved, change, error):
    in_config(saved[1], change)
    with pytest.raises(FileError, match=error):
        load(saved[1])


def test_a_changed_digit_in_the_models_own_config(saved):
    text = (saved[1] / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in text
    (saved[1] / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 3e-06'))
    with pytest.raises(FileError, match="config.json has changed since it was saved; if that was on purpose"):
        load(saved[1])


def test_an_index_cannot_name_a_file_elsewhere(saved, tmp_path):
    index = one(saved[1], "*.index.json")
    shutil.copy(one(saved[1], "base-0*"), tmp_path / "elsewhere.safetensors")
    told = json.loads(index.read_text())
    told["weight_map"] = dict.fromkeys(told["weight_map"], "../elsewhere.safetensors")
    index.write_text(json.dumps(told))
    forge(saved[1], index)
    with pytest.raises(FileError, match="elsewhere.safetensors is not among the files that config.json names"):
        load(saved[1])


def test_a_missing_shard_is_named(saved):
    file = one(saved[1], "base-0*")
    file.unlink()
    with pytest.raises((OSError, ValueError), match=file.name):
        load(saved[1])


def test_a_memory_withheld(saved):
    model, folder = saved
    one(folder, "compartment-01*").unlink()
    with pytest.warns(
        UserWarning, match="compartment-01.* is not there, so the model is without its compartment 'first'"
    ):
        loaded = load(folder)
    assert list(lo.compartments(loaded)) == ["repair", "second"]
    for alpha in (0.0, 1.0):
        lo.set_alpha(model, {"first": 0.0, "second": alpha})
        lo.set_alpha(loaded, alpha)
        assert torch.equal(logits(model), logits(loaded))


def test_locks_open_in_any_order_and_stay_closed_in_a_copy(saved, tmp_path):
    model, _ = saved
    lo.save(model, tmp_path / "locked", lock=KEYS)
    loaded = load(tmp_path / "locked")
    assert list(lo.compartments(loaded)) == ["repair"]
    before = fingerprint(loaded)
    with pytest.raises(FileError, match="the key is wrong"):
        lo.unlock(loaded, "first", "two")
    with pytest.raises(
        ValueError, match="name 'third' is not a locked compartment of this model; there is 'first', 'second'"
    ):
        lo.unlock(loaded, "third", "x")
    assert fingerprint(loaded) == before
    lo.save(loaded, tmp_path / "copy")  # both locked still
    loaded = load(tmp_path / "copy")
    lo.unlock(loaded, "second", "two")
    with pytest.raises(ValueError, match="compartment 'second' was locked where the model is from; pass lock="):
        loaded.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    with pytest.raises(ValueError, match="holds 'first', which is locked still and would be lost"):
        lo.export_base(loaded, tmp_path / "copy")
    lo.save(loaded, tmp_path / "half", lock={"second": None})  # one of them, in plain
    loaded = load(tmp_path / "half")
    assert list(lo.compartments(loaded)) == ["repair", "second"]
    lo.unlock(loaded, "first", "one")
    assert list(lo.compartments(loaded)) == ["repair", "first", "second"] and same(model, loaded)
    with pytest.raises(ValueError, match="there is none"):
        lo.unlock(loaded, "first", "one")


def test_a_locked_file_with_any_bit_changed_stays_shut(saved, tmp_path):
    lo.save(saved[0], tmp_path / "locked", lock=KEYS)
    file = one(tmp_path / "locked", "compartment-01*.locked")
    whole = file.read_bytes()
    for i in range(0, len(whole), len(whole) // 7):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        loaded = load(tmp_path / "locked")
        with pytest.raises(FileError, match=f"{file.name} has changed since it was saved"):
            lo.unlock(loaded, "first", "one")
        forge(tmp_path / "locked", file)
        loaded = load(tmp_path / "locked")
        with pytest.raises(FileError, match=file.name):
            lo.unlock(loaded, "first", "one")
        assert list(lo.compartments(loaded)) == ["repair"]


def test_an_exported_base_holds_nothing_of_the_memories(saved, tmp_path):
    model, _ = saved
    lo.set_alpha(model, 0.0)
    lo.export_base(model, tmp_path / "bare")
    loaded = load(tmp_path / "bare")
    assert list(lo.compartments(loaded)) == ["repair"] and torch.equal(logits(model), logits(loaded))
    written = b"".join(files(tmp_path / "bare").values())
    assert b"first" not in written and b"second" not in written
    for layer in ortho_layers(model).values():
        for name in KEYS:
            c = layer.compartments[name]
            assert c.values[:4].numpy().tobytes() not in written and c.col[:8].numpy().tobytes() not in written


def test_without_the_library_no_weights_are_made_up(saved):
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(saved[1])!r})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode and "OSError" in told.stderr and "Unknown quantization type, got libortho" in told.stderr


def test_the_library_registers_itself_whenever_transformers_comes(saved):
    load_ = f"AutoModelForCausalLM.from_pretrained({str(saved[1])!r})"
    for lines in (
        ["import libortho", "from transformers import AutoModelForCausalLM", load_],
        ["from transformers import AutoModelForCausalLM", "import libortho", load_],
    ):
        subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", "\n".join(lines)], check=True, capture_output=True
        )


def test_a_copy_and_a_moved_model_are_saved_alike(saved, tmp_path):
    model, folder = saved
    lo.save(copy.deepcopy(load(folder)), tmp_path / "copy")
    assert files(tmp_path / "copy") == files(folder)


def test_base_tensors_hold_a_tied_one_once(saved):
    names = list(base_tensors(saved[0]))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_a_config_round_trips(saved):
    told = json.loads((saved[1] / "config.json").read_text())["quantization_config"]
    assert Saved.from_dict(told).to_dict() == told and told["policy"]["scale"] == "max"
