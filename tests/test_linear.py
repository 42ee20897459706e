import copy
import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import libortho as lo
from libortho.linear import OrthoLinear, find_linears, fingerprint, original, ortho_layers

CFG = lo.OrthoConfig(group_size=16, density=0.1, noise="tri_state")


def state(model):
    "Every module object and every tensor, to compare before and after."
    return {n: id(m) for n, m in model.named_modules()}, {n: t.clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 20),
    st.integers(1, 4),
    st.booleans(),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 10**6),
)
def test_output_is_linear_in_alpha(lead, out, groups, bias, a, dtype, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(16 * groups, out, bias=bias, dtype=dtype)
    layer = OrthoLinear.from_linear(linear, CFG)
    x, ys = torch.randn(*lead, 16 * groups, dtype=dtype), {}
    for value in (0.0, a, 1.0):
        layer.set_alpha(value)
        ys[value] = layer(x)
        assert ys[value].dtype == dtype and ys[value].shape == (*lead, out)
    off, on, now = (ys[k].double() for k in (0.0, 1.0, a))
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(now, off + a * (on - off), rtol=tolerance, atol=tolerance * (1 + on.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_a_float64_reference(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(128, 48, dtype=dtype)
    layer = OrthoLinear.from_linear(linear, CFG)
    x = torch.randn(7, 128, dtype=dtype)
    for a in (0.0, 0.37, 1.0):
        layer.set_alpha(a)
        base, c = layer.base.dequantize().double(), layer.compartments["memory"]
        w = base.clone()
        w[c.index()] += a * (c.values.double() - base[c.index()])
        want = x.double() @ w.T + linear.bias.double()
        assert ((layer(x).double() - want).norm() / want.norm()) < 1e-6


def test_density_one_is_the_original():
    linear = nn.Linear(32, 8)
    layer = OrthoLinear.from_linear(linear, lo.OrthoConfig(group_size=16, density=1.0, noise="post_clamp"))
    x = torch.randn(5, 32)
    assert torch.equal(layer.weight, linear.weight)
    torch.testing.assert_close(layer(x), linear(x))  # the kernel sums in another order


def test_the_original_layers_can_be_let_go(tiny):
    weights = [weakref.ref(m.weight) for m in find_linears(tiny).values()]
    lo.patch(tiny, CFG, keep_original=False)
    gc.collect()
    assert all(w() is None for w in weights)
    with pytest.raises(ValueError, match="was not kept .keep_original=True keeps it.*build the model anew"):
        lo.unpatch(tiny)
    with pytest.raises(ValueError, match="the original layers were not kept"), original(tiny):
        pass


def test_a_switch_out_of_range_leaves_the_layer_whole():
    layer = OrthoLinear.from_linear(nn.Linear(32, 16), CFG)
    with pytest.raises(ValueError, match="alpha of 'memory' must be in .0, 1., got 2.0"):
        layer.put_compartments({"memory": layer.compartments["memory"]}, {"memory": 2.0})
    assert layer.alphas == {"memory": 1.0} and layer.compartments["memory"].nnz


def test_keep_dense_changes_nothing_but_memory(monkeypatch):
    monkeypatch.setenv("LIBORTHO_BACKEND", "reference")
    linear, x = nn.Linear(64, 8), torch.randn(3, 64)
    a, b = (OrthoLinear.from_linear(linear, CFG, keep_dense=k) for k in (True, False))
    for alpha in (1.0, 0.0, 0.5):
        a.set_alpha(alpha), b.set_alpha(alpha)
        assert torch.equal(a(x), b(x))
    assert a._dense is not None and b._dense is None


def test_gradient_reaches_the_input_also_after_inference_mode():
    layer = OrthoLinear.from_linear(nn.Linear(32, 8), CFG)
    with torch.inference_mode():
        layer(torch.randn(2, 32))
    x = torch.randn(2, 32, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 32))


def test_state_dict_round_trip():
    torch.manual_seed(0)
    a, b = (OrthoLinear.from_linear(nn.Linear(32, 8), CFG) for _ in range(2))
    x = torch.randn(2, 32)
    b(x)  # fills the cache, which loading must empty
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))


def test_casting_keeps_the_lattice():
    layer = OrthoLinear.from_linear(nn.Linear(32, 8), CFG)
    base = layer.base.dequantize()
    for cast in (layer.double(), layer.half(), layer.float()):
        assert cast.scales.dtype == torch.bfloat16 and torch.equal(cast.base.dequantize(), base)


def test_patch_and_unpatch(tiny):
    before, ids = state(tiny), torch.arange(20)[None]
    want = tiny(ids).logits
    report = lo.patch(tiny, CFG)
    assert len(report.layers) == len(ortho_layers(tiny)) == 14 and report.density == pytest.approx(0.1, rel=0.01)
    assert isinstance(tiny.lm_head, nn.Linear) and tiny.lm_head.weight is tiny.model.embed_tokens.weight
    on = tiny(ids).logits
    lo.set_alpha(tiny, 0.0)
    assert not torch.equal(on, tiny(ids).logits)
    with lo.original(tiny):
        assert torch.equal(tiny(ids).logits, want)
    lo.unpatch(tiny)
    assert same(before, state(tiny)) and torch.equal(tiny(ids).logits, want)


def test_splitting_is_the_same_whatever_the_order(tiny):
    other = copy.deepcopy(tiny)
    lo.patch(tiny, CFG)
    prints = {n: layer.base.packed for n, layer in ortho_layers(tiny).items()}
    lo.patch(other, lo.OrthoConfig(**{**CFG.__dict__, "targets": ("up_proj", "down_proj", "q_proj")}))
    for n, layer in ortho_layers(other).items():
        assert torch.equal(layer.base.packed, prints[n])


@pytest.mark.parametrize(
    "targets, n",
    [
        ("down_proj", 2),
        ("model.layers.0.mlp.down_proj", 1),
        ("*.layers.1.*_proj", 7),
        (("q_proj", "k_proj"), 4),
        ("mlp", 6),
        ("all-linear", 14),
    ],
)
def test_targets(tiny, targets, n):
    assert len(find_linears(tiny, targets)) == n


class Odd(nn.Module):
    "A conv layer, a shared module, two layers with one weight, and a layer tied to the embedding."

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(16, 32), nn.Conv1d(4, 4, 3)
        self.a, self.b, self.tied = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16, bias=False)
        self.again, self.b.weight, self.tied.weight = self.a, self.a.weight, self.embed.weight

    def forward(self, x):
        return self.tied(self.again(self.b(self.a(self.embed(x)))))


