"""The sweep over Dask: every point once, weights once to a worker, and nothing finished is lost to a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster
from models import RETAIN, SECRETS, TEXTS, TOK, learned_llama

import libortho as lo
from libortho.sweep import sweep
from libortho.tuner import Bounds, Outcome, Space, label_of, points, task, try_policy

HERE = str(Path(__file__).parent)
SPACE = Space(
    noise=("none", "tri_state"), targets=("down_proj", "mlp"), scale=("max", "ratio"), ratio=(3.5,), density=(0.05,)
)
GRID = points(SPACE)


def make():
    control = lo.measure(learned_llama(steps=0), TOK, SECRETS, RETAIN, TEXTS)
    return task(learned_llama(), TOK, SECRETS, control, RETAIN, TEXTS, bounds=Bounds(3.0, 3.0, 3.0))


@pytest.fixture(scope="module")
def what():
    return make()


@pytest.fixture(scope="module")
def cluster():
    "Two workers that find the tests' own tokenizer."
    os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    quiet = {"dashboard_address": None, "silence_logs": 50}
    # without this, Dask itself gives up restarting a worker that dies twice in 15 seconds
    forever = dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"})
    with forever, LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as made, Client(made) as client:
        yield client


def figures(outcomes):
    return json.dumps([{k: v for k, v in vars(o).items() if k != "seconds"} for o in outcomes])


def test_the_same_as_one_after_the_other(what, cluster):
    here = [try_policy(what, p) for p in GRID]
    assert figures(sweep(what, GRID, cluster.scheduler.address, progress=False)) == figures(here)


def copies():
    from libortho import sweep as module

    return {k: id(v) for k, v in module._HERE.items()}


def test_the_weights_reach_a_worker_once(what, cluster, tmp_path):
    def received(dask_worker):
        return [e["total"] for e in dask_worker.transfer_incoming_log]

    sweep(what, GRID, cluster.scheduler.address, folder=tmp_path / "a", progress=False)
    before = cluster.run(copies)
    heavy = 4 * sum(p.numel() for p in what.model.parameters())
    moved = {w: sum(t > heavy / 2 for t in log) for w, log in cluster.run(received).items()}
    sweep(what, GRID, cluster.scheduler.address, folder=tmp_path / "b", progress=False)
    after = cluster.run(copies)
    assert len(before) == 2 and before == after, "the model was made anew between trials"
    again = {w: sum(t > heavy / 2 for t in log) for w, log in cluster.run(received).items()}
    assert all(again[w] - moved[w] <= 1 for w in moved)


def test_a_killed_worker_loses_nothing(what, cluster, tmp_path):
    done, killed = [], []

    def kill(outcome):
        done.append(label_of(outcome.point))
        if len(done) in (2, 5):
            killed.append(next(iter(cluster.run(os.getpid, on_error="ignore").values())))
            os.kill(killed[-1], signal.SIGKILL)

    found = sweep(what, GRID, cluster.scheduler.address, folder=tmp_path, on_outcome=kill, progress=False)
    assert len(killed) == 2 and sorted(done) == sorted(map(label_of, GRID))
    assert figures(found) == figures([try_policy(what, p) for p in GRID])
    assert len(list(tmp_path.glob("trial-*.json"))) == len(GRID)


@pytest.mark.slow
def test_all_workers_killed_at_once(what, cluster, tmp_path):
    "The weights are gone with them, and are sent again."
    done = []

    def kill(outcome):
        done.append(outcome)
        if len(done) == 2:
            for pid in cluster.run(os.getpid, on_error="ignore").values():
                os.kill(pid, signal.SIGKILL)

    found = sweep(what, GRID, cluster.scheduler.address, folder=tmp_path, on_outcome=kill, progress=False)
    assert figures(found) == figures([try_policy(what, p) for p in GRID])


@pytest.mark.parametrize("failures", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_point_that_kills_its_worker_is_given_up(what, cluster, tmp_path, monkeypatch, failures):
    "And those that were with it are not blamed, however often Dask itself tries."
    monkeypatch.setattr("libortho.sweep._on_worker", deadly)
    monkeypatch.setattr(cluster.cluster.scheduler, "allowed_failures", failures)
    found = sweep(what, GRID[:4], cluster.scheduler.address, folder=tmp_path, attempts=2, progress=False)
    assert [o.dropped for o in found] == ["", "its workers died, 2 times", "", ""]
    assert len(list(tmp_path.glob("trial-*.json"))) == 3  # the next sweep tries it again


def test_weights_that_are_lost_on_their_way_are_sent_again(what, cluster, monkeypatch):
    scatter, lost = Client.scatter, [OSError("closed")] * 2

    def falter(self, *args, **kwargs):
        if lost:
            raise lost.pop()
        return scatter(self, *args, **kwargs)

    monkeypatch.setattr(Client, "scatter", falter)
    monkeypatch.setattr("libortho.sweep._on_worker", quick)
    assert [o.left for o in sweep(what, GRID[:2], cluster.scheduler.address, progress=False)] == [0.5, 0.5]
    assert not lost
    lost += [OSError("closed for good")] * 5
    with pytest.raises(OSError, match="closed for good"):
        sweep(what, GRID[:2], cluster.scheduler.address, progress=False)


def quick(what, key, point, drop, share):
    return vars(Outcome(point, left=0.5))


def deadly(what, key, point, drop, share):
    if label_of(point) == label_of(GRID[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return vars(Outcome(point, left=0.5))


SWEEP = """
import sys
sys.path[:0] = {paths!r}
if __name__ == "__main__":
    import test_sweep
    told = dict(on_outcome=lambda o: print("done", flush=True), progress=False)
    test_sweep.sweep(test_sweep.make(), test_sweep.GRID, sys.argv[1], folder=sys.argv[2], **told)
