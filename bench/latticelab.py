"""How fast does LatticeLab answer in the kernel, for a layer of 2048 x 5632? The browser comes on top.

python bench/latticelab.py        10 moves of every control
python bench/latticelab.py 50     50 of them
"""

import itertools
import os
import statistics
import sys
import time

import torch

from libortho.latticelab import lattice_lab
from libortho.streams import OrthoConfig


def layer():
    "A layer with tails as real ones have."
    torch.manual_seed(0)
    linear = torch.nn.Linear(5632, 2048, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.distributions.StudentT(5.0).sample(linear.weight.shape) * 0.02)
    return linear


def main(moves):
    cores, threads = os.cpu_count(), torch.get_num_threads()
    print(f"{cores} cores, {threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    linear = layer()
    began = time.perf_counter()
    lab = lattice_lab(linear, OrthoConfig(scale="ratio", density=0.01, noise="tri_state"))
    print(f"opened in {1e3 * (time.perf_counter() - began):.0f} ms; {lab.shown.scope}")
    lab.job.stop()
    lab._follow = lambda: None  # only the answer under the hand is timed here
    print(f"{'control':10} {'median':>8} {'quartiles':>16} {'worst':>8} {'cpu':>8}   ms")
    new = itertools.count()
    values = {
        "ratio": lambda: 1.0 + next(new) % 60 / 10,  # a lattice that was not seen before
        "density": lambda: 10 ** (-4 + next(new) % 30 / 10),
        "noise": lambda: lab.noise.options[next(new) % 5],
        "sieve": lambda: lab.sieve.options[next(new) % 2],
        "scale": lambda: lab.scale.options[next(new) % 6],
        "mask": lambda: lab.mask.options[next(new) % 3],
    }
    for name, value in values.items():
        wall, cpu = [], []
        for _ in range(moves):
            if name == "scale":
                lab.bench.samples.kept.clear()
            wished, t, c = value(), time.perf_counter(), time.process_time()
            getattr(lab, name).value = wished
            wall.append(1e3 * (time.perf_counter() - t))
            cpu.append(1e3 * (time.process_time() - c))
        q = statistics.quantiles(wall, n=4)
        print(f"{name:10} {q[1]:8.0f} {q[0]:7.0f} to {q[2]:5.0f} {max(wall):8.0f} {statistics.median(cpu):8.0f}")
    began = time.perf_counter()
    lab.bench.exact(lab.layer.value, lab.config())
    print(f"all rows, in the background: {time.perf_counter() - began:.1f} s and the figures")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
