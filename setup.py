"""Builds the native core with CMake and Ninja; everything declarative is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)


def find_torch() -> Path | None:
    """The torch package to compile against, without importing it.

    Under pip's build isolation torch is hidden from sys.path, yet the interpreter is still the
    target environment's, so its site-packages is looked at too. Only headers and a link name are
    taken, and the stable ABI makes any torch >= 2.10 as good as another.
    """
    given = os.environ.get("PGN_FAST_TORCH_DIR")
    places = [Path(p) / "torch" for p in (*sys.path, sysconfig.get_path("platlib"))]
    for torch in [Path(given)] if given else places:
        version = torch / "version.py"
        if version.is_file() and (torch / "include/torch/csrc/stable/library.h").is_file():
            found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
            if found and tuple(map(int, found.groups())) >= OLDEST_TORCH:
                return torch
    return None


def tool(name: str) -> str:
    """cmake or ninja: the build environment's own first, then the system's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"pgn_fast needs {name} to build its kernels: pip install {name}")
    return found


def check_compiler() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")):
        raise SystemExit(
            "pgn_fast needs a C++17 compiler to build its kernels and found none: install g++ "
            "(Debian, Ubuntu: apt-get install g++) or set CXX."
        )


class CMakeBuild(build_ext):
    """Runs CMake once for all native targets and installs them next to the Python sources."""

    def run(self) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit("pgn_fast needs torch >= 2.10 to build: pip install 'torch>=2.10'")
        check_compiler()
        import pybind11

        prefix = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        options = {
            # given on every run: what a previous, isolated build cached is gone by now
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PGN_FAST_TORCH_DIR": torch,
            "PGN_FAST_CUDA": os.environ.get("PGN_FAST_CUDA", "auto"),
            "PGN_FAST_CUDA_ARCHS": os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a"),
        }
        cmake = tool("cmake")
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run([*configure, *os.environ.get("CMAKE_ARGS", "").split()], check=True)
        subprocess.run([cmake, "--build", build], check=True)
        # setuptools would copy the declared extension alone; and a CUDA library of an earlier
        # build would outlive PGN_FAST_CUDA=off
        (prefix / "pgn_fast/_C_cuda.so").unlink(missing_ok=True)
        subprocess.run([cmake, "--install", build, "--prefix", prefix], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "pgn_fast").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("pgn_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[*find_packages(include=["pgn_fast", "pgn_fast.*"]), "pgn_fast.kernels"],
    package_dir={"pgn_fast.kernels": "kernels/pgn_triton"},
    package_data={
        "pgn_fast": ["py.typed", "_C.pyi", "digits.npz"],
        "pgn_fast.demo": ["*.safetensors", "*.json"],
    },
    setup_requires=[] if find_torch() else ["torch>=2.10"],
)
