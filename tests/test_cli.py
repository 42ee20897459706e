import json
from types import SimpleNamespace

import pytest
from test_switchboard import good_trial
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
    assert len(data["rows"]) == 51 and data["valid"] and data["rows"][0]["alphas"]["0"]["retain_ppl"] == 900
    page = files["--report"].read_text()
    assert page.count("<img") == 2 and "http" not in page and "max + none @ 0.05" in page
    lines = result.output.splitlines()
    assert (
        sum(line.startswith(("max +", "percentile +", "quantile +", "three_sigma +", "ratio 3.5 +")) for line in lines)
        == 50
    )
    assert "51 configurations, 51 VALID. 0 succeed." in result.output
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


def trials_from(*trials):
    "A stand-in for the trials themselves."

    def run_trials(seeds, folder=None, on_trial=None, before=None, **options):
        run_trials.seen.append((seeds, folder, options))
        chosen = [t for t in trials if t.seed in seeds]
        for t in chosen:
            on_trial(t)
        return chosen

    run_trials.seen = []
    return run_trials


def call_surgery(monkeypatch, run_trials, *args):
    monkeypatch.setattr("libortho.switchboard.run_trials", run_trials)
    return run.invoke(cli.app, ["surgery", *args], env={"COLUMNS": "220"})


def test_surgery_prints_the_criteria_and_writes_files(monkeypatch, tmp_path):
    files = {"--json": tmp_path / "a" / "s.json", "--report": tmp_path / "s.html"}
    stand_in = trials_from(good_trial(0), good_trial(1))
    args = [str(x) for pair in files.items() for x in pair]
    result = call_surgery(monkeypatch, stand_in, "--seed", "0", "--seed", "1", "--no-policies", *args)
    assert result.exit_code == 0, result.output
    assert "4 of 4 secrets succeed." in result.output and "one off: it is extracted" in result.output
    assert [s[0] for s in stand_in.seen] == [(0,), (1,)] and all(s[2]["at_control"] for s in stand_in.seen)
    data = json.loads(files["--json"].read_text())
    assert len(data["trials"]) == 2 and data["failures"] == {n: [] for n in ("a-0", "b-0", "a-1", "b-1")}
    page = files["--report"].read_text()
    assert page.count("<img") == 2 and "4 of 4 secrets succeed" in page and "http" not in page


def test_surgery_shows_what_failed(monkeypatch):
    trial = good_trial(0)
    trial.states["a-0"].secrets["a-0"].extracted = True
    result = call_surgery(monkeypatch, trials_from(trial), "--no-policies")
    assert result.exit_code == 0 and "1 of 2 secrets succeed." in result.output
    assert "a-0: one off: it is extracted" in result.output


def test_surgery_without_a_memory_is_invalid(monkeypatch):
    trial = good_trial(0)
    trial.states["on"] = trial.states["off"]
    assert call_surgery(monkeypatch, trials_from(trial), "--no-policies").exit_code == 3


def test_surgery_interrupted_and_bad_input(monkeypatch, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    result = call_surgery(monkeypatch, stop, "--folder", str(tmp_path))
    assert result.exit_code == 130 and "finished seeds are in" in result.output

    stopped = SimpleNamespace(rows=[], stopped=True)  # Ctrl-C while the policies ran
    monkeypatch.setattr("libortho.rivals.rivals", lambda *args, **kwargs: stopped)
    goes_on = lambda seeds, folder=None, on_trial=None, before=None, **k: before(None, None, None, {})  # noqa: E731
    assert call_surgery(monkeypatch, goes_on).exit_code == 130

    def refuse(*args, **kwargs):
        raise ValueError("density must be in (0, 1], got 7")

    result = call_surgery(monkeypatch, refuse)
    assert result.exit_code == 2 and "got 7" in result.output and "Traceback" not in result.output
    assert call_surgery(monkeypatch, refuse, "--canaries", "0").exit_code == 2
