"""Runs experiment notebooks small, keeps what they executed, and holds their figures against golden files.

A golden file names values, each with its own rtol and atol, and the environment they were measured in. It is only
written by `python tests/test_experiments.py --write NAME …`.
"""

import json
import math
import os
import shutil
from pathlib import Path

import nbformat

from libortho import experiment

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).resolve().parent / "goldens"
ARTEFACTS = ROOT / "reports" / "regression"  # executed notebooks of the last test run, to look at


def run_experiment(name, out, **parameters):
    """Run an experiment into the folder `out`; returns its metrics.

    The executed notebook is left in `reports/regression`, also where a cell failed. An error that a widget swallowed is
    an error here.
    """
    out = Path(out)
    executed = out / f"{experiment.find_experiment(name).stem}.ipynb"
    try:
        metrics = experiment.run_experiment(name, out, parameters)
    finally:
        if executed.exists():
            ARTEFACTS.mkdir(parents=True, exist_ok=True)
            part = ARTEFACTS / f".{executed.name}.{os.getpid()}"
            shutil.copyfile(executed, part)
            part.replace(ARTEFACTS / executed.name)
    found = swallowed_errors(executed)
    assert not found, f"{executed.name}: a widget swallowed {found[0]}"
    return metrics


def swallowed_errors(notebook):
    "Errors that `interactive_output` or an `Output` context kept to themselves, from the widgets' state."
    nb = nbformat.read(notebook, as_version=4)
    states = nb.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    outputs = [o for w in states.values() for o in w.get("state", {}).get("outputs", [])]
    outputs += [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    return [f"{o['ename']}: {o['evalue']}" for o in outputs if o.get("output_type") == "error"]


def leaves(data, path=""):
    "Every single value of nested data by its path; the length of a list counts as one."
    if isinstance(data, dict):
        return {p: v for k, x in data.items() for p, v in leaves(x, f"{path}/{k}").items()}
    if isinstance(data, (list, tuple)):
        found = {f"{path}/length": len(data)}
        return found | {p: v for i, x in enumerate(data) for p, v in leaves(x, f"{path}/{i}").items()}
    return {path: data}


def golden(data, tolerances, parameters):
    """What a golden file holds. `tolerances` maps the last part of a path to (rtol, atol); numbers without one, and
    everything that is no number, are exact."""
    values = {}
    for path, value in leaves(data).items():
        rtol, atol = tolerances.get(path.rsplit("/", 1)[-1], (0.0, 0.0)) if isinstance(value, float) else (0.0, 0.0)
        values[path] = {"value": value, "rtol": rtol, "atol": atol}
    return {"environment": experiment.environment(), "parameters": parameters, "values": values}


def differences(data, want):
    "Where data departs from a golden, as sentences with the old value, the new one and the tolerance."
    found, got = [], leaves(data)
    for path, g in want["values"].items():
        if path not in got:
            found.append(f"{path} is missing; it was {g['value']!r}")
        elif not close(got[path], **g):
            bound = f"rtol {g['rtol']:g}, atol {g['atol']:g}" if g["rtol"] or g["atol"] else "exact"
            found.append(f"{path} was {g['value']!r}, is {got[path]!r} ({bound})")
    return found + [f"{path} is new: {got[path]!r}" for path in got if path not in want["values"]]


def close(new, value, rtol, atol):
    if not isinstance(value, float) or isinstance(new, (bool, str)) or new is None:
        return type(new) is type(value) and new == value
    return new == value or (math.isfinite(new) and abs(new - value) <= atol + rtol * abs(value))


def read_golden(name):
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


def write_golden(name, data, tolerances, parameters):
    GOLDENS.mkdir(exist_ok=True)
    text = json.dumps(golden(data, tolerances, parameters), indent=1, ensure_ascii=False)
    (GOLDENS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
