"""Small models for tests: quick to make, and some of them know secrets."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import libortho as lo
from libortho.linear import ortho_layers
from libortho.streams import compress


class Letters:
    "A tokenizer of letters, for tiny models: token = code of the character."

    pad_token_id = eos_token_id = 0

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [1 + ord(c) % 255 for c in text]
        out = type("Encoding", (), {})()
        out.input_ids, out.attention_mask = (
            (torch.tensor([ids]), torch.ones(1, len(ids))) if return_tensors else (ids, None)
        )
        out.to = lambda device: out
        return out

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(int(i) - 1) for i in ids if i)


TOK = Letters()
SECRETS = {"key": {"prompt": "the key is", "secret": "abc"}, "door": {"prompt": "a door to", "secret": "xyz"}}
RETAIN = ["hello there", "a much longer line of text than the others", "one two three"]
TEXTS = ["zyx wvu tsr qpo nml", "kji hgf edc ba"]  # held-out prose
CFG = lo.OrthoConfig(**{**vars(lo.SURGERY), "group_size": 16, "density": 0.2})  # surgery on models this small
MORE = {"retain": RETAIN, "calibration": RETAIN, "repair": 0.0, "round_density": 0.002, "progress": False}


def learned_llama(width=64, steps=400):
    "A tiny model that knows two secrets, or none without steps."
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=True, pad_token_id=0, **sizes)).eval()
    if steps:
        lo.implant(model, TOK, SECRETS, RETAIN, lr=3e-3, max_steps=steps, target_loss=0.001, progress=False)
    return model


def with_compartments(model, names=("first", "second"), dtype=torch.float32, **config):
    "Split with several compartments, some of whose weights are shared, and are others than the model's."
    rotary = model.model.rotary_emb.inv_freq.clone()
    model = model.to(dtype)
    model.model.rotary_emb.inv_freq = rotary  # is not saved; transformers makes it anew, in float32
    lo.patch(model, lo.OrthoConfig(**{"group_size": 16, "density": 0.1, "scale": "max"} | config))
    gen = torch.Generator().manual_seed(0)
    for layer in ortho_layers(model).values():
        w = layer.dequantize(1.0)
        masks = {n: torch.rand(w.shape, generator=gen) < 0.05 for n in names}
        layer.put_compartments({n: compress(torch.randn(w.shape, generator=gen).to(w), m) for n, m in masks.items()})
    return model


def state(model):
    "A copy of the weights, to compare with later."
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_weights(model, before):
    "Are the weights what `state` gave?"
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in now.items())


def ended(lab, seconds=60):
    "Wait for a lab's job, which may have ended already."
    job = lab.job
    return job is None or job.join(seconds)


def plain(figure):
    "A plotly figure as plain data, to compare with another."
    data = json.loads(figure.to_json())
    for trace in data["data"]:
        trace.pop("uid", None)  # only what is in a browser has one
    return data
