"""Builds the package. Everything that can be a setting is read from settings.ini, which nbdev reads too."""
import os
import runpy
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
SETTINGS = "settings.ini"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def read_settings():
    parser = ConfigParser(delimiters=("=",))
    parser.read(ROOT / SETTINGS, encoding="utf-8")
    return parser["DEFAULT"]


def ext_modules():
    """The kernels to compile ahead of time, where torch and a compiler are at hand; else they are when needed."""
    if not any(shutil.which(c) for c in (os.environ.get("CXX", ""), "g++", "clang++") if c):
        return []
    try:
        import torch
    except ImportError:  # a build in isolation
        return []
    kernels = runpy.run_path(str(ROOT / "kernels" / "__init__.py"))
    compile_args, link_args = kernels["arguments"](Path(torch.__file__).parent, torch.compiled_with_cxx11_abi())
    return [
        Extension(
            # not a Python module: torch loads it, and finds it by what it was made from
            f"libortho._kernels_{kernels['digest'](torch.__version__)}",
            [f"kernels/{name}" for name in kernels["SOURCES"]["cpu"]],
            depends=[f"kernels/{name}" for name in kernels["HEADERS"]["cpu"]],
            extra_compile_args=compile_args,
            extra_link_args=["-fopenmp", *link_args],
            language="c++",
            optional=True,
        )
    ]


class SdistWithSettings(sdist):
    """A source archive has to carry settings.ini, or it could not be built."""

    def make_distribution(self):
        self.filelist.append(SETTINGS)
        super().make_distribution()


cfg = read_settings()
readme = ROOT / "README.md"
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: {v}" for v in PYTHONS),
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "lab": cfg["lab_requirements"].split(),
        "dev": cfg["lab_requirements"].split() + cfg["dev_requirements"].split(),
    },
    # The sources of the kernels and the experiment notebooks live elsewhere, and are subpackages once installed.
    packages=[*find_packages(include=["libortho", "libortho.*"]), "libortho.kernels", "libortho.experiments"],
    package_dir={"libortho.kernels": "kernels", "libortho.experiments": "nbs/experiments"},
    package_data={"libortho.kernels": ["*.cpp", "*.cu", "*.h", "*.cuh"], "libortho.experiments": ["*.ipynb"]},
    ext_modules=ext_modules(),
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],  # lets nbdev link names in prose to their pages
    },
    cmdclass={"sdist": SdistWithSettings},
    zip_safe=False,
)
