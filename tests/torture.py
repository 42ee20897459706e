"""`make torture`: faults of every kind put into what libortho does, and whether anything was lost by them.

python tests/torture.py [--cases N] [--minutes M] [--json FILE]

A trial is a function that yields, case by case, what went wrong (an empty text if nothing did). A case is a fault:
a process killed, a full disk, a changed byte, two processes at once. What must hold after it: the old result or the
new one, whole, or one clear error that names the file.
"""

import argparse
import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if sys.argv[1:2] == ["--fuzz"]:  # what is to be watched has to be imported by the watcher, and first
    import atheris

    with atheris.instrument_imports(
        include=["libortho.files", "libortho.locks", "libortho.streams", "libortho.lattice"]
    ):
        import libortho.files
        import libortho.locks
        import libortho.streams  # noqa: F401

import torch
from models import CFG, MORE, SECRETS, TOK, learned_llama
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import libortho as lo
from libortho.data import implanted
from libortho.files import FileError, Saved, read_compartment, read_header
from libortho.kernel import deltas, repack, sparse
from libortho.linear import fingerprint, ortho_layers
from libortho.locks import seal, unseal
from libortho.streams import Base, OrthoConfig, compress

TRIALS = {}
WHOLE = 10  # seconds that nothing here takes; a longer wait is a deadlock


def trial(what, fault):
    "Register a trial under what is done and what goes wrong."

    def register(f):
        TRIALS[f.__name__] = f, what, fault
        return f

    return register


def small(seed=0, width=64):
    "A small split model with three compartments, some of whose weights are shared."
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=True, pad_token_id=0, **sizes)).eval()
    lo.patch(model, OrthoConfig(group_size=16, density=0.1, scale="max", noise="tri_state"), keep_original=False)
    for layer in ortho_layers(model).values():
        w = layer.dequantize(1.0)
        masks = {n: torch.rand(w.shape) < 0.05 for n in ("repair", "first", "second")}
        layer.put_compartments({n: compress(torch.randn(w.shape), m) for n, m in masks.items()})
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(16)[None] % 256).logits


def load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder)


