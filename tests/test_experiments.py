"""The experiment notebooks, rerun small by papermill and held against golden files.

To write golden files anew after a change that is meant: python tests/test_experiments.py --write [name …]
"""

import argparse
import math
import os
import re
import shutil
import sys
import tempfile

import nbformat
import pytest
from nbclient import NotebookClient
from papermill.exceptions import PapermillExecutionError
from papermill_harness import (
    ARTEFACTS,
    ROOT,
    differences,
    golden,
    read_golden,
    run_experiment,
    swallowed_errors,
    write_golden,
)

SMALL = {"policies": ["max", "three_sigma"], "noises": ["none", "pre_clamp"], "densities": [0.05], "prose_texts": 1}
# Masks and counts are exact. Perplexities after training differ between machines, those of a broken model by a lot, and
# in proportion: so their logarithm is what a golden holds, and 0.18 is a factor of 1.5.
TOLERANCES = {"log10 forget_ppl": (0.0, 0.18), "log10 retain_ppl": (0.0, 0.4), "log10 prose_ppl": (0.0, 0.4)}


def logs(values, *keys):
    return {f"log10 {k}": math.log10(values[k]) for k in keys}


def golden_of(metrics):
    "The part of the metrics that a golden file holds."
    few = lambda m: {"extracted": m["extracted"]} | logs(m, "forget_ppl", "retain_ppl", "prose_ppl")  # noqa: E731
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
SURGERY_TOLERANCES = {"log10 secret_ppl": (0.0, 0.48), "log10 density": (0.0, 0.2)}
SURGERY_TOLERANCES |= {"log10 retain_ppl": (0.0, 0.06), "log10 prose_ppl": (0.0, 0.06)}


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
            n: logs(states[n]["secrets"][n], "secret_ppl") | {"log10 density": math.log10(trial["densities"][n])}
            for n in trial["secrets"]
        },
        "all off": logs(states["off"], "retain_ppl", "prose_ppl"),
        "criteria": [c["what"] for c in metrics["criteria"]],
    }


# The same two secrets and operation for every experiment that looks at a model with switches: they share stages.
SWITCHED = {"secrets": 2, "seed": 7, "targets": "down_proj", "density": 3e-4, "round_density": 2e-5}
SEVERAL = {k: v for k, v in SWITCHED.items() if k != "seed"} | {"seeds": [SWITCHED["seed"]]}  # of several models: one
SMALL_PRIVACY = SEVERAL | {"others": 16, "alternatives": 7, "singles": 1, "prose_texts": 1}
PRIVACY_TOLERANCES = {"log10 retain_ppl": (0.0, 0.06), "log10 prose_ppl": (0.0, 0.06), "log10 secret_ppl": (0.0, 0.48)}


def golden_of_privacy(metrics):
    "What is recited is exact, and so is the exposure of what is known; ranks of what is not known differ."
    states = metrics["states"]
    rest = {s: logs(m, "retain_ppl", "prose_ppl") for s, m in states.items()}
    return {
        "secrets": metrics["secrets"],
        "recited": {s: m["recited"] for s, m in states.items()},
        "exposure": {s: states[s]["exposure"] for s in ("float", "α = 1")},
        "one switch closed": metrics["one switch closed"],
        "rest": rest,
        "known": {n: {"log10 secret_ppl": math.log10(x)} for n, x in states["α = 1"]["secret_ppl"].items()},
    }


SMALL_TUNER = {
    "secrets": 1,
    "seed": 7,
    "noise": ["none", "counter_memory"],
    "targets": ["down_proj"],
    "density": [0.05],
}
SMALL_TUNER |= {"scale": ["max", "three_sigma"], "projection": ["nearest"], "budget": [3e-4], "round_density": [2e-5]}
SMALL_TUNER |= {"prose_texts": 1, "trials": 5, "races": 2, "workers": 1}


def golden_of_tuner(metrics):
    "Which policies succeed, and which are dropped; how the search gets there on so small a table is no figure."
    few = lambda o: {"point": o["point"], "dropped": bool(o["dropped"]), "verdict": o["verdict"].split(":")[0]}  # noqa: E731
    return {"outcomes": [few(o) for o in metrics["outcomes"]]}


SMALL_UTILITY = SWITCHED | {"texts": 1, "rivals": ["RTN, least squares"], "lm_eval": False}


def golden_of_utility(metrics):
    "The null test and what is recited are exact."
    null = {k: v for k, v in metrics["null"].items() if not k.startswith("kernel")}  # that one is an error of rounding
    rows = {n: {"recited": r["recited"]} | logs(r, "prose", "facts") for n, r in metrics["rows"].items()}
    return {"null": null, "rows": rows}


