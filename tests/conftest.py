"""Fixtures: the real offline model, a real layer of it, and tiny models for mechanism."""

import copy
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never asks a model hub

import pytest
import torch
from hypothesis import settings
from models import RETAIN, SECRETS, TEXTS, TOK, learned_llama, same_weights, state
from transformers import LlamaConfig, LlamaForCausalLM

import libortho as lo
from libortho.data import load_model

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("libortho", deadline=None)  # a slow machine is not a failure
settings.load_profile("libortho")
DATA = Path(os.environ.get("LIBORTHO_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real():
    "The offline model and its tokenizer; tests that change it must put it back."
    return load_model()


@pytest.fixture(scope="session")
def real_weight(real):
    return real[0].model.layers[10].mlp.down_proj.weight.detach().clone()


@pytest.fixture
def tiny():
    "A Llama of two small layers with random weights, tied head, for the mechanism of patching."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def learned():
    "A tiny model that knows `SECRETS`; a test that changes a model does so to a copy."
    yield from unchanged(learned_llama())


def unchanged(model):
    before = state(model)
    yield model
    assert same_weights(model, before), "a test changed a model that all share"


@pytest.fixture(scope="session")
def control():
    "What the model measures that never saw them."
    return lo.measure(learned_llama(steps=0), TOK, SECRETS, RETAIN, TEXTS)


@pytest.fixture(scope="session")
def narrow():
    "As `learned`, half as wide."
    yield from unchanged(learned_llama(32))


@pytest.fixture
def model(narrow):
    "A copy of `narrow`, to be changed."
    return copy.deepcopy(narrow)


@pytest.fixture(scope="session")
def tofu_data():
    if not (DATA / "tofu").is_dir():
        pytest.skip(f"TOFU's files are not at {DATA}; set LIBORTHO_DATA")
    return DATA / "tofu"
