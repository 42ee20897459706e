"""The experiment notebooks, rerun small by papermill and held against golden files.

To write golden files anew after a change that is meant: python tests/test_experiments.py [name …]
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from papermill.exceptions import PapermillExecutionError
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


SMALL_SURGERY = {"seeds": [7], "secrets": 2, "targets": "down_proj", "density": 3e-4, "round_density": 2e-5}
SMALL_SURGERY |= {
    "prose_texts": 1,
    "compare_policies": False,
    "methods": [],
    "with_lora": False,
    "compare_curvature": False,
}
SURGERY_TOLERANCES = {"secret_ppl": 3.0, "density": 1.6, "retain": 1.15, "prose": 1.15}


def golden_of_surgery(metrics):
    "Secrets and what is recited are exact; how far the surgery had to go differs a little between machines."
    (trial,) = metrics["trials"]
    states = trial["states"]
    return {
        "secrets": trial["secrets"],
        "leaks": [
            {"off": r["off"], "recited": {n: s["extracted"] for n, s in r["scores"].items()}} for r in trial["leaks"]
        ],
        "switches": {
            n: {"secret_ppl": states[n]["secrets"][n]["secret_ppl"], "density": trial["densities"][n]}
            for n in trial["secrets"]
        },
        "all off": {"retain": states["off"]["retain_ppl"], "prose": states["off"]["prose_ppl"]},
        "criteria": [c["what"] for c in metrics["criteria"]],
    }


GOLDEN = {"01_tofu": (SMALL, golden_of), "02_surgery": (SMALL_SURGERY, golden_of_surgery)}


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


def test_surgery_against_its_golden(tmp_path):
    metrics = run_experiment("02_surgery", tmp_path, **SMALL_SURGERY)
    want = json.loads((GOLDENS / "02_surgery.json").read_text())
    assert not differences(golden_of_surgery(metrics), want, SURGERY_TOLERANCES)
    assert metrics["rivals"][-1]["label"] == "surgery" and (tmp_path / "leaks.png").stat().st_size > 10_000
    for row in want["leaks"]:
        assert all(said == (n not in row["off"]) for n, said in row["recited"].items()), (
            "the golden itself is a failure"
        )


FORGET01 = {"authors": 1, "questions": 3, "epochs": 6, "lr": 3e-4, "every": 15, "budget": 3e-4, "round_density": 2e-5}


@pytest.mark.slow
def test_forget01_runs_small(tmp_path, tofu_data, monkeypatch):
    "Six questions, one retain author: every figure is there, and there was a memory."
    metrics = run_experiment("03_tofu_forget01", tmp_path, data=str(tofu_data), **FORGET01)
    assert metrics["valid"] and set(metrics["forget_quality"]) >= {"control", "full, float", "α = 1", "α = 0"}
    aims = {a["what"]: a for a in metrics["aims"]}
    off = aims["author 1: α=0 − control, exact memorisation"]
    on = sum(metrics["scores"]["α = 1"]["author 1"]["exact_memorisation"]) / 3
    control = sum(metrics["scores"]["control"]["author 1"]["exact_memorisation"]) / 3
    assert off["value"] < on - control, "the switch did nothing"


SMALL_RACE = {"shapes": [[64, 128], [128, 256]], "tokens": [1, 16], "densities": [0.005], "rotate_mb": 1, "rounds": 2}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_performance_runs_small(tmp_path):
    "Every contender has a time in every cell; how long it was is not a test."
    metrics = run_experiment("04_performance", tmp_path, decode=["smollm2-135m"], decode_tokens=2, **SMALL_RACE)
    assert metrics["valid"] and metrics["errors"]["plain"] < 1e-5
    weights = [r["weights"] for r in metrics["decode"]]
    assert weights == ["float32", "base only", "dual", "bfloat16", "base only", "dual"]
    contenders = {r["contender"] for r in metrics["layers"]}
    assert len(metrics["layers"]) == 2 * 2 * len(contenders) and {"bfloat16", "closed", "open 0.005"} <= contenders
    assert all(r["ms"] > 0 for r in metrics["layers"]) and metrics["aims"]


def test_performance_refuses_a_kernel_that_did_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBORTHO_BACKEND", "reference")
    with pytest.raises(PapermillExecutionError, match="INVALID: the compiled kernel is not what would run"):
        run_experiment("04_performance", tmp_path, decode=[], **SMALL_RACE)
    assert not (tmp_path / "metrics.json").exists()


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
    GOLDENS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or GOLDEN:
        parameters, of = GOLDEN[name]
        with tempfile.TemporaryDirectory() as folder:
            golden = of(run_experiment(name, folder, **parameters))
        (GOLDENS / f"{name}.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
        sys.stdout.write(f"wrote {GOLDENS / f'{name}.json'}\n")
