"""Pictures of a weight: every number in them against an independent computation."""

import json

import numpy as np
import pytest
import torch

from libortho import weights as lw
from libortho.plots import COLOURS
from libortho.streams import OrthoConfig, split

CONFIGS = [
    OrthoConfig(density=0.02),
    OrthoConfig(scale="ratio", scale_args={"r": 2.5}, group_size=16, density=0.1, noise="tri_state"),
    OrthoConfig(scale="three_sigma", group_size="row", sieve="magnitude", density=0.05, noise="post_clamp", bits=3),
    OrthoConfig(scale="quantile", group_size="tensor", sieve="impact", density=0.3, noise="pre_clamp", seed=5),
    OrthoConfig(scale="max", group_size=32, sieve="impact", sparsity=0.9, noise="deep_focal", attack_density=0.04),
    OrthoConfig(scale="percentile", bits=2, per_row=True, density=0.2, noise="tri_state"),
]


@pytest.fixture(scope="module")
def w():
    gen = torch.Generator().manual_seed(7)
    return torch.randn(96, 128, generator=gen) ** 3 * 0.02


@pytest.fixture(scope="module")
def h():
    return torch.rand(128, generator=torch.Generator().manual_seed(8)) * 10


def same(a, b):
    return json.loads(a.to_json()) == json.loads(b.to_json())


@pytest.mark.parametrize("cfg", CONFIGS)
def test_it_is_the_split_that_the_model_would_get(w, h, cfg):
    a, s = lw.dissect(w, cfg, "layer", h), split(w, cfg, "layer", h)
    assert torch.equal(a.p, s.base.integers()) and torch.equal(a.lattice.s, s.base.scales.float())
    assert torch.equal(a.storage, s.compartments["memory"].mask())
    n = lw.health(a)
    found = (n.stored, n.attacked, n.moved, round(n.clamped * n.weights))
    assert found == tuple(s.stats[k] for k in ("stored", "attacked", "moved", "saturated"))
    joined = [torch.cat([getattr(x, k) for x in lw.pieces(a, 700)]) for k in ("p", "storage", "attacked")]
    assert all(torch.equal(x, y) for x, y in zip(joined, (a.p, a.storage, a.attacked), strict=True))


@pytest.mark.parametrize("cfg", CONFIGS)
@pytest.mark.parametrize("weighed", [False, True])
def test_errors_are_those_of_the_reconstructed_weight(w, h, cfg, weighed):
    s, column = split(w, cfg, "layer", h), (h if weighed else torch.ones(128)).double()
    a = lw.dissect(w, cfg, "layer", h)
    n = lw.health(a if weighed else lw.replace(a, h=None), repair=0.01)

    def error(x):
        return ((w.double() - x).square() @ column).sum().div((w.double().square() @ column).sum()).sqrt().item()

    assert n.off == pytest.approx(error(s.reconstruct(0.0)), rel=1e-5) and n.output == weighed
    assert n.on == pytest.approx(error(s.reconstruct(1.0)), rel=1e-5)
    nearest = split(w, OrthoConfig(**(cfg.to_dict() | {"noise": "none", "attack_density": None})), "layer", h)
    base = nearest.base.dequantize()
    assert n.rounded == pytest.approx(error(base), rel=1e-5)
    worst = ((w - base).square() * column.float()).flatten().argsort(descending=True)[: round(0.01 * w.numel())]
    base.view(-1)[worst] = w.reshape(-1)[worst]
    assert n.repaired == pytest.approx(error(base), rel=1e-4)
    assert n.zero == pytest.approx((s.base.integers() == 0).double().mean().item())