def test_shared_and_tied():
    model = Odd()
    before = state(model)
    lo.patch(model, CFG)
    assert model.a is model.again and isinstance(model.a, OrthoLinear) and isinstance(model.tied, nn.Linear)
    assert torch.equal(model.a.packed, model.b.packed) and model.a.bias is not model.b.bias
    assert torch.isfinite(model(torch.arange(5))).all()
    lo.unpatch(model)
    assert same(before, state(model)) and model.a is model.again and model.b.weight is model.a.weight


def set_nan(m):
    m.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")


@pytest.mark.parametrize(
    "cfg, spoil, words",
    [
        ({"group_size": 48}, None, ["group_size 48", "q_proj", "32"]),
        ({"targets": "up_porj"}, None, ["up_porj", "matches no", "down_proj"]),
        ({"targets": ("down_proj", "nowhere")}, None, ["nowhere"]),
        ({"targets": "lm_head"}, None, ["lm_head", "never split"]),
        ({"targets": "embed_tokens"}, None, ["Embedding", "nn.Linear"]),
        ({"targets": "norm"}, None, ["RMSNorm"]),
        ({}, set_nan, ["model.layers.1.mlp.down_proj", "NaN"]),
        ({"sieve": "impact"}, None, ["impact", "pass h"]),
    ],
)
def test_a_failed_patch_leaves_the_model_as_it_was(tiny, cfg, spoil, words):
    if spoil:
        spoil(tiny)
    modules, tensors = state(tiny)
    with pytest.raises(ValueError) as e:
        lo.patch(tiny, lo.OrthoConfig(**{**CFG.__dict__, **cfg}))
    assert all(word in str(e.value) for word in words), str(e.value)
    after = state(tiny)
    assert modules == after[0] and all(
        torch.equal(tensors[n].nan_to_num(9), after[1][n].nan_to_num(9)) for n in tensors
    )


def test_an_interrupt_while_splitting_leaves_the_model_as_it_was(tiny, monkeypatch):
    import libortho.linear

    real_split, calls = libortho.linear.split, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real_split(*args)

    monkeypatch.setattr(libortho.linear, "split", interrupted)
    before = state(tiny)
    with pytest.raises(KeyboardInterrupt):
        lo.patch(tiny, CFG)
    assert same(before, state(tiny))


@pytest.mark.parametrize("undo", [False, True])
def test_an_interrupt_while_replacing_leaves_the_model_as_it_was(tiny, monkeypatch, undo):
    import libortho.linear

    if undo:
        lo.patch(tiny, CFG)
    real_put, calls = libortho.linear._put, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real_put(*args)

    monkeypatch.setattr(libortho.linear, "_put", interrupted)
    before = state(tiny)
    with pytest.raises(KeyboardInterrupt):
        lo.unpatch(tiny) if undo else lo.patch(tiny, CFG)
    assert len(calls) > 5 and same(before, state(tiny))