SMALL_GENIUS = {"bits": [3], "densities": [0.05], "sieves": ["residual"], "projections": ["nearest"], "asked": 48}


def golden_of_genius(metrics):
    "Training in a skill ends a little differently on every machine; that random weights bring nothing back does not."
    few = lambda r: {k: r[k] for k in ("accuracy", "answers", "prose")}  # noqa: E731
    rows = [{k: r[k] for k in ("bits", "rounding", "sieve", "density")} | few(r) for r in metrics["rows"]]
    return {"chance": metrics["chance"], "rows": rows} | {k: few(metrics[k]) for k in ("float", "control")}


SMALL_GEOMETRY = SWITCHED | {"within_kind": False, "every": 10, "prose_texts": 1, "curvature_texts": 1, "operated": 2}
SMALL_GEOMETRY |= {"neutral_steps": 2, "neutral_batch": 4}


def golden_of_geometry(metrics):
    tests = {n: {k: t[k] for k in ("observed", "null", "deals")} for n, t in metrics["tests"].items()}
    return {"recited": metrics["recited"], "tests": tests}


SMALL_ATTACKS = SEVERAL | {"cap": 20, "changes": ["NF4, blocks of 64", "pruned, 30 %"], "side_cap": 2, "fresh": 4}
SMALL_ATTACKS |= {"temperatures": [0.7], "samples": 2}


def golden_of_attacks(metrics):
    "Who recites is exact; how many steps a secret takes to come back differs by a few."
    (before,) = metrics["before"].values()
    known = {
        w: {n: {k: s[k] for k in ("em", "out", "tokens")} for n, s in before[w]["secrets"].items()} for w in before
    }
    weights = [{k: r[k] for k in ("attack", "extracted", "control", "exact memorisation")} for r in metrics["weights"]]
    out = lambda asked: {h: {k: r[k] for k in ("out, off", "out, control")} for h, r in asked.items()}  # noqa: E731
    side = {k: {n: x >= 0.99 for n, x in best.items()} for k, best in metrics["side"].items()}
    return {
        "before": known,
        "weights": weights,
        "prompts": out(metrics["prompts"]),
        "samples": out(metrics["samples"]),
        "back by training on others": side,
        "steps": metrics["steps"],
    }


SMALL_DP = {"secrets": 2, "seed": 7, "decoys": 4, "epsilons": [1e6, 10.0]}


def golden_of_dp(metrics):
    "σ follows from the clip norm, and that from the length of one training; with ε = 10 nothing is left."
    norms = {n: {k: v[k] for k in ("clip norm C", "sensitivity")} for n, v in metrics["norms"].items()}
    rows = [r for r in metrics["rows"] if r["ε"] != 1e6]
    rows = [{k: r[k] for k in ("release", "ε", "σ", "recited")} for r in rows]
    return {"norms": norms, "rows": rows} | {k: metrics[k] for k in ("weights", "places", "delta", "relation")}


FORGET01 = {"authors": 1, "questions": 3, "epochs": 6, "lr": 3e-4, "every": 15, "budget": 3e-4, "round_density": 2e-5}


def golden_of_forget01(metrics):
    "Three questions an author: what each state says of them, and of what is to stay."
    mean = lambda v: sum(v["exact_memorisation"]) / len(v["exact_memorisation"])  # noqa: E731
    scores = {state: {k: mean(v) for k, v in row.items()} for state, row in metrics["scores"].items()}
    return {"scores": scores, "aims": [a["what"] for a in metrics["aims"]]}


SMALL_RACE = {"shapes": [[64, 128], [128, 256]], "tokens": [1, 16], "densities": [0.005], "rotate_mb": 1, "rounds": 2}
SMALL_RACE |= {"decode": ["smollm2-135m"], "decode_tokens": 2}


def golden_of_performance(metrics):
    "Who raced, and how much memory a token reads; how long it took is no golden."
    layers = [r for r in metrics["layers"] if r["contender"] != "bitsandbytes"]
    return {
        "layers": [{k: r[k] for k in ("shape", "tokens", "contender")} for r in layers],
        "decode": [{k: r[k] for k in ("activations", "weights", "read for a token, MB")} for r in metrics["decode"]],
    }


