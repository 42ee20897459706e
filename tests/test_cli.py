import json

import pytest
from typer.testing import CliRunner

import libortho as lo
from libortho import cli
from libortho.evaluate import Comparison, Measures, Result
from libortho.memory import ImplantError, SecretScore

run = CliRunner()


def made_up(ppl, extracted, retain=20.0):
    return Measures({"s": SecretScore(ppl, extracted, extracted, 0.0, bool(extracted), "said")}, retain, 15.0, 0.5)


def fake(on, control=0.0, stop_after=None):
    "A stand-in for the run itself, so that the command around it can be tested in milliseconds."

    def tofu(configs, model, canary, alphas, seed, on_start, on_row, progress):
        float_, layers = (
            made_up(1.0, 1.0),
            {"layer": {"weights": 1000, "stored": 50, "attacked_deep": 4, "moved_deep": 0}},
        )
        c = Comparison(made_up(300, control), float_, planned=len(configs), settings={"model": model, "seed": seed})
        on_start(c)
        for label, cfg in list(configs.items())[:stop_after]:
            measures = {1.0: made_up(1.0, on), 0.0: made_up(40, 0.0, 900.0), **{a: made_up(3, 0.0) for a in alphas}}
            c.rows.append(Result(measures, c.control, float_, cfg, layers, label))
            on_row(c)
        return c

    return tofu


def call(monkeypatch, tofu, *args):
    monkeypatch.setitem(
        lo.tofu.__globals__, "tofu", tofu
    )  # the name in libortho.evaluate, which the command imports when it runs
    return run.invoke(cli.app, ["tofu", *args], env={"COLUMNS": "220"})


@pytest.mark.parametrize(
    "tofu, code",
    [(fake(on=1.0), 0), (fake(on=0.0), 3), (fake(on=1.0, control=1.0), 3), (fake(on=1.0, stop_after=7), 130)],
)
def test_exit_codes(monkeypatch, tofu, code):
    assert call(monkeypatch, tofu).exit_code == code


def test_an_implant_that_does_not_take_is_invalid(monkeypatch):
    def tofu(*args, **kwargs):
        raise ImplantError("the memory did not take: raise max_steps")

    result = call(monkeypatch, tofu)
    assert result.exit_code == 3 and "did not take" in result.output and "Traceback" not in result.output


def test_an_interrupt_before_the_first_row(monkeypatch):
    def tofu(*args, **kwargs):
        raise KeyboardInterrupt

    result = call(monkeypatch, tofu)
    assert result.exit_code == 130 and "Interrupted before the first" in result.output


def test_files_table_and_findings(monkeypatch, tmp_path):
    files = {"--json": tmp_path / "a" / "tofu.json", "--report": tmp_path / "tofu.html"}
    result = call(monkeypatch, fake(on=1.0), *(str(x) for pair in files.items() for x in pair))
    assert result.exit_code == 0, result.output
    data = json.loads(files["--json"].read_text())
    assert len(data["rows"]) == 50 and data["valid"] and data["rows"][0]["alphas"]["0"]["retain_ppl"] == 900
    page = files["--report"].read_text()
    assert page.count("<img") == 2 and "http" not in page and "max + none @ 0.05" in page
    lines = result.output.splitlines()
    assert (
        sum(line.startswith(("max +", "percentile +", "quantile +", "three_sigma +", "ratio 3.5 +")) for line in lines)
        == 50
    )
    assert "50 configurations, 50 VALID. 0 succeed." in result.output
    assert "(over 10 configurations), 0 move the integer: there it is the same as none." in result.output


def test_options_reach_the_run(monkeypatch):
    seen = {}

    def tofu(configs, model, canary, alphas, seed, **kwargs):
        seen.update(configs=configs, model=model, canary=canary, alphas=alphas, seed=seed)
        return fake(on=1.0)(configs, model, canary, alphas, seed, **kwargs)

    result = call(
        monkeypatch,
        tofu,
        "--policy",
        "ratio",
        "--ratio",
        "3",
        "--noise",
        "tri_state",
        "--density",
        "0.1",
        "--density",
        "0.2",
        "--alpha",
        "0.5",
        "--targets",
        "q_proj",
        "--targets",
        "k_proj",
        "--canary",
        "vault",
        "--seed",
        "4",
    )
    assert result.exit_code == 0, result.output
    assert list(seen["configs"]) == ["ratio 3 + tri_state @ 0.1", "ratio 3 + tri_state @ 0.2"]
    cfg = next(iter(seen["configs"].values()))
    assert cfg.scale_args == {"r": 3.0} and cfg.targets == ("q_proj", "k_proj") and cfg.seed == 4
    assert seen["alphas"] == (0.5,) and seen["canary"] == "vault" and "α = 0.5" in result.output


@pytest.mark.parametrize(
    "args, word",
    [
        (["--density", "1.7"], "0.017"),
        (["--density", "0"], "density must be"),
        (["--policy", "best"], "best"),
        (["--noise", "x"], "'x'"),
        (["--ratio", "-1"], "r of scale"),
        (["--alpha", "2"], "[0, 1]"),
        (["--alpha", "nan"], "[0, 1]"),
        (["--canary", "pepsi"], "coca-cola"),
        (["--targets", "up_porj"], "matches no"),
        (["--report", "."], "is a directory"),
        (["--json", "/proc/none/x.json"], "/proc/none"),
    ],
)
def test_bad_input_ends_with_2_and_a_sentence(args, word):
    result = run.invoke(cli.app, ["tofu", *args], env={"COLUMNS": "220"})
    assert result.exit_code == 2 and word in result.output and "Traceback" not in result.output, result.output


def test_help_names_every_option():
    text = run.invoke(cli.app, ["tofu", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for option in (
        "--policy",
        "--ratio",
        "--noise",
        "--density",
        "--alpha",
        "--targets",
        "--json",
        "--report",
        "Exit code 0",
    ):
        assert option in text
