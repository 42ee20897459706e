"""From checkpoint to checkpoint: the same as by hand, taken up after a kill, and bad input before anything is read."""

import copy
import json
import os
import signal
import warnings

import pytest
import torch
from accelerate import dispatch_model
from models import CFG, MORE, RETAIN, SECRETS, TOK, learned_llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import libortho as lo
from libortho import checkpoint
from libortho.checkpoint import decompose_checkpoint, read_items, read_texts
from libortho.cli import app


@pytest.fixture
def source(learned, tmp_path, monkeypatch):
    "A checkpoint whose tokenizer is the tests' own."
    learned.save_pretrained(tmp_path / "float")
    learned_llama(steps=0).save_pretrained(tmp_path / "control")

    def load(name, device_map=None):
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, device_map=device_map).eval(), TOK

    monkeypatch.setattr(checkpoint, "load_model", load)
    monkeypatch.setattr("libortho.checkpoint.save", lambda model, out, tok, **kw: lo.save(model, out, **kw))
    return tmp_path / "float"


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def by_hand(learned, source, out, control=None):
    model = copy.deepcopy(learned)
    levels = control and lo.control_scores(control, TOK, SECRETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lo.decompose(model, TOK, CFG, SECRETS, control=levels, keep_original=False, **MORE)
    lo.save(model, out)
    return model


def tensors(folder):
    "Of a saved model, by the stem of the file's name: the rest of it is a digest."
    return {name.rsplit("-", 1)[0]: data for name, data in files(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("control", [None, "control"])
def test_the_same_as_by_hand(learned, source, tmp_path, control):
    known = learned_llama(steps=0) if control else None
    model = by_hand(learned, source, tmp_path / "hand", known)
    report = decompose_checkpoint(
        source, tmp_path / "out", CFG, SECRETS, **MORE, control=control and tmp_path / control
    )
    assert tensors(tmp_path / "out") == tensors(tmp_path / "hand") and report.reached
    assert not (tmp_path / "out.stages").exists()
    assert lo.compartments(model).keys() == SECRETS.keys() and "key" in (tmp_path / "out" / "README.md").read_text()


def test_killed_before_the_save_it_goes_on(learned, source, tmp_path, monkeypatch):
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
        try:
            monkeypatch.setattr(checkpoint, "save", lambda *a, **kw: os.kill(os.getpid(), signal.SIGKILL))
            decompose_checkpoint(source, tmp_path / "out", CFG, SECRETS, **MORE)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL and not (tmp_path / "out").exists()
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out.stages").iterdir()}
    assert len(kept) == 2 + len(SECRETS)
    seen = []

    def look(*args, **kw):
        seen.append({f.name: f.stat().st_mtime_ns for f in (tmp_path / "out.stages").iterdir()})
        return lo.save(args[0], args[1], **kw)

    monkeypatch.setattr(checkpoint, "save", look)
    decompose_checkpoint(source, tmp_path / "out", CFG, SECRETS, **MORE)
    assert seen == [kept], "a finished stage was made again"
    by_hand(learned, source, tmp_path / "hand")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "hand")


def test_a_model_that_accelerate_has_spread(learned):
    "Its hooks sit on every layer; the integers, masks and moves are the same, and the switches work."
    plain, spread = copy.deepcopy(learned), copy.deepcopy(learned)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    dispatch_model(spread, places, force_hooks=True)
    assert any(hasattr(m, "_hf_hook") for m in spread.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (plain, spread):
            lo.decompose(model, TOK, CFG, SECRETS, **MORE)
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(3))
    for a in (1.0, 0.5, 0.0):
        lo.set_alpha(plain, a)
        lo.set_alpha(spread, a)
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, spread(ids).logits)


def test_a_layer_that_was_offloaded_is_refused(learned):
    model = copy.deepcopy(learned)
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(
        ValueError, match=r"device_map leaves 'model\.layers\.1\.mlp\.down_proj\.weight' without values"
    ):
        checkpoint.check_devices(model)


@pytest.mark.parametrize(
    "text, said",
    [("{", "is not JSON"), ("[]", "not be empty"), ("3", "must hold a list"), ('["", "a"]', "holds ''"),
     ("[3]", "holds 3"), ('{"a": {"prompt": "x"}}', "prompt and secret"), ('{"a": []}', "holds"),
     ('{"a": [["x"]], "b": [{}]}', "holds {}")],
)  # fmt: skip
def test_files_of_items_that_cannot_work(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="forget '.*x.json'.*" + said):
        read_items(tmp_path / "x.json", "forget")


def test_arguments_before_anything_is_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *a, **kw: 1 / 0)
    for out, kw, said in (
        (tmp_path / "float", {}, "holds another model|is the source"),
        (tmp_path / "x", {"control": "y"}, "control is of no use without forget"),
        (tmp_path / "x", {"repair": 2.0}, "repair must be in"),
        (tmp_path / "x", {}, "sieve 'contrast' needs forget"),
        (tmp_path / "x", {"forget": {"repair": "a b"}}, "'repair' is the reserved name"),
        (tmp_path / "x", {"forget": SECRETS, "max_shard_size": "much"}, "max_shard_size must be"),
    ):
        with pytest.raises(ValueError, match=said):
            decompose_checkpoint(source, out, CFG, **kw)
    assert not (tmp_path / "x").exists()


def test_the_command(learned, source, tmp_path):
    (tmp_path / "forget.json").write_text(json.dumps(SECRETS))
    (tmp_path / "retain.txt").write_text("\n\n".join(RETAIN))
    args = ["decompose", source, "--out", tmp_path / "out", "--forget", tmp_path / "forget.json", "--density", "0.2"]
    args += ["--retain", tmp_path / "retain.txt", "--calibration", tmp_path / "retain.txt", "--group-size", "16"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = CliRunner().invoke(app, [str(a) for a in args])
    assert found.exit_code == 0, found.output
    assert (
        "key: " in found.output
        and "door" in found.output
        and lo.compartments(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).keys() == {"repair", *SECRETS}
    )
    found = CliRunner().invoke(
        app, ["decompose", str(source), "--out", str(tmp_path / "y"), "--forget", "nowhere.json"]
    )
    assert found.exit_code == 2 and "--forget 'nowhere.json' is not a file" in found.output


def test_names_in_a_file_of_retain_text_are_not_text(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(SECRETS["key"]))
    (tmp_path / "named.json").write_text(json.dumps({"a": "first text", "b": ["second text", SECRETS["door"]]}))
    assert read_texts(tmp_path / "one.json", "retain") == [SECRETS["key"]]
    assert read_texts(tmp_path / "named.json", "retain") == ["first text", "second text", SECRETS["door"]]
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="retain '.*latin.txt' is not UTF-8"):
        read_texts(tmp_path / "latin.txt", "retain")


def test_what_else_lies_among_the_stages_stays(learned, source, tmp_path):
    (tmp_path / "out.stages").mkdir()
    (tmp_path / "out.stages" / "thesis.txt").write_text("mine")
    decompose_checkpoint(source, tmp_path / "out", CFG, SECRETS, **MORE)
    assert [f.name for f in (tmp_path / "out.stages").iterdir()] == ["thesis.txt"]


def test_options_that_say_nothing_to_the_policy(source, tmp_path):
    args = ["decompose", str(source), "--out", str(tmp_path / "y"), "--device-map", "auto"]
    found = CliRunner().invoke(app, args)
    assert found.exit_code == 2 and "--device-map is for policies that read text" in found.output
