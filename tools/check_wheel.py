"""What a wheel ships, how large it is, what it is tied to; and a fast part of the tests against it.

    python tools/check_wheel.py dist/*.whl         contents, size, tags, stable ABI
    python tools/check_wheel.py --run-tests        with the Python that it is installed for

``make wheels`` does both, the tests in an empty environment without a compiler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEGABYTES = 10
TAG = re.compile(r"-(cp3\d+)-\1-(manylinux|linux|macosx)_\w+\.whl$")
SHIPPED = re.compile(
    r"pgn_fast/(\w+/)*\w+\.py|pgn_fast/(py\.typed|_C\.pyi|digits\.npz|_C\.[\w-]+\.so|_C_cuda\.(so|txt))"
    r"|pgn_fast/demo/demo_vit\.(safetensors|json)|pgn_fast/train/\w+/\w+\.json"
    r"|pgn_fast-[^/]+\.dist-info/.+"
)
NEEDED = (
    *("pgn_fast/__init__.py", "pgn_fast/_C.pyi", "pgn_fast/kernels/mix_prompts.py"),
    *("pgn_fast/digits.npz", "pgn_fast/demo/demo_vit.safetensors", "pgn_fast/demo/demo_vit.json"),
    "pgn_fast/py.typed",
    *("pgn_fast/train/protocols/pgn_classes.json", "pgn_fast/train/reproduce/paper_numbers.json"),
)
# of each layer something that needs no extra, in a few minutes
TESTS = (
    *("mix_prompts", "prompted_patch_embed", "prompt_attention", "add_layer_norm"),
    *("feedback_round", "frozen_linear", "methods", "adapters", "prompt_schedule", "head_init"),
)


def complaints(wheel: Path) -> list[str]:
    """What is wrong with a wheel."""
    found = []
    if not TAG.search(wheel.name):
        found.append("its name does not say one Python and a platform")
    if (size := wheel.stat().st_size / 1e6) > MEGABYTES:
        found.append(f"{size:.1f} MB, wanted: at most {MEGABYTES}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found += [f"ships {name}" for name in names if not SHIPPED.fullmatch(name)]
        found += [f"lacks {name}" for name in NEEDED if name not in names]
        archive.extractall(folder)
        tied = audit(Path(folder, "pgn_fast"))
        print(tied.stdout)
        if tied.returncode:
            found.append(f"torch-abi-audit: {tied.stderr}")
    return found


def audit(package: Path) -> subprocess.CompletedProcess[str]:
    """torch-abi-audit of a folder: what its libraries are tied to, by their symbols."""
    code = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--check", "torch", str(package)]
    return subprocess.run(command, capture_output=True, text=True)


def run_tests() -> int:
    """The tests on the installed package; a checkout beside them must not be what they import."""
    code = "import pgn_fast._native as n; print(n.__file__); assert n.C, n.cpu_missing"
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True
        )
        if done.returncode or Path(done.stdout.strip()).is_relative_to(ROOT / "pgn_fast"):
            print(done.stdout, done.stderr, "no installed package is what the tests would import")
            return 1
        command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml"]
        command += ["--rootdir", ROOT, "-p", "no:cacheprovider", "-m", "not slow"]
        command += [ROOT / f"tests/test_{name}.py" for name in TESTS]
        return subprocess.run(command, cwd=elsewhere).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="*")
    parser.add_argument("--run-tests", action="store_true")
    arguments = parser.parse_args()
    found = [f"{w.name}: {what}" for w in arguments.wheels for what in complaints(w)]
    print("\n".join(found))
    return run_tests() if arguments.run_tests and not found else int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