FORGET01_TOLERANCES = {k: (0.0, 0.15) for k in ("author 1", "author 2", "paraphrased", "never trained", "world facts")}
FORGET01_TOLERANCES |= {k: (0.0, 0.15) for k in ("retain, in calibration", "retain, not in calibration")}
GOLDEN = {
    "01_tofu": (SMALL, golden_of, TOLERANCES),
    "02_surgery": (SMALL_SURGERY, golden_of_surgery, SURGERY_TOLERANCES),
    "03_tofu_forget01": (FORGET01, golden_of_forget01, FORGET01_TOLERANCES),
    "04_performance": (SMALL_RACE, golden_of_performance, {"read for a token, MB": (0.05, 0.0)}),
    "05_privacy": (SMALL_PRIVACY, golden_of_privacy, PRIVACY_TOLERANCES),
    "06_utility": (SMALL_UTILITY, golden_of_utility, {"log10 prose": (0.0, 0.06), "log10 facts": (0.0, 0.06)}),
    "07_genius": (
        SMALL_GENIUS,
        golden_of_genius,
        {"accuracy": (0.0, 0.2), "answers": (0.0, 0.4), "prose": (0.05, 0.0)},
    ),
    "08_geometry": (SMALL_GEOMETRY, golden_of_geometry, {"observed": (0.1, 0.0), "null": (0.1, 0.0)}),
    "09_attacks": (
        SMALL_ATTACKS,
        golden_of_attacks,
        {"em": (0.0, 0.15), "exact memorisation": (0.0, 0.15), "off": (0.0, 3.0), "control": (0.0, 3.0)},
    ),
    "10_dual_dp": (
        SMALL_DP,
        golden_of_dp,
        {"clip norm C": (0.05, 0.0), "sensitivity": (0.05, 0.0), "σ": (0.05, 0.0)},
    ),
    "11_tuner": (SMALL_TUNER, golden_of_tuner, {}),
}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    return run_experiment("01_tofu", tmp_path_factory.mktemp("tofu"), **SMALL)


def test_tofu_against_its_golden(metrics):
    assert not differences(golden_of(metrics), read_golden("01_tofu"))
    assert (ARTEFACTS / "01_tofu.ipynb").exists()


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
    assert not differences(golden_of_surgery(metrics), read_golden("02_surgery"))
    assert metrics["rivals"][-1]["label"] == "surgery" and (tmp_path / "leaks.png").stat().st_size > 10_000
    for row in golden_of_surgery(metrics)["leaks"]:
        assert all(said == (n not in row["off"]) for n, said in row["recited"].items())


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.mark.slow
def test_privacy_against_its_golden(tmp_path, stages):
    metrics = run_experiment("05_privacy", tmp_path, keep=str(stages), **SMALL_PRIVACY)
    assert not differences(golden_of_privacy(metrics), read_golden("05_privacy"))
    aims = {a["what"]: a for a in metrics["aims"]}
    for off in ("α = 0", "α = 0, peers"):
        assert (
            aims[f"{off}: secrets recited"]["holds"] and aims[f"{off}, one switch closed: its secret is gone"]["holds"]
        )


@pytest.mark.slow
def test_the_tuner_against_its_golden(tmp_path):
    metrics = run_experiment("11_tuner", tmp_path, keep=str(tmp_path / "keep"), **SMALL_TUNER)
    assert not differences(golden_of_tuner(metrics), read_golden("11_tuner"))
    found = {o["point"]["noise"]: o["verdict"] for o in metrics["outcomes"]}
    assert found["counter_memory"].startswith("SUCCESS")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["06_utility", "07_genius", "08_geometry", "09_attacks", "10_dual_dp"])
def test_the_rest_against_their_goldens(tmp_path, stages, name):
    parameters, of, _ = GOLDEN[name]
    metrics = run_experiment(name, tmp_path, keep=str(stages), **parameters)
    assert not differences(of(metrics), read_golden(name))
    assert metrics["valid"] and metrics["headline"] and list(tmp_path.glob("*.png"))
    assert all(isinstance(a["holds"], bool) and a["value"] is not None for a in metrics["aims"])
    if name == "07_genius":
        solved = {r["sieve"]: r["accuracy"] for r in metrics["rows"] if r["density"]}
        assert solved["impact, skill"] > solved["residual"] > solved["random"]