def test_original_can_be_nested(tiny):
    want = tiny(torch.arange(9)[None]).logits
    lo.patch(tiny, CFG)
    with lo.original(tiny):
        with lo.original(tiny):
            pass
        assert torch.equal(tiny(torch.arange(9)[None]).logits, want)


def test_a_conv_layer_is_refused():
    model = Odd()
    before = state(model)
    with pytest.raises(ValueError, match="'conv' is a Conv1d; only nn.Linear"):
        lo.patch(model, lo.OrthoConfig(targets="conv"))
    with pytest.raises(ValueError, match="Conv1d"):
        OrthoLinear.from_linear(model.conv)
    with pytest.raises(ValueError, match="tied.*embeddings"):
        lo.patch(model, lo.OrthoConfig(targets="tied", group_size=16))
    assert same(before, state(model))


def test_patched_and_not_patched(tiny):
    for call in (lambda: lo.unpatch(tiny), lambda: lo.set_alpha(tiny, 0.0), lambda: lo.compartments(tiny)):
        with pytest.raises(ValueError, match="no split layers"):
            call()
    lo.patch(tiny, CFG)
    before = state(tiny)
    with pytest.raises(ValueError, match="patched already"):
        lo.patch(tiny, CFG)
    assert same(before, state(tiny))


@pytest.mark.parametrize(
    "bad, word",
    [
        (2, "0, 1"),
        (-0.5, "0, 1"),
        (float("nan"), "nan"),
        ({"memory": 3}, "memory"),
        ({"other": 0.0}, "'memory'"),
        ({"memory": 0.5, "other": 0.0}, "other"),
    ],
)
def test_a_bad_alpha_moves_no_switch(tiny, bad, word):
    lo.patch(tiny, CFG)
    lo.set_alpha(tiny, 0.25)
    before = fingerprint(tiny)
    with pytest.raises(ValueError, match=word):
        lo.set_alpha(tiny, bad)
    with pytest.raises(ValueError, match=word):
        with lo.alpha(tiny, bad):
            raise AssertionError("the block must not run")
    assert fingerprint(tiny) == before and lo.compartments(tiny)["memory"].alpha == 0.25


def test_alpha_context_restores_also_after_an_error(tiny):
    lo.patch(tiny, CFG)
    lo.set_alpha(tiny, {"memory": 0.75})
    before = fingerprint(tiny)
    with pytest.raises(RuntimeError, match="boom"):
        with lo.alpha(tiny, 0.0):
            assert lo.compartments(tiny)["memory"].alpha == 0.0 and fingerprint(tiny) != before
            raise RuntimeError("boom")
    assert fingerprint(tiny) == before and lo.compartments(tiny)["memory"].alpha == 0.75


def test_compartments_counts(tiny):
    lo.patch(tiny, CFG)
    info = lo.compartments(tiny)["memory"]
    layers = ortho_layers(tiny).values()
    assert info.weights == sum(layer.compartments["memory"].nnz for layer in layers)
    assert info.density == info.weights / sum(layer.weight.numel() for layer in layers)
    assert info.nbytes == sum(layer.compartments["memory"].nbytes for layer in layers)


def test_deepcopy_is_independent(tiny):
    lo.patch(tiny, CFG)
    other = copy.deepcopy(tiny)
    lo.set_alpha(other, 0.0)
    assert lo.compartments(tiny)["memory"].alpha == 1.0 and fingerprint(tiny) != fingerprint(other)
    lo.unpatch(other)
    assert len(ortho_layers(tiny)) == 14


def test_no_warning_reaches_the_user(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lo.patch(tiny, CFG)
        lo.set_alpha(tiny, 0.5)
        tiny(torch.arange(9)[None])
        lo.unpatch(tiny)


def test_a_low_bit_checkpoint_is_pointed_out(real):
    model, _ = real
    with pytest.warns(UserWarning, match="1 of 1 layers already lie on a 4-bit lattice"):
        lo.patch(model, lo.OrthoConfig(targets="model.layers.3.mlp.down_proj"))
    lo.unpatch(model)


def test_generate_says_what_a_model_with_the_rebuilt_weights_says(tiny):
    plain = copy.deepcopy(tiny)
    lo.patch(tiny, CFG)
    for a in (1.0, 0.0):
        lo.set_alpha(tiny, a)
        for name, layer in ortho_layers(tiny).items():
            plain.get_submodule(name).weight.data = layer.dequantize(a)
        out = [m.generate(torch.arange(5)[None], max_new_tokens=8, do_sample=False) for m in (tiny, plain)]
        assert torch.equal(*out)