@pytest.mark.parametrize("cfg", CONFIGS)
def test_the_ruler_counts_every_weight_once(w, h, cfg, monkeypatch):
    a, s = lw.dissect(w, cfg, "layer", h), split(w, cfg, "layer", h)
    scales = s.base.scales.float().numpy()
    v = w.numpy() / np.repeat(scales, 128 // scales.shape[1], 1)
    r, mask, top = lw.ruler(a), s.compartments["memory"].mask().numpy(), a.top
    clipped = np.clip(v, r.edges[0], np.nextafter(r.edges[-1], 0))
    assert (r.weights == np.histogram(clipped, r.edges)[0]).all()
    assert (r.stored == np.histogram(clipped[mask], r.edges)[0]).all()
    assert r.weights.sum() == w.numel() and r.stored.sum() == mask.sum()
    levels = s.base.integers().numpy()[mask]
    assert r.levels.tolist() == [(levels == k).sum() for k in range(-top, top + 1)]
    assert r.clamped == pytest.approx((abs(v) > top + 0.5).mean(), abs=1e-4)
    assert r.mass == pytest.approx(
        (w.numpy()[mask].astype(float) ** 2).sum() / (w.double() ** 2).sum().item(), rel=1e-5
    )
    assert r.scale == pytest.approx(np.quantile(scales, [0.05, 0.5, 0.95]).tolist())
    whole = lw.pieces
    monkeypatch.setattr(lw, "pieces", lambda a: whole(a, 1000))
    again = lw.ruler(a)
    assert (
        (again.weights == r.weights).all() and (again.levels == r.levels).all() and again.mass == pytest.approx(r.mass)
    )


def test_a_sample_has_one_row_of_every_band():
    rows = lw.sample_rows((2048, 5632), 2**19)
    assert len(rows) == 2**19 // 5632 and (np.diff(rows) > 0).all()
    edges = np.linspace(0, 2048, len(rows) + 1).astype(int)
    assert (np.histogram(rows, edges)[0] == 1).all()
    assert (rows == lw.sample_rows((2048, 5632), 2**19)).all() and (
        rows != lw.sample_rows((2048, 5632), 2**19, 1)
    ).any()
    assert lw.sample_rows((50, 8), 400).tolist() == list(range(50)) and len(lw.sample_rows((9, 1000), 10)) == 1


@pytest.mark.parametrize("what", list(lw.MASKS))
def test_blocks_are_sums_of_the_mask(w, h, what):
    cfg = CONFIGS[1]
    a, s = lw.dissect(w, cfg, "layer", h), split(w, cfg, "layer", h)
    v = w / s.base.scales.float().repeat_interleave(16, 1)
    plain = split(w, OrthoConfig(**(cfg.to_dict() | {"noise": "none"})), "layer", h)
    masks = {
        "stored": s.compartments["memory"].mask(),
        "clamped": v.abs() > 7.5,
        "moved": s.base.integers() != plain.base.integers(),
    }
    for rows, columns in ((None, None), ((5, 90), (0, 128)), ((40, 47), (100, 128)), ((95, 96), (3, 4))):
        b, mask = lw.blocks(a, what, rows, columns, most=(10, 7)), masks[what].double()
        (r0, r1), (c0, c1) = rows or (0, 96), columns or (0, 128)
        assert (b.row_edges[0], b.row_edges[-1], b.column_edges[0], b.column_edges[-1]) == (r0, r1, c0, c1)

        def spans(e):
            return list(zip(e[:-1], e[1:], strict=True))

        shares = [[mask[i:j, k:m].mean() for k, m in spans(b.column_edges)] for i, j in spans(b.row_edges)]
        assert np.allclose(b.share, shares) and b.total == mask[r0:r1, c0:c1].sum()
        assert np.allclose(b.rows, [mask[i:j, c0:c1].mean() for i, j in spans(b.row_edges)])
        assert np.allclose(b.columns, [mask[r0:r1, k:m].mean() for k, m in spans(b.column_edges)])
    near = lw.blocks(a, what, (40, 60), (10, 90))
    assert (near.share == masks[what][40:60, 10:90].numpy()).all()
    assert (near.single[..., 0] == w[40:60, 10:90].numpy()).all()
    assert (near.single[..., 3] == s.base.integers()[40:60, 10:90].numpy()).all()


def test_blocks_of_a_sample_leave_open_what_was_not_seen(w):
    rows = lw.sample_rows((96, 128), 12 * 128)
    part = lw.dissect(w[rows], CONFIGS[0], rows=rows, height=96)
    b = lw.blocks(part)
    assert b.share.shape == (12, 96) and np.isfinite(b.share).all() and part.scope == "12 of 96 rows"
    gap = next(r for r in range(96) if r not in rows)
    unseen = lw.blocks(part, rows=(gap, gap + 1))
    assert np.isnan(unseen.share).all() and unseen.single is None and unseen.total == 0
    assert "12 of 96 rows" in lw.figure_blocks(b).layout.title.text
    assert "12 of 96 rows" in lw.figure_ruler(lw.ruler(part)).layout.title.text
    assert "12 of 96 rows" in lw.figure_residuals(lw.residuals(part)).layout.title.text
    assert dict(lw.health(part).rows())["looked at"] == "12 of 96 rows" and not lw.health(part).whole
    assert dict(lw.health(part).rows())["clamped"].startswith("≈")
    assert lw.health(part).stored == round(0.02 * w.numel())
    lw.figure_blocks(unseen)


def test_blocks_say_what_they_cannot_do(w):
    a = lw.dissect(w)
    for bad in ((-1, 5), (5, 5), (90, 97)):
        with pytest.raises(ValueError, match=r"rows must be a window within 0 … 96, got"):
            lw.blocks(a, rows=bad)
    with pytest.raises(ValueError, match=r"columns must be a window within 0 … 128"):
        lw.blocks(a, columns=(0, 129))
    with pytest.raises(ValueError, match="mask 'lost' is not known; choose one of stored, clamped, moved"):
        lw.blocks(a, "lost")


@pytest.mark.parametrize("cfg", CONFIGS)
def test_residuals_are_counted_where_they_are(w, h, cfg):
    a, s = lw.dissect(w, cfg, "layer", h), split(w, cfg, "layer", h)
    e, base, mask = lw.residuals(a), s.base.dequantize(), s.compartments["memory"].mask()
    size, wrong = w.abs().numpy(), (w - base).abs().numpy()

    def inside(x, edges):
        return np.clip(x, edges[0], np.nextafter(edges[-1], 0)).ravel()

    reference = np.histogram2d(
        inside(wrong, e.residual_edges), inside(size, e.size_edges), bins=[e.residual_edges, e.size_edges]
    )[0]
    assert e.counts.sum() == w.numel() and abs(e.counts - reference).sum() <= 0.002 * w.numel()
    stored = set(zip(size[mask].tolist(), wrong[mask].tolist(), strict=True))
    assert {tuple(x) for x in e.stored.tolist()} <= stored and e.total == mask.sum()
    assert len(e.stored) == min(400, e.total)


@pytest.mark.parametrize("cfg", CONFIGS[1:])
def test_filling_a_figure_is_making_it_anew(w, h, cfg):
    old, new = lw.dissect(w, CONFIGS[0]), lw.dissect(w, cfg, "layer", h)
    assert same(lw.fill_ruler(lw.figure_ruler(lw.ruler(old)), lw.ruler(new)), lw.figure_ruler(lw.ruler(new)))
    near = lw.blocks(new, "moved", (1, 30), (0, 60))
    assert same(lw.fill_blocks(lw.figure_blocks(lw.blocks(old)), near), lw.figure_blocks(near))
    back = lw.fill_blocks(lw.figure_blocks(near), lw.blocks(old))
    assert back.data[0].customdata is None and np.allclose(back.data[0].z, 100 * lw.blocks(old).share)
    made = lw.figure_residuals(lw.residuals(new))
    assert same(lw.fill_residuals(lw.figure_residuals(lw.residuals(old)), lw.residuals(new)), made)


def test_figures_show_their_data(w):
    a = lw.dissect(w, CONFIGS[1])
    r, b, e = lw.ruler(a), lw.blocks(a), lw.residuals(a)
    every, stored, levels, clamp, step = lw.figure_ruler(r).data
    assert (
        np.nansum(every.y) == w.numel() and np.nansum(stored.y) == r.stored.sum() and list(levels.x) == [*range(-7, 8)]
    )
    assert {x for x in clamp.x if x is not None} == {-7.5, 7.5} and f"{r.scale[1]:.2g}" in step.text[1]
    assert every.marker.color == COLOURS["base"] and stored.marker.color == COLOURS["ortho"]
    assert np.allclose(lw.figure_blocks(b).data[0].z, 100 * b.share)
    logs = lw.figure_residuals(e).data[0].z.astype(float)
    assert np.nansum(10**logs) == pytest.approx(w.numel(), rel=1e-5)
    for fig in (lw.figure_ruler(r), lw.figure_blocks(b), lw.figure_residuals(e)):
        assert fig.layout.paper_bgcolor == fig.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"
        assert len(fig.to_json()) < 150_000  # histograms, not weights


def test_what_is_not_known_is_sent_as_none(w):
    rows = lw.sample_rows((96, 128), 12 * 128)
    part = lw.dissect(w[rows], CONFIGS[0], rows=rows, height=96)
    gap = next(r for r in range(96) if r not in rows)
    b, unseen, e = lw.blocks(part), lw.blocks(part, rows=(gap, gap + 1)), lw.residuals(part)
    half = lw.replace(b, share=np.where(np.arange(12)[:, None] % 2, np.nan, b.share))
    for fig, open_ in (
        (lw.figure_blocks(b), np.isnan(b.share)),
        (lw.figure_blocks(unseen), np.isnan(unseen.share)),
        (lw.fill_blocks(lw.figure_blocks(b), half), np.isnan(half.share)),
        (lw.figure_residuals(e), e.counts == 0),
    ):
        z = fig.data[0].z.tolist()  # plotly sends an array of two dimensions as lists
        assert json.loads(json.dumps(z, allow_nan=False)) == z
        assert ([[x is None for x in row] for row in z] == open_).all()
        assert json.dumps(np.asarray(fig.data[0].customdata).tolist(), allow_nan=False)
    assert lw.figure_blocks(unseen).data[0].z.tolist() == [[None] * 96]
    kept = lw.fill_blocks(lw.figure_blocks(b), half).data[0].z[::2].astype(float)
    assert np.allclose(kept, 100 * b.share[::2])


def test_the_static_twins_show_the_same(w):
    a = lw.dissect(w, CONFIGS[1])
    b, e = lw.blocks(a), lw.residuals(a)
    heat = lw.plot_blocks(b).axes[1]
    assert np.allclose(heat.images[0].get_array(), 100 * b.share) and heat.get_xlabel() == "column (input)"
    ax = lw.plot_residuals(e).axes[0]
    assert ax.collections[0].get_array().sum() == w.numel() and (ax.get_xlabel(), ax.get_ylabel()) == (
        "|w|",
        "|w − base|",
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (70, 16)])
def test_a_weight_of_zeros_has_pictures_too(shape):
    a = lw.dissect(torch.zeros(shape), OrthoConfig(group_size="row", density=0.5))
    for figure in (lw.figure_ruler(lw.ruler(a)), lw.figure_blocks(lw.blocks(a)), lw.figure_residuals(lw.residuals(a))):
        assert figure.data
    n = lw.health(a)
    assert (n.rounded, n.off, n.on, n.zero) == (0, 0, 0, 1)


def test_bad_input_is_named(w):
    broken = w.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'ffn' holds 1 NaN"):
        lw.rounded(broken, name="ffn")
    with pytest.raises(ValueError, match="counter_memory"):
        lw.dissect(w, OrthoConfig(noise="counter_memory"))
    with pytest.raises(ValueError, match="density must be in"):
        lw.health(lw.dissect(w), repair=2)
