"""The experiment notebooks, rerun small by papermill and held against golden files.

To write a golden file anew after a change that is meant: python tests/test_experiments.py
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from papermill_harness import differences, run_experiment

GOLDENS = Path(__file__).parent / "goldens"
SMALL = {"policies": ["max", "three_sigma"], "noises": ["none", "pre_clamp"], "densities": [0.05], "prose_texts": 1}
# Masks and counts are exact. Perplexities after training differ between machines; those of a broken model by a lot.
TOLERANCES = {"forget_ppl": 1.5, "retain_ppl": 2.5, "prose_ppl": 2.5}


def golden_of(metrics):
    "The part of the metrics that a golden file holds."
    keep = ("forget_ppl", "extracted", "retain_ppl", "prose_ppl")
    few = lambda m: {k: m[k] for k in keep}  # noqa: E731
    rows = [
        {
            "label": r["label"],
            "density": r["density"],
            "counts": {k: r["counts"][k] for k in ("weights", "stored", "attacked")},
            "alphas": {a: few(m) for a, m in r["alphas"].items()},
            "outcome": r["verdict"]["outcome"],
        }
        for r in metrics["rows"]
    ]
    return {
        "digests": metrics["digests"],
        "valid": metrics["valid"],
        "control": few(metrics["control"]),
        "float": few(metrics["float"]),
        "rows": rows,
    }


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    return run_experiment("01_tofu", tmp_path_factory.mktemp("tofu"), **SMALL)


def test_tofu_against_its_golden(metrics):
    want = json.loads((GOLDENS / "01_tofu.json").read_text())
    assert not differences(golden_of(metrics), want, TOLERANCES)


def test_tofu_shows_the_known_failures(metrics):
    rows = {r["label"]: r for r in metrics["rows"]}
    keeps, breaks = rows["max + none @ 0.05"], rows["three_sigma + none @ 0.05"]
    assert (
        keeps["alphas"]["1"]["extracted"] == keeps["alphas"]["0"]["extracted"] == 1
        and "memory stays" in keeps["verdict"]["short"]
    )
    assert (
        breaks["alphas"]["0"]["extracted"] == 0
        and breaks["alphas"]["0"]["retain_ppl"] > 5 * breaks["alphas"]["1"]["retain_ppl"]
    )
    deep = rows["three_sigma + pre_clamp @ 0.05"]["counts"]
    assert deep["attacked_deep"] > 0 == deep["moved_deep"] and deep["moved"] > 0


def test_unknown_parameters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter 'densitys'.*densities"):
        run_experiment("01_tofu", tmp_path, densitys=[0.1])
    assert not list(tmp_path.iterdir())


def test_the_comparison_can_fail():
    want = {"digests": {"a": "1"}, "rows": [{"forget_ppl": 2.0, "counts": {"stored": 5}}]}

    def change(**kw):
        return {
            "digests": {"a": kw.get("d", "1")},
            "rows": [{"forget_ppl": kw.get("f", 2.0), "counts": {"stored": kw.get("n", 5)}}],
        }

    assert not differences(change(f=2.9), want, TOLERANCES)
    for bad in (change(d="2"), change(f=3.1), change(f=1.2), change(f=None), change(n=6), {"digests": {}, "rows": []}):
        assert differences(bad, want, TOLERANCES)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        golden = golden_of(run_experiment("01_tofu", folder, **SMALL))
    GOLDENS.mkdir(exist_ok=True)
    (GOLDENS / "01_tofu.json").write_text(json.dumps(golden, indent=1) + "\n")
    sys.stdout.write(f"wrote {GOLDENS / '01_tofu.json'}\n")
