"""Plants one bug at a time in the CPU kernels and expects their tests to notice.

    python tests/mutations.py [--sanitize]

The sources are copied aside, patched, built (only the patched file) and tested; nothing here
touches the working tree. ``--sanitize`` plants nothing: it builds with AddressSanitizer and
UndefinedBehaviorSanitizer and runs the same tests, which then have to pass. Not collected by
pytest: one build takes longer than all tests of the ops.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ISA = Path("csrc/cpu/isa")

# (what is wrong, file, what stands there, what the bug makes of it)
MUTATIONS = [
    (
        "wrong mask: one key too few in the weighted sum",
        ISA / "prompt_attention.inc",
        "s.values, width, rows, d, keys, s.out",
        "s.values, width, rows, d, keys - 1, s.out",
    ),
    (
        "last query left out",
        ISA / "prompt_attention.inc",
        "visit(first, (last < Q ? last : Q) - first);",
        "visit(first, (last < Q ? last : Q - 1) - first);",
    ),
    (
        "first key left out of the sum of weights",
        ISA / "prompt_attention.inc",
        "part[n] += power;",
        "if (k > 0) part[n] += power;",
    ),
    (
        "the prompts of an image before it",
        ISA / "prompt_attention.inc",
        "seen.first != packed.first || seen.count != packed.count",
        "packed.first < 0",
    ),
    (
        "variance about zero",
        ISA / "add_layer_norm.inc",
        "keep(load_part(total + d, count) - mean, count)",
        "keep(load_part(total + d, count), count)",
    ),
    (
        "the norm's gradient without its mean",
        ISA / "add_layer_norm.inc",
        "(g - mean - load_part(normed + d, count) * slope)",
        "(g - load_part(normed + d, count) * slope)",
    ),
    (
        "swapped strides of the image",
        ISA / "prompted_patch_embed.inc",
        "image + c * s.stride_c + (y * s.p_h + dy) * s.stride_y",
        "image + c * s.stride_y + (y * s.p_h + dy) * s.stride_c",
    ),
    (
        "partial sums of all ranges but the last (a missing wait)",
        Path("csrc/cpu/prompt_attention.cpp"),
        "summands = a.shared ? splits : 1",
        "summands = a.shared && splits > 1 ? splits - 1 : 1",
    ),
    (
        "tail of a row left out of the softmax",
        ISA / "lanes.h",
        "  if (k < K) {\n",
        "  if (k < K && k == 0) {\n",
    ),
    (
        "sums not carried over a deep panel",
        ISA / "product.h",
        "add || k > 0",
        "add",
    ),
]

# the tests of every op that has CPU loops here
FILES = sorted(
    f"test_{loops.stem}.py"
    for loops in (ROOT / ISA).glob("*.inc")
    if (ROOT / f"tests/test_{loops.stem}.py").is_file()
)
# the sanitized run takes the random shapes too; opcheck and the other backends say nothing about it
SELECT = "cpu and not triton and not cuda and not reference"


def copy_sources(to: Path) -> None:
    for name in ("csrc", "pgn_fast", "tests", "kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "fixtures")
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, to)


def build(tree: Path, flags: str = "") -> bool:
    """CPU kernels of ``tree`` into its own pgn_fast; False where it does not compile."""
    import pybind11

    folder = tree / "build"
    if not (folder / "build.ninja").exists():
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_FLAGS": flags,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PGN_FAST_TORCH_DIR": Path(sysconfig.get_path("platlib")) / "torch",
            "PGN_FAST_CUDA": "off",
        }
        command = ["cmake", "-S", tree, "-B", folder, "-G", "Ninja"]
        command += [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment())
    for step in (["--build", folder], ["--install", folder, "--prefix", tree]):
        done = subprocess.run(["cmake", *step], capture_output=True, text=True, env=_environment())
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-3000:])
            return False
    return True


def _environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **extra}


def run_tests(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # -P: the tree's own package, and no other, by PYTHONPATH
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", SELECT, *(str(tree / "tests" / name) for name in FILES)]
    return subprocess.run(
        command, cwd=tree, capture_output=True, text=True,
        env=_environment(PYTHONPATH=str(tree), **environment),
    )  # fmt: skip


def library(name: str) -> str:
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def sanitize(tree: Path) -> int:
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    if not build(tree, flags):
        return 1
    # without libstdc++ beside it, the first C++ exception aborts
    preload = f"{library('libasan.so')}:{library('libstdc++.so')}"
    done = run_tests(tree, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")
    print(done.stdout[-3000:], done.stderr[-3000:])
    return done.returncode


def mutate(tree: Path) -> int:
    if not build(tree) or run_tests(tree).returncode:
        print("the tests do not pass without a planted bug")
        return 1
    missed = 0
    for what, file, sound, broken in MUTATIONS:
        path, text = tree / file, (ROOT / file).read_text()
        if sound not in text:
            print(f"STALE   {what}: {file} no longer holds {sound!r}")
            missed += 1
            continue
        path.write_text(text.replace(sound, broken))
        noticed = build(tree) and run_tests(tree).returncode == 1
        print(f"{'noticed' if noticed else 'MISSED '} {what}", flush=True)
        missed += not noticed
        path.write_text(text)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="plant nothing, check memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_sources(tree)
        return sanitize(tree) if arguments.sanitize else mutate(tree)


if __name__ == "__main__":
    sys.exit(main())
