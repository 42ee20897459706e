"""C++ and CUDA sources of the dual-stream product, shipped as `libortho.kernels`, and how they are compiled."""

import hashlib
from pathlib import Path

SOURCES = {"cpu": ("bindings.cpp", "dual_gemm_cpu.cpp"), "cuda": ("bindings_cuda.cpp", "dual_gemm.cu")}
HEADERS = {"cpu": ("operators.h", "panels.h"), "cuda": ("operators.h", "dual_gemm_cuda.h", "warp.cuh")}
FLAGS = {"cpu": ("-fopenmp", "-Wno-psabi"), "cuda": ()}
LIBRARIES = ("c10", "torch_cpu", "torch")


def arguments(home: Path, cxx11_abi: bool, kind: str = "cpu") -> tuple[list[str], list[str]]:
    "What the compiler and the linker are told, for torch installed at `home`."
    include = [f for p in ("include", "include/torch/csrc/api/include") for f in ("-isystem", str(home / p))]
    libraries = [f"-l{name}" for name in LIBRARIES]
    flags = ["-O3", "-std=c++20", *FLAGS[kind], f"-D_GLIBCXX_USE_CXX11_ABI={int(cxx11_abi)}"]
    return [*flags, *include], [f"-L{home / 'lib'}", *libraries]


def digest(*told: str, kind: str = "cpu") -> str:
    "Names a build: what it was made from, and whatever else is told, such as torch's version."
    found = hashlib.blake2b(digest_size=12)
    for part in (*told, *map(str, arguments(Path("/"), True, kind))):
        found.update(part.encode() + b"\0")
    for name in (*SOURCES[kind], *HEADERS[kind]):
        found.update((Path(__file__).parent / name).read_bytes())
    return found.hexdigest()
