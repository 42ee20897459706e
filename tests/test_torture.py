"""A small torture in the test suite; `make torture` is the whole one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torture import TRIALS, corpus, read

HERE = Path(__file__).parent


def torture(tmp_path, *options, before="pass"):
    "Run it in a process of its own, which forks; after a line of sabotage."
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import torture\n{before}\ntorture.main()"
    command = [sys.executable, "-c", code, "--json", tmp_path / "told.json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (tmp_path / "told.json").exists(), done.stderr
    return done, json.loads((tmp_path / "told.json").read_text())["trials"]


LONG = {"sanitized", "kill_sweep"}  # half a minute and more; tests/test_sweep.py has kills that are quicker


@pytest.mark.parametrize(
    "names", [set(TRIALS) - LONG, pytest.param(LONG, marks=pytest.mark.slow)], ids=["most", "long"]
)
def test_nothing_is_lost(tmp_path, names):
    done, rows = torture(tmp_path, "--cases", "4", "--only", *sorted(names))
    assert not done.returncode and "nothing lost" in done.stdout, done.stdout + done.stderr
    assert {r["trial"] for r in rows} == names and all(r["cases"] > 0 and not r["wrong"] for r in rows)


SABOTAGE = {  # the fault that each trial is there to see
    "damaged": """import libortho.quantizer as q
q.check_file, q.check_config = lambda folder, info: folder / info.name, print""",
    "full_disk": """import libortho.hub as h
h.commit = lambda folder, config, named: (folder / "config.json").write_text("{}")""",
    "two_saves": """import libortho.files as f
f.OURS = f.re.compile("never")""",
    "determinism": "torture.torch.manual_seed = lambda seed: torture.torch.random.seed()",
    "switching": """import contextlib, libortho.linear as l
l.gate = lambda model: type("Open", (), {"alone": contextlib.nullcontext})""",
    "sanitized": """torture.SANITIZED = '''
import re, shutil, tempfile
import libortho.build as build
from pathlib import Path
home = Path(tempfile.mkdtemp()) / "kernels"
shutil.copytree(build.sources(), home)
text = (home / "bindings.cpp").read_text()
(home / "bindings.cpp").write_text(re.sub("TORCH_CHECK_VALUE[(]w.starts.*?;", "", text, count=1, flags=re.S))
build.sources = lambda: home
''' + torture.SANITIZED""",
    "kill_sweep": """import libortho.sweep as s
s._read = lambda file: s.Outcome({})""",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in SABOTAGE])
def test_a_loss_is_seen(name, tmp_path):
    done, (row,) = torture(tmp_path, "--cases", "8", "--only", name, before=SABOTAGE[name])
    assert done.returncode == 1 and row["wrong"], (done.stdout, done.stderr)


READ = corpus()
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@settings(max_examples=int(os.environ.get("LIBORTHO_EXAMPLES", 100)))
@given(st.data())
@pytest.mark.parametrize("kind", sorted(READ))
def test_bytes_and_values_of_every_kind(kind, data):
    "Any bytes; a good file with a piece of it replaced; a good JSON object with another value under one of its keys."
    good, reader = READ[kind]
    at = data.draw(st.integers(0, len(good)))
    to = data.draw(st.integers(at, min(len(good), at + 40)))
    assert not read(reader, data.draw(st.binary(max_size=200)))
    assert not read(reader, good[:at] + data.draw(st.binary(max_size=40)) + good[to:])
    if kind in ("config", "policy"):
        told = json.loads(good)
        told[data.draw(st.sampled_from(sorted(told)) | st.text())] = data.draw(ANYTHING)
        assert not read(reader, json.dumps(told).encode())


@pytest.mark.parametrize("kind", sorted(corpus()))
def test_inputs_that_once_found_a_path(kind):
    "What coverage-guided fuzzing kept."
    kept = sorted((HERE / "corpus" / kind).iterdir())
    good, reader = corpus()[kind]
    assert not read(reader, good) and kept
    for file in kept:
        assert not read(reader, file.read_bytes()), file
