"""C++ sources of the dual-stream product, shipped with the package as `libortho.kernels`, and how they are compiled."""

import hashlib
from pathlib import Path

SOURCES = ("bindings.cpp", "dual_gemm_cpu.cpp")
HEADERS = ("panels.h",)
FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-Wno-psabi")
LIBRARIES = ("c10", "torch_cpu", "torch")


def arguments(home: Path, cxx11_abi: bool) -> tuple[list[str], list[str]]:
    "What the compiler and the linker are told, for torch installed at `home`."
    include = [f for p in ("include", "include/torch/csrc/api/include") for f in ("-isystem", str(home / p))]
    libraries = [f"-l{name}" for name in LIBRARIES]
    return [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(cxx11_abi)}", *include], [f"-L{home / 'lib'}", *libraries]


def digest(*told: str) -> str:
    "Names a build: what it was made from, and whatever else is told, such as torch's version."
    found = hashlib.blake2b(digest_size=12)
    for part in (*told, *FLAGS, *LIBRARIES):
        found.update(part.encode() + b"\0")
    for name in (*SOURCES, *HEADERS):
        found.update((Path(__file__).parent / name).read_bytes())
    return found.hexdigest()
