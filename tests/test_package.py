"""Rules that no other test holds: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pgn_fast"

# A module may import what is listed after it in this list, and its own files.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo"},
    {"train", "serve", "client", "export"},
    {"tasks"},
    {"inversion", "adapters", "words"},
    {"methods"},
    {"models"},
    {"prompts", "cuda_graphs", "autotune"},
    {"backbone"},
    {"ops"},
    {"reference", "kernels", "_native"},
    {"_C"},
    {"_stored", "_values", "hub", "images"},
    {"_files"},
    {"errors", "digits", "plots", "_cuda_archs"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
# imports inside functions that close a circle on purpose, with the reason
ALLOWED = {
    ("models", "adapters"),  # save_pretrained is a method, its code is a module of its own
    ("adapters", "inversion"),  # an adapter that was trained in gamut rebuilds its library
    ("backbone", "demo"),  # load_backbone("pgn_demo_vit") reads the packaged weights
}


def imported_modules(path: Path) -> set[str]:
    """Top-level modules of pgn_fast that a file imports, anywhere in it."""
    package = ("pgn_fast", *path.relative_to(PACKAGE).parent.parts)
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            targets = [(*module, alias.name) for alias in node.names]
        modules |= {t[1] for t in targets if t[0] == "pgn_fast" and len(t) > 1 and t[1] in LEVEL}
    return modules


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert module in LEVEL, f"{module} is not listed: add it to LAYERS"
    for other in imported_modules(path) - {module}:
        if (module, other) not in ALLOWED:
            assert LEVEL[other] > LEVEL[module], f"{path.name} ({module}) imports {other}"


def test_import_is_light():
    """`import pgn_fast` and `pgn-fast --help` must not pay for timm (10 s) or torchvision."""
    code = (
        "import sys, pgn_fast\n"
        "heavy = {'timm', 'torchvision', 'torch', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from pgn_fast import ops, PromptGenerator\n"
        "heavy = {'timm', 'torchvision', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_layout_hides_no_other_package():
    """A `kernels/__init__.py` would shadow Hugging Face's package `kernels` from the root, a root
    conftest would put the root on sys.path, a folder `kernels/triton` would shadow triton."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "kernels/triton").exists()


def test_public_names_exist():
    import pgn_fast

    for name in pgn_fast.__all__:
        assert getattr(pgn_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pgn_fast.nonsense  # noqa: B018


def test_floors_are_the_ones_that_are_run():
    """`make floors` installs exactly the oldest versions that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = dict(requirement.split(">=") for requirement in project["dependencies"])
    (line,) = re.findall(r"^FLOORS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    run = dict(requirement.split("==") for requirement in line.split())
    assert {name: version.split(".") for name, version in allowed.items()} == {
        name: version.split(".")[: allowed[name].count(".") + 1] for name, version in run.items()
    }


def test_the_hard_dependencies_are_few():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    assert names == {"torch", "timm", "numpy", "safetensors", "pillow", "rich"}
