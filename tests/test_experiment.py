"""Running a notebook as an experiment: parameters, gates, files, exit codes."""

import json

import nbformat
import pytest
from typer.testing import CliRunner

from libortho import experiment
from libortho.cli import app

CELLS = {
    "good": """from libortho.experiment import Aim, write_results
aims = [Aim("size", float(size), low=2), Aim("words", len(words), high=1)]
write_results(out, {"valid": True, "headline": f"{size} of {words} in {keep}"}, aims)""",
    "invalid": 'assert size > 1, "INVALID: too small"',
    "broken": "1 / (size - size)",
}


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    "Three experiments: one that works, one whose gate can refuse, one with a mistake."
    made = {}
    for i, (name, source) in enumerate(CELLS.items()):
        title = nbformat.v4.new_markdown_cell(f"# 0{i} {name}\n\n> What {name} does.")
        parameters = nbformat.v4.new_code_cell(
            'size = 1  # how large\nwords = ["a"]  # which\nkeep = ""  # folder\nout = "x"  # folder'
        )
        parameters.metadata["tags"] = ["parameters"]
        nb = nbformat.v4.new_notebook(cells=[title, parameters, nbformat.v4.new_code_cell(source)])
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
        made[f"0{i}_{name}"] = tmp_path / f"0{i}_{name}.ipynb"
        nbformat.write(nb, made[f"0{i}_{name}"])
    monkeypatch.setattr(experiment, "experiments", lambda: made)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def libortho(*args):
    found = CliRunner().invoke(app, ["experiment", *map(str, args)])
    return found.exit_code, found.output


def test_a_run_leaves_everything_and_says_it(notebooks):
    code, said = libortho("good", "-p", "size", "3", "-p", "words", '["a", "b"]')
    assert code == 0 and "size" in said and "holds" in said and "MISSED" in said
    out = notebooks / "reports" / "00_good"
    assert {p.name for p in out.iterdir()} == {"00_good.ipynb", "metrics.json", "report.html"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["headline"] == f"3 of ['a', 'b'] in {out / 'keep'}" and metrics["headline"] in said
    assert [a["holds"] for a in metrics["aims"]] == [True, False] and metrics["environment"]["torch"]
    assert (
        "What good does" in (out / "report.html").read_text()
        and "write_results(" not in (out / "report.html").read_text()
    )
    assert "00_good" in experiment.summary("reports") and "1 of 2" in experiment.summary("reports")


def test_a_gate_that_refuses_is_3_and_a_mistake_is_1(notebooks):
    code, said = libortho("01")
    assert code == 3 and "INVALID: too small" in said and "Traceback" not in said
    code, said = libortho("broken", "--out", "elsewhere")
    assert code == 1 and "ZeroDivisionError" in said
    assert (notebooks / "elsewhere" / "02_broken.ipynb").exists() and "ZeroDivisionError" in (
        notebooks / "elsewhere" / "report.html"
    ).read_text()


def test_a_failed_run_does_not_keep_the_figures_of_an_earlier_one(notebooks):
    assert libortho("good", "--out", "same")[0] == 0
    assert libortho("broken", "--out", "same")[0] == 1
    assert not (notebooks / "same" / "metrics.json").exists()


@pytest.mark.parametrize(
    "args, said",
    [
        (("nothing",), "experiment 'nothing' is not known; choose from 00_good, 01_invalid, 02_broken"),
        (("good", "-p", "sizes", "3"), "experiment '00_good' has no parameter 'sizes'; it has size, words, keep, out"),
        (("good", "-p", "size"), "'-p size' is not understood; give -p KEY VALUE"),
        (("good", "size=3"), "'size=3' is not understood"),
    ],
)
def test_bad_input_is_2_and_runs_nothing(notebooks, args, said):
    code, out = libortho(*args)
    assert code == 2 and said in out and not (notebooks / "reports").exists()


def test_the_list_and_the_parameters(notebooks):
    code, said = libortho()
    assert code == 0 and "00_good  What good does." in said
    code, said = libortho("good", "--parameters")
    assert code == 0 and "size = 1 # how large" in said and not (notebooks / "reports").exists()


def test_every_experiment_of_ours_has_a_title_a_gate_and_parameters():
    for name, path in experiment.experiments().items():
        nb = nbformat.read(path, as_version=4)
        code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
        known = experiment.parameters_of(path)
        assert (
            "out" in known and "INVALID" in code and "metrics.json" in code + "metrics.json" * ("write_results" in code)
        ), name
        assert all("#" in told for told in known.values()), f"{name}: a parameter without a comment"


def test_stages_that_cannot_be_read_are_not_taken(tmp_path):
    kept = experiment.kept_json(tmp_path, "stage", lambda: {"a": [1, 2]}, "x")
    (file,) = tmp_path.iterdir()
    assert kept == {"a": [1, 2]} and file.name.startswith("stage-")
    file.write_text("{")
    with pytest.raises(json.JSONDecodeError):
        experiment.kept_json(tmp_path, "stage", lambda: 1 / 0, "x")


def test_stages_of_neighbouring_settings_are_apart(tmp_path):
    made = [
        experiment.kept_json(tmp_path, "stage", lambda x=x: x, *told)
        for x, told in enumerate([(1, 17), (11, 7), ("1, 17",)])
    ]
    assert made == [0, 1, 2]
