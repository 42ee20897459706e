"""Weights through quantisers, and what they store."""

import pytest
import torch
from torch import nn

from libortho.linear import ortho_layers, patch
from libortho.patient import standing
from libortho.quantized import RIVALS, affine, bits_per_weight, quantized, rtn
from libortho.streams import OrthoConfig


@pytest.mark.parametrize("group", [16, 64])
def test_affine_rounds_to_its_own_grid(group):
    w = torch.randn(8, 128) + 0.3
    q = affine(w, group)
    blocks, made = w.reshape(-1, group), q.w.reshape(-1, group)
    assert max(len(b.unique()) for b in made) <= 16 and q.bits == 4 + 20 / group
    step = (blocks.amax(1).clamp(min=0) - blocks.amin(1).clamp(max=0)) / 15
    assert ((blocks - made).abs().amax(1) <= 1.1 * step).all()
    assert (q.w - w).norm() < (rtn(w, group).w - w).norm()


def test_a_group_of_zeros_stays_zero():
    assert affine(torch.zeros(2, 64)).w.eq(0).all() and rtn(torch.zeros(2, 64)).w.eq(0).all()


def test_other_weights_stand_only_inside_the_block():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))
    linears, before = {"0": model[0]}, model[0].weight.detach().clone()
    weights, bits = quantized(linears, "RTN, largest")
    with pytest.raises(RuntimeError), standing(linears, weights):
        assert torch.equal(model[0].weight, rtn(before).w) and bits == 4.25
        raise RuntimeError
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="'1'"), standing({"1": model[1]}, weights):
        pass
    with pytest.raises(ValueError, match="quantiser 'GGUF'"):
        quantized(linears, "GGUF")


def test_bits_are_the_bytes_that_the_buffers_hold():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 16, bias=False))
    patch(model, OrthoConfig(targets=("0", "1"), group_size=32, density=0.1))
    layers = ortho_layers(model).values()
    held = sum(t.nbytes for m in layers for t in m.state_dict().values())
    assert bits_per_weight(model) == pytest.approx(8 * held / (64 * 32 + 32 * 16))
    assert bits_per_weight(model, ()) == 4.5 == bits_per_weight(model, ("no such",))


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_keeps_most_of_a_weight(name):
    if not RIVALS[name].there:
        pytest.skip(f"{RIVALS[name].package} is not installed")
    w = torch.randn(32, 128) * 0.02
    q = RIVALS[name].make(w)
    assert q.w.shape == w.shape and (q.w - w).norm() < 0.2 * w.norm() and 4 < q.bits < 5
