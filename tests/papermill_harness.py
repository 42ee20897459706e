"""Runs an experiment notebook with parameters, refusing parameters that it does not have."""

import json
from pathlib import Path

import papermill

EXPERIMENTS = Path(__file__).resolve().parent.parent / "nbs" / "experiments"


def run_experiment(name, out, **parameters):
    "Run `nbs/experiments/<name>.ipynb` into the folder `out`; returns its metrics. An unknown parameter is refused."
    path = EXPERIMENTS / f"{name}.ipynb"
    known = papermill.inspect_notebook(str(path))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"experiment {name!r} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(path),
        str(out / f"{name}.ipynb"),
        {**parameters, "out": str(out)},
        cwd=str(out),
        progress_bar=False,
        kernel_name="python3",
    )
    return json.loads((out / "metrics.json").read_text())


def differences(got, want, tolerances, path=""):
    """Where `got` departs from the golden `want`, as sentences; only what the golden names is compared.

    `tolerances` maps the last part of a path to a factor: 1.1 lets a number be 10 % larger or smaller.
    Everything without one is exact.
    """
    if isinstance(want, dict):
        missing = [f"{path}/{k} is missing" for k in want if k not in got]
        return missing + [d for k in want if k in got for d in differences(got[k], want[k], tolerances, f"{path}/{k}")]
    if isinstance(want, list):
        if len(got) != len(want):
            return [f"{path} has {len(got)} entries, the golden {len(want)}"]
        return [
            d
            for i, (g, w) in enumerate(zip(got, want, strict=True))
            for d in differences(g, w, tolerances, f"{path}/{i}")
        ]
    factor = tolerances.get(path.rsplit("/", 1)[-1]) if isinstance(want, float) else None
    if factor and got is not None:
        return (
            [] if want / factor <= got <= want * factor else [f"{path} is {got}, the golden {want} (factor {factor})"]
        )
    return [] if got == want else [f"{path} is {got!r}, the golden {want!r}"]
