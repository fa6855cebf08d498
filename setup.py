"""Builds the native core with CMake and Ninja; everything declarative is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

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


def load(path: Path) -> ModuleType:
    """A module by its file: importing it from the package would import torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def find_nvcc() -> str | None:
    """CUDACXX, then the nvcc of CUDA_HOME, of PATH and of the usual place."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home]
    for place in (os.environ.get("CUDACXX"), *places, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if place and (found := shutil.which(place)):
            return found
    return None


def compiler_knows(nvcc: str) -> list[str] | None:
    """Numbers of the architectures that this nvcc compiles for; None where it does not tell."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    return re.findall(r"compute_(\d+)", done.stdout) or None


class CudaBuildError(Exception):
    """Why the CUDA kernels are not built; the CPU core does without."""


class CMakeBuild(build_ext):
    """Builds the CPU core and the CUDA kernels with CMake, each in a folder of its own, and
    installs them next to the Python sources."""

    def run(self) -> None:
        wanted = os.environ.get("PGN_FAST_CUDA", "auto").lower()
        if wanted not in ("auto", "on", "off"):
            raise SystemExit(f"PGN_FAST_CUDA is auto, on or off, got {wanted!r}")
        check_compiler()
        self.prefix = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        self.cmake("cpu")
        # what an earlier build left would outlive PGN_FAST_CUDA=off and a build that fails
        library = self.prefix / "pgn_fast/_C_cuda.so"
        reason = library.with_suffix(".txt")
        library.unlink(missing_ok=True)
        reason.unlink(missing_ok=True)
        try:
            self.build_cuda(wanted)
        except CudaBuildError as error:
            if wanted == "on":
                raise SystemExit(f"pgn_fast: PGN_FAST_CUDA=on, but {error}") from None
            # pip hides what a build prints: `pgn-fast env` reads the reason from this file
            reason.write_text(f"{error}\n")
            print(f"pgn_fast: building without the CUDA kernels: {error}")

    def build_cuda(self, wanted: str) -> None:
        if wanted == "off":
            raise CudaBuildError("PGN_FAST_CUDA=off")
        nvcc = find_nvcc()
        if nvcc is None:
            raise CudaBuildError("no nvcc was found; put it on PATH or set CUDA_HOME")
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
        archs, lines = load(ROOT / "pgn_fast/_cuda_archs.py").for_build(
            asked, compiler_knows=compiler_knows(nvcc)
        )
        for line in lines:
            print(f"pgn_fast: TORCH_CUDA_ARCH_LIST: {line}")
        if not archs:
            raise CudaBuildError(f"TORCH_CUDA_ARCH_LIST={asked} leaves none: {'; '.join(lines)}")
        listed = ";".join(arch.cmake() for arch in archs)
        # a wheel is downloaded by people who do not profile its kernels
        line_info = "ON" if self.prefix == ROOT else "OFF"
        try:
            self.cmake(
                *("cuda", "-DPGN_FAST_CUDA=ON", f"-DPGN_FAST_CUDA_ARCHS={listed}"),
                *(f"-DPGN_FAST_LINE_INFO={line_info}", f"-DCMAKE_CUDA_COMPILER={nvcc}"),
            )
        except subprocess.CalledProcessError as error:
            raise CudaBuildError(
                f"nvcc ({nvcc}) failed to build them for {listed}; "
                "PGN_FAST_CUDA=on pip install -v -e . shows why"
            ) from error

    def cmake(self, part: str, *definitions: str) -> None:
        """Configure, build and install one part; raises CalledProcessError."""
        torch = find_torch()
        if torch is None:
            raise SystemExit("pgn_fast needs torch >= 2.10 to build: pip install 'torch>=2.10'")
        import pybind11

        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{part}"
        options = {
            # given on every run: what a previous, isolated build cached is gone by now
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PGN_FAST_TORCH_DIR": torch,
        }
        cmake = tool("cmake")
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run([*configure, *os.environ.get("CMAKE_ARGS", "").split()], check=True)
        target = {"cpu": "_C", "cuda": "_C_cuda"}[part]
        subprocess.run([cmake, "--build", build, "--target", target], check=True)
        # setuptools would copy the declared extension alone
        install = [cmake, "--install", build, "--prefix", self.prefix, "--component", part]
        subprocess.run(install, check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "pgn_fast"
        return [str(path) for path in (*package.glob("*.so"), *package.glob("_C_cuda.txt"))]

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
        "pgn_fast.train": ["*/*.json"],
    },
    setup_requires=[] if find_torch() else ["torch>=2.10"],
)