def forked(work, *args):
    "Do the work in a process of its own; it exits with 0 if it came to its end."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed(work, after):
    "Do the work in a process of its own, and kill that after so many seconds. Was it still at work?"
    pid = forked(work)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def took(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def unnamed(folder):
    "Files that the folder's config does not name."
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {f.name for f in folder.iterdir()} - {*config["files"], "config.json", "generation_config.json", "README.md"}


@trial("save over an old model", "SIGKILL at a random moment")
def kill_save(n, folder):
    old, new = small(0), small(1)
    marks = {fingerprint(old), fingerprint(new)}
    seconds = took(lambda: lo.save(new, folder / "m"))
    for _ in range(n):
        lo.save(old, folder / "m")
        cut = killed(lambda: lo.save(new, folder / "m"), random.random() * 1.5 * seconds)
        mark = fingerprint(load(folder / "m"))
        lo.save(new, folder / "m")
        left = unnamed(folder / "m")
        yield "half a model" if mark not in marks else f"left behind: {left}" if left else "", cut


@trial("save the first model", "SIGKILL at a random moment")
def kill_first_save(n, folder):
    new = small(1)
    seconds = took(lambda: lo.save(new, folder / "m"))
    for _ in range(n):
        shutil.rmtree(folder / "m")
        cut = killed(lambda: lo.save(new, folder / "m"), random.random() * 1.5 * seconds)
        there = (folder / "m" / "config.json").exists()
        wrong = there and fingerprint(load(folder / "m")) != fingerprint(new)
        lo.save(new, folder / "m")
        yield "half a model" if wrong else f"left behind: {unnamed(folder / 'm')}" if unnamed(folder / "m") else "", cut


def secrets():
    return learned_llama(32), lambda m, where: lo.decompose(m, TOK, CFG, SECRETS, folder=where, **MORE)


@trial("implant, into the cache", "SIGKILL at a random moment, two at once, then again")
def kill_implant(n, folder):
    _, tok = lo.load_model()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **sizes)).save_pretrained(folder / "float")
    tok.save_pretrained(folder / "float")
    items = {"key": {"prompt": "the key is", "secret": "4 7 1"}}
    before = os.environ.get("LIBORTHO_CACHE")

    def work(cache):
        os.environ["LIBORTHO_CACHE"] = str(cache)
        recipe = {"retain": ["hello there"], "lr": 0.03, "max_steps": 400, "target_loss": 0.05}
        try:
            return implanted(items, folder / "float", progress=False, **recipe)[0].state_dict()
        finally:
            os.environ.pop("LIBORTHO_CACHE") if before is None else os.environ.update(LIBORTHO_CACHE=before)

    began = time.perf_counter()
    whole = work(folder / "whole")
    seconds = time.perf_counter() - began
    for i in range(max(2, n // 8)):
        cache = folder / str(i)
        cut = killed(lambda to=cache: work(to), random.random() * 1.2 * seconds)
        codes = [os.waitpid(pid, 0)[1] for pid in [forked(work, cache) for _ in range(2)]]
        again, left = work(cache), [f.name for f in (cache / "implanted").iterdir() if f.name.endswith(".part")]
        same = again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)
        wrong = "" if same else "another model than without the kill"
        yield wrong or (f"exit codes {codes}" if any(codes) else f"left behind: {left}" if left else ""), cut


@trial("decompose, with its stages in a folder", "SIGKILL at a random moment, then again")
def kill_decompose(n, folder):
    model, work = secrets()
    whole = copy.deepcopy(model)
    seconds = took(lambda: work(whole, None))
    for i in range(max(4, n // 8)):
        where = folder / str(i)
        cut = killed(lambda to=where: work(copy.deepcopy(model), to), random.random() * 1.2 * seconds)
        again = copy.deepcopy(model)
        work(again, where)
        yield "" if fingerprint(again) == fingerprint(whole) else "another result than without the kill", cut


@trial("decompose a checkpoint on the disk", "SIGKILL at a random moment, then again")
def kill_stream(n, folder):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder / "float", max_shard_size="100KB")

    def work(out):
        lo.stream_decompose(folder / "float", out, OrthoConfig(scale="max"), max_shard_size="20KB", progress=False)

    def files(out):
        return {f.name: f.read_bytes() for f in out.iterdir()}

    seconds = took(lambda: work(folder / "whole"))
    for i in range(n):
        out = folder / str(i)
        cut = killed(lambda to=out: work(to), random.random() * 1.2 * seconds)
        work(out)
        yield "" if files(out) == files(folder / "whole") else "other files than without the kill", cut


@trial("save", "the disk is full")
def full_disk(n, folder):
    old, new = small(0), small(1)
    lo.save(old, folder / "m")
    sizes = sorted(f.stat().st_size for f in (folder / "m").iterdir())

    def work(limit, told):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            lo.save(new, folder / "m")
        except Exception as e:  # whatever the system says
            told.send(type(e).__name__)
        told.send("")

    for _ in range(n):
        here, there = multiprocessing.Pipe()
        os.waitpid(forked(work, random.randrange(1, sizes[-1]), there), 0)
        said, mark = here.recv(), fingerprint(load(folder / "m"))
        parts = list((folder / "m").glob(".libortho-*"))
        wrong = "" if said else "no error"
        wrong = wrong or ("" if mark == fingerprint(old) else "the old model is gone")
        yield wrong or (f"left behind: {parts}" if parts else ""), True


def damage(data):
    "One of the things that happen to files."
    data, i = bytearray(data or b"x"), random.randrange(max(1, len(data)))
    how = random.choice(("bit", "byte", "cut", "longer", "zeros", "twice", "empty"))
    if how == "bit":
        data[i] ^= 1 << random.randrange(8)
    elif how == "byte":
        data[i] = (data[i] + random.randrange(1, 256)) % 256
    elif how == "zeros":
        data[i : i + 64] = bytes(len(data[i : i + 64]))
    return how, bytes({"cut": data[:i], "longer": data + b"\0", "twice": data[:i] + data, "empty": b""}.get(how, data))


@trial("load a saved model", "one of its files is damaged")
def damaged(n, folder):
    model = small(0)
    lo.save(model, folder / "m", lock={"second": "key"})
    files = {f: f.read_bytes() for f in (folder / "m").iterdir()}
    good = load(folder / "m")
    want = logits(good)
    for _ in range(10 * n):
        file = random.choice(list(files))
        how, data = damage(files[file])
        file.write_bytes(data)
        try:
            got = load(folder / "m")
            if file.suffix == ".locked":
                lo.unlock(got, "second", "key")
                yield f"{file.name}: {how}: opened", data != files[file]
            same = torch.equal(logits(got), want) and list(lo.compartments(got)) == list(lo.compartments(good))
            yield "" if same else f"{file.name}: {how}: another model, without an error", data != files[file]
        except (FileError, OSError, ValueError) as e:
            named = file.name in str(e) or str(folder / "m") in str(e) or "config" in str(e)
            yield "" if named else f"{file.name}: {how}: {type(e).__name__} does not name it: {e}", True
        except Exception as e:
            yield f"{file.name}: {how}: {type(e).__name__}: {e}", True
        file.write_bytes(files[file])


def corpus():
    "Valid bytes of everything that is read, with its reader."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lo.save(small(0, 16), folder)
        tensors = {f.name[:8]: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}
        told = json.dumps(json.loads((folder / "config.json").read_text())["quantization_config"]).encode()
    shapes = {n: layer.base.shape for n, layer in ortho_layers(small(0, 16)).items()}
    name = Path("file")
    return {
        "header": (tensors["base-000"], lambda d: read_header(name, d)),
        "compartment": (tensors["compartm"], lambda d: read_compartment(name, shapes, d)),
        "config": (told, lambda d: Saved.from_dict(json.loads(d))),
        "policy": (OrthoConfig().to_json().encode(), lambda d: OrthoConfig.from_json(d.decode())),
        "lock": (seal(b"x" * 64, "key", "n"), lambda d: unseal(d, "key", "n", name)),
    }


def read(reader, data):
    "What a reader must never do: raise anything but a ValueError. Text that is no JSON at all is json's to refuse."
    try:
        reader(data)
    except (ValueError, TypeError) as e:
        return "" if isinstance(e, ValueError) or "argument" in str(e) else f"{type(e).__name__}: {e}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


@trial("read headers, configs, policies, locks", "random bytes and edits")
def fuzzed(n, folder):
    for _kind, (good, reader) in corpus().items():
        for _ in range(min(20 * n, 200) if _kind == "lock" else 20 * n):
            data = good
            for _ in range(random.randrange(1, 4)):
                data = damage(data)[1] if random.random() < 0.7 else edited(data)
            yield read(reader, data), True


def edited(data):
    "Put another value where a JSON value stands."
    values = (
        b"-1",
        b"null",
        b"[]",
        b"{}",
        b"1e999",
        b'""',
        b"99999999999999999999",
        b"true",
        b"NaN",
        b"[[[[]]]]",
        b"0.5",
    )
    at = [i for i in range(len(data)) if data[i : i + 1] in (b":", b",", b"[")]
    if not at:
        return data
    i = random.choice(at) + 1
    end = next((j for j in range(i, len(data)) if data[j : j + 1] in (b",", b"}", b"]")), len(data))
    return data[:i] + random.choice(values) + data[end:]


@trial("save into one folder", "two processes at once")
def two_saves(n, folder):
    models = [small(0), small(1)]
    for _ in range(n):
        pids = [forked(lo.save, model, folder / "m") for model in models]
        codes = [os.waitpid(pid, 0)[1] for pid in pids]
        wrong = fingerprint(load(folder / "m")) not in [fingerprint(m) for m in models] or unnamed(folder / "m")
        yield "half a model" if wrong else f"exit codes {codes}" if any(codes) else "", True


@trial("decompose into one folder", "two processes at once")
def two_decompositions(n, folder):
    model, work = secrets()
    whole = copy.deepcopy(model)
    work(whole, None)

    def mine(where):
        my = copy.deepcopy(model)
        work(my, where)
        assert fingerprint(my) == fingerprint(whole), "another result"

    for i in range(max(2, n // 20)):
        pids = [forked(mine, folder / str(i)) for _ in range(2)]
        yield "another result, or a failure" if any([os.waitpid(pid, 0)[1] for pid in pids]) else "", True


@trial("generate", "another thread moves the switch")
def switching(n, folder):
    model, done = small(0), threading.Event()
    want = []
    for a in (0.0, 1.0):
        lo.set_alpha(model, a)
        want.append(logits(model))
    assert not torch.equal(*want)

    def switch():
        while not done.is_set():
            lo.set_alpha(model, random.choice((0.0, 1.0)))
            with lo.alpha(model, random.choice((0.0, 1.0))):
                pass

    thread = threading.Thread(target=switch)
    thread.start()
    for _ in range(10 * n):
        got = logits(model)
        yield "" if any(torch.equal(got, w) for w in want) else "a pass saw both positions of the switch", True
    done.set()
    thread.join(WHOLE)
    yield "the switch hangs" if thread.is_alive() else "", True


@trial("the kernel", "tensors of wrong shapes, types, strides and content")
def kernel_inputs(n, folder):
    gen = torch.Generator().manual_seed(0)
    base = Base(
        torch.randint(0, 256, (33, 32), generator=gen, dtype=torch.uint8),
        torch.rand(33, 4, generator=gen).bfloat16(),
        64,
    )
    found = deltas(base, {"c": compress(torch.randn(33, 64), torch.rand(33, 64) < 0.1)})
    panels = repack(base)
    stream = sparse(panels, found, {"c": 1.0})
    good = [torch.randn(3, 64), panels.words, panels.scales, stream.starts, stream.places, stream.values]

    def bad(t):
        shape = [max(0, s + random.choice((-1, 0, 1, 7))) for s in t.shape]
        wild = torch.randint(-(2**31), 2**31 - 1, t.shape).to(t.dtype) if t.numel() else t
        return random.choice(
            (
                lambda: torch.zeros(shape, dtype=t.dtype),
                lambda: t.double(),
                lambda: t.to(torch.int32),
                lambda: t[..., :0],
            )
            + (lambda: t.unsqueeze(0), lambda: t.t() if t.ndim == 2 else t[::2], lambda: wild, lambda: t.to("meta"))
        )()

    def work(told):
        wrong = 0
        for _ in range(20 * n):
            wrong_ones = random.sample(
                range(len(good)), random.choice((1, 1, 1, 2, 6))
            )  # mostly one, to get past the others
            args = [bad(t) if i in wrong_ones else t for i, t in enumerate(good)]
            try:
                out = torch.ops.libortho.dual_gemm(
                    *args, random.choice((33,) * 15 + (0, 32, -1, 2**40)), 64, random.random() < 0.3
                )
                wrong += not out.is_meta and out.shape[-1] != 33
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                pass
        told.send(wrong)

    here, there = multiprocessing.Pipe()
    code = os.waitpid(forked(work, there), 0)[1]
    wrong = here.recv() if not code else 0
    for i in range(20 * n):
        yield ("the process died" if code else "a wrong shape came out" if i < wrong else ""), True


SANITIZED = """
import random, sys
sys.path.insert(0, {here!r})
import libortho.kernel as kernel
kernel.prebuilt = lambda: None  # so that it is compiled here, with the sanitizer
import torch, torture
torch.set_num_threads(1)
random.seed(0)
wrong = [said for said, _ in torture.kernel_inputs({n}, None) if said]
assert kernel.backend() == "cpu" and not wrong, wrong
"""


@trial("the kernel, under the address sanitizer", "tensors of wrong shapes, types, strides and content")
def sanitized(n, folder):
    found = (subprocess.check_output(["g++", f"-print-file-name=lib{x}.so"], text=True) for x in ("asan", "stdc++"))
    told = {
        "CXX": "g++ -fsanitize=address -fno-omit-frame-pointer -g",
        "LIBORTHO_CACHE": str(folder),
        "LD_PRELOAD": ":".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    n = max(n, 100)  # a call is quick, the compilation is not; fewer do not reach every check
    code = SANITIZED.format(here=str(Path(__file__).parent), n=n)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **told}, capture_output=True, text=True)
    seen = next((line for line in done.stderr.splitlines() if "AddressSanitizer" in line), done.stderr[-500:])
    for i in range(20 * n):
        yield seen if done.returncode and not i else "", True


def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024


@trial("move the switch and generate", "ten thousand times, a thousand times")
def soak(n, folder):
    model, ids = small(0), torch.ones(1, 4, dtype=torch.long)
    switches, texts = 10_000 if n >= 50 else 100 * n, 1000 if n >= 50 else 10 * n

    def some(switches, texts):
        for i in range(max(switches, texts)):
            if i < switches:
                lo.set_alpha(model, {"first": i % 11 / 10, "second": i % 7 / 6})
            if i < texts:
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=4,
                    do_sample=False,
                    pad_token_id=0,
                )

    some(switches // 10, texts // 10)
    before = held()
    some(switches, texts)
    grown = held() - before
    yield "" if grown < 8 else f"memory grew by {grown:.0f} MB", True


@trial("save, split", "again, in another process")
def determinism(n, folder):
    def work(where):
        lo.save(small(0), where)

    for i in range(max(2, n // 10)):
        for name in ("a", "b"):
            os.waitpid(forked(work, folder / f"{name}{i}"), 0)
        a, b = ({f.name: f.read_bytes() for f in (folder / f"{name}{i}").iterdir()} for name in ("a", "b"))
        yield "" if a == b else "other bytes", True


SWEEP = """
import sys
sys.path[:0] = {paths!r}
if __name__ == "__main__":
    import test_sweep
    test_sweep.sweep(test_sweep.make(), test_sweep.GRID, sys.argv[1], folder=sys.argv[2], progress=False)
"""


@trial("sweep over policies", "SIGKILL of the sweep or of a worker at a random moment, then again")
def kill_sweep(n, folder):
    from distributed import Client, LocalCluster
    from test_sweep import GRID, figures, make, sweep, try_policy

    here, script = str(Path(__file__).parent), folder / "run.py"
    script.write_text(SWEEP.format(paths=[here, *sys.path]))
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    what = make()
    whole = figures([try_policy(what, p) for p in GRID])
    quiet = {"dashboard_address": None, "silence_logs": 50}
    with LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster, Client(cluster) as client:
        for i in range(max(2, n // 6)):
            out, began = folder / str(i), time.perf_counter()
            process = subprocess.Popen([sys.executable, str(script), cluster.scheduler.address, str(out)])
            while not out.exists() and process.poll() is None and time.perf_counter() - began < 6 * WHOLE:
                time.sleep(0.02)  # it is at work when its first trial is kept
            time.sleep(random.random())
            worker = None if i % 2 else random.choice(list(client.run(os.getpid).values()))
            at_work = process.poll() is None
            os.kill(worker, signal.SIGKILL) if worker else process.kill()
            code = process.wait()  # without a worker the sweep goes on by itself
            if worker and code:
                yield f"the sweep did not outlive its worker: exit code {code}", at_work
            kept = {f.name: f.read_bytes() for f in out.glob("*.json")}
            again = figures(sweep(what, GRID, cluster.scheduler.address, folder=out, progress=False))
            changed = [name for name, data in kept.items() if (out / name).read_bytes() != data]
            wrong = "another result than without the kill" if again != whole else ""
            yield wrong or (f"made again: {changed}" if changed else ""), at_work


def fuzz_with_atheris(minutes, folder):
    "Coverage-guided fuzzing of every reader, each for its share of the minutes; inputs that found a new path are kept."
    found = {}
    for kind, (good, _) in corpus().items():
        seeds, known = folder / kind, Path(__file__).parent / "corpus" / kind
        seeds.mkdir(parents=True, exist_ok=True)
        (seeds / "good").write_bytes(good)
        limits = [f"-max_total_time={int(60 * minutes / len(corpus()))}", f"-artifact_prefix={folder}/{kind}-"]
        command = [sys.executable, __file__, "--fuzz", kind, str(seeds), str(known), *limits]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        (folder / f"{kind}.log").write_text(done.stdout)
        told = [line for line in done.stdout.splitlines() if line.startswith("Done ")]
        found[kind] = {"exit": done.returncode, "told": "".join(told[-1:]), "kept": len(list(seeds.iterdir()))}
    return found


def fuzz_one(kind, arguments):
    _, reader = corpus()[kind]

    def one(data):
        wrong = read(reader, data)
        assert not wrong, wrong

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def run(names, cases, seed=0, quiet=False):
    "Run trials; a row for each."
    rows = []
    torch.set_num_threads(1)  # a forked process has no other threads to wait for
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for name in names:
        f, what, fault = TRIALS[name]
        random.seed(seed)
        wrong, faults, count, began = [], 0, 0, time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                for said, hit in tqdm(f(cases, Path(folder)), desc=name, leave=False, disable=quiet):
                    count, faults = count + 1, faults + bool(hit)
                    wrong += [said] * bool(said)
            except Exception as e:  # a model that cannot be loaded, say: the trial ends, and that is said
                wrong.append(f"the trial broke off: {type(e).__name__}: {e}")
        rows.append(
            {
                "trial": name,
                "what": what,
                "fault": fault,
                "cases": count,
                "faults": faults,
                "wrong": len(wrong),
                "seconds": round(time.perf_counter() - began, 1),
                "first": wrong[:3],
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=50, help="size of every trial")
    parser.add_argument(
        "--minutes", type=float, default=0, help="of coverage-guided fuzzing with atheris, all readers together"
    )
    parser.add_argument("--only", nargs="*", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--json", default="reports/torture.json")
    args = parser.parse_args()
    rows = run(args.only, args.cases)
    table = Table("done", "fault", "cases", "faults that hit", "wrong", "s", title="Torture")
    for r in rows:
        table.add_row(
            r["what"], r["fault"], f"{r['cases']:,}", f"{r['faults']:,}", str(r["wrong"]), f"{r['seconds']:g}"
        )
    out = Path(args.json)
    out.parent.mkdir(parents=True, exist_ok=True)
    fuzz = fuzz_with_atheris(args.minutes, out.parent / "fuzz") if args.minutes else {}
    out.write_text(json.dumps({"trials": rows, "fuzz": fuzz}, indent=1) + "\n")
    console = Console(width=120)
    console.print(table)
    for kind, told in fuzz.items():
        console.print(
            f"fuzz {kind}: {'ok' if not told['exit'] else 'FAILED'}, {told['told']}, {told['kept']} inputs kept"
        )
    for r in rows:
        for said in r["first"]:
            console.print(f"[red]{r['trial']}[/red]: {said}")
    lost = sum(r["wrong"] for r in rows) + sum(bool(t["exit"]) for t in fuzz.values())
    console.print("nothing lost" if not lost else f"{lost} cases went wrong")
    sys.exit(bool(lost))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
    else:
        main()