@pytest.mark.slow
def test_forget01_runs_small(tmp_path, tofu_data, monkeypatch):
    "Six questions, one retain author: every figure is there, and there was a memory."
    metrics = run_experiment("03_tofu_forget01", tmp_path, data=str(tofu_data), **FORGET01)
    assert not differences(golden_of_forget01(metrics), read_golden("03_tofu_forget01"))
    assert metrics["valid"] and set(metrics["forget_quality"]) >= {"control", "full, float", "α = 1", "α = 0"}
    aims = {a["what"]: a for a in metrics["aims"]}
    off = aims["author 1: α=0 − control, exact memorisation"]
    on = sum(metrics["scores"]["α = 1"]["author 1"]["exact_memorisation"]) / 3
    control = sum(metrics["scores"]["control"]["author 1"]["exact_memorisation"]) / 3
    assert off["value"] < on - control, "the switch did nothing"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_performance_runs_small(tmp_path):
    "Every contender has a time in every cell; how long it was is not a test."
    metrics = run_experiment("04_performance", tmp_path, **SMALL_RACE)
    assert not differences(golden_of_performance(metrics), read_golden("04_performance"))
    assert metrics["valid"] and metrics["errors"]["plain"] < 1e-5
    weights = [r["weights"] for r in metrics["decode"]]
    assert weights == ["float32", "base only", "dual", "bfloat16", "base only", "dual"]
    contenders = {r["contender"] for r in metrics["layers"]}
    assert len(metrics["layers"]) == 2 * 2 * len(contenders) and {"bfloat16", "closed", "open 0.005"} <= contenders
    assert all(r["ms"] > 0 for r in metrics["layers"]) and metrics["aims"]


def test_performance_refuses_a_kernel_that_did_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBORTHO_BACKEND", "reference")
    with pytest.raises(PapermillExecutionError, match="INVALID: the compiled kernel is not what would run"):
        run_experiment("04_performance", tmp_path, **SMALL_RACE | {"decode": []})
    assert not (tmp_path / "metrics.json").exists()


def test_unknown_parameters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter 'densitys'.*densities"):
        run_experiment("01_tofu", tmp_path, densitys=[0.1])
    assert not list(tmp_path.iterdir())


def test_the_comparison_can_fail():
    data = {"digests": {"a": "1"}, "rows": [{"log10 forget_ppl": 0.5, "counts": {"stored": 5}, "on": True}]}
    want = golden(data, TOLERANCES, {})
    assert want["environment"]["torch"] and not differences(data, want)

    def change(digest="1", ppl=0.5, stored=5, on=True):
        return {"digests": {"a": digest}, "rows": [{"log10 forget_ppl": ppl, "counts": {"stored": stored}, "on": on}]}

    assert not differences(change(ppl=0.67), want)
    bad = [change(digest="2"), change(ppl=0.69), change(ppl=0.31), change(ppl=None), change(ppl=math.nan)]
    bad += [change(stored=6), change(stored=5.0), change(on=1), {"digests": {"a": "1"}, "rows": []}, {}]
    assert all(differences(b, want) for b in bad)
    assert differences(change(ppl=0.9), want) == ["/rows/0/log10 forget_ppl was 0.5, is 0.9 (rtol 0, atol 0.18)"]


def test_a_widget_that_swallows_an_error_is_found(tmp_path):
    "A callback that raises inside interactive_output leaves a cell that looks fine."
    cell = "import ipywidgets as w\ns = w.FloatSlider()\nw.interactive_output(lambda x: 1 / 0, {'x': s})"
    for source, errors in ((cell, ["ZeroDivisionError: division by zero"]), (cell.replace("1 / 0", "print(x)"), [])):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        NotebookClient(nb, kernel_name="python3").execute()
        nbformat.write(nb, tmp_path / "nb.ipynb")
        assert swallowed_errors(tmp_path / "nb.ipynb") == errors


@pytest.mark.slow
def test_a_planted_regression_is_caught(tmp_path, monkeypatch):
    "A copy of the library in which one noise mode lands one grid point lower."
    shutil.copytree(ROOT / "libortho", tmp_path / "libortho", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("kernels", "nbs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    noise = tmp_path / "libortho" / "noise.py"
    text, count = re.subn(r"(def noise_tri_state.*?lowest=)5", r"\g<1>4", noise.read_text(), flags=re.S)
    assert count == 1
    noise.write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    metrics = run_experiment(
        "01_tofu", tmp_path / "out", policies=["max"], noises=["none"], densities=[0.05], prose_texts=1
    )
    want = read_golden("01_tofu")
    want["values"] = {p: v for p, v in want["values"].items() if p.startswith("/digests/")}
    changed = differences({"digests": metrics["digests"]}, want)
    assert changed and all("tri_state" in line for line in changed) and len(changed) == 10


def write(names):
    from conftest import DATA

    for name in names or GOLDEN:
        parameters, of, tolerances = GOLDEN[name]
        data = {"data": str(DATA / "tofu")} if name == "03_tofu_forget01" else {}
        with tempfile.TemporaryDirectory() as folder:
            write_golden(name, of(run_experiment(name, folder, **data, **parameters)), tolerances, parameters)
        sys.stdout.write(f"wrote {name}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", nargs="*", metavar="NAME", help="golden files to write anew; all without a name")
    args = parser.parse_args()
    if args.write is None:
        parser.error("nothing is written without --write")
    write(args.write)
