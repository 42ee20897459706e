"""How long does splitting on the disk take, and how much memory?

python bench/stream.py        two random checkpoints of Llama's shape, of 0.3 and 1.1 billion weights
python bench/stream.py 3      and one of 3 billion (6 GB of temporary files, 2 GB more while it is split)
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES = {  # billions of weights: hidden, intermediate, layers, heads, heads of keys and values
    0.3: (1024, 2816, 22, 16, 4),
    1.1: (2048, 5632, 22, 32, 4),  # TinyLlama's
    3: (3200, 8640, 26, 32, 32),  # OpenLLaMA-3B's
}


def checkpoint(folder, hidden, wide, layers, heads, kv):
    "Write random bfloat16 weights, a file for each layer; return how many there are, and the most in one of them."
    sizes = {"vocab_size": 32000, "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.save_pretrained(folder)
    file_of = {n: "model-" + "".join(re.findall(r"layers\.\d+", n) or ["rest"]) + ".safetensors" for n in shapes}
    for file in set(file_of.values()):
        tensors = {n: (torch.randn(shapes[n]) * 0.02).bfloat16() for n in shapes if file_of[n] == file}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return sum(map(math.prod, shapes.values())), max(map(math.prod, shapes.values()))


def measure(source, out):
    "Split it in this process; print seconds, and bytes of memory at the worst beyond those at the start."
    from libortho.stream import OrthoConfig, stream_decompose

    def memory(what):
        return int(re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the worst so far is forgotten
    before, began = memory("VmRSS"), time.perf_counter()
    stream_decompose(source, out, OrthoConfig(scale="max", density=1e-4), progress=False)
    print(json.dumps([time.perf_counter() - began, memory("VmHWM") - before]))


def main(sizes):
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}; scale max, density 1e-4"
    )
    print(f"{'weights, M':>12}{'s':>9}{'peak, MB':>10}{'bound, MB':>11}{'s a billion':>13}", flush=True)
    times = {}
    for shape in sizes:
        folder = Path(tempfile.mkdtemp(prefix="libortho-bench-"))
        try:
            weights, largest = checkpoint(folder, *shape)
            run = [sys.executable, __file__, "--measure", str(folder), str(folder / "out")]
            told = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds, peak = json.loads(told.splitlines()[-1])
        finally:
            shutil.rmtree(folder)
        times[weights], bound = seconds, 2 * 4 * largest + 1e9
        row = f"{weights / 1e6:12.0f}{seconds:9.1f}{peak / 1e6:10.0f}{bound / 1e6:11.0f}{seconds / weights * 1e9:13.1f}"
        print(row, flush=True)
    x, y = ([math.log(v) for v in values] for values in (times, times.values()))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    if len(x) > 1:
        slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
        print(f"slope of log time over log weights: {slope:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main([shape for size, shape in SIZES.items() if size < 2 or str(size) in sys.argv])