"""


def test_a_sweep_that_was_killed_goes_on(what, cluster, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SWEEP.format(paths=[HERE, *sys.path]))
    out = tmp_path / "trials"
    process = subprocess.Popen(
        [sys.executable, str(script), cluster.scheduler.address, str(out)], stdout=subprocess.PIPE
    )
    for _ in range(3):
        assert process.stdout.readline() == b"done\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = {f.name: f.read_bytes() for f in out.glob("trial-*.json")}
    assert 3 <= len(kept) < len(GRID)
    tried = []
    found = sweep(what, GRID, cluster.scheduler.address, folder=out, on_outcome=tried.append, progress=False)
    assert len(tried) == len(GRID) - len(kept) and figures(found) == figures([try_policy(what, p) for p in GRID])
    assert all((out / n).read_bytes() == b for n, b in kept.items())


def test_an_interrupt_keeps_what_is_finished(what, cluster, tmp_path):
    done = []

    def stop(outcome):
        done.append(outcome)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(what, GRID, cluster.scheduler.address, folder=tmp_path, on_outcome=stop, progress=False)
    kept = len(list(tmp_path.glob("trial-*.json")))
    assert kept >= 3  # also what was finished and not yet told of
    sweep(what, GRID, cluster.scheduler.address, folder=tmp_path, on_outcome=done.append, progress=False)
    assert len(done) - 3 == len(GRID) - kept


@pytest.mark.slow
def test_a_cluster_of_its_own(what, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    assert figures(sweep(what, GRID[:2], workers=1, progress=False)) == figures([try_policy(what, p) for p in GRID[:2]])
    assert threading.active_count() < 50


def test_arguments_of_a_sweep(what):
    with pytest.raises(ValueError, match="scheduler 'tcp://127.0.0.1:9' does not answer"):
        sweep(what, GRID, "tcp://127.0.0.1:9", progress=False)
    with pytest.raises(ValueError, match="workers and attempts must be at least 1, got 0"):
        sweep(what, GRID, workers=0)


@pytest.mark.slow
def test_a_worker_with_several_threads_tries_one_at_a_time(what, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    quiet = {"dashboard_address": None, "silence_logs": 50}
    with LocalCluster(n_workers=1, threads_per_worker=3, **quiet) as made:
        found = sweep(what, GRID[:4], made.scheduler_address, progress=False)
    assert figures(found) == figures([try_policy(what, p) for p in GRID[:4]])


def test_an_error_keeps_what_else_is_finished(what, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("libortho.sweep._on_worker", wrong)
    with pytest.raises(ZeroDivisionError):
        sweep(what, GRID[:4], cluster.scheduler.address, folder=tmp_path, progress=False)
    assert len(list(tmp_path.glob("trial-*.json"))) >= 2  # one may have waited behind the one that fails


def wrong(what, key, point, drop, share):
    if label_of(point) == label_of(GRID[0]):
        time.sleep(2)
        return 1 / 0
    return vars(Outcome(point, left=0.5))
