"""Rules that no other test holds: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zlib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import check_wheel
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
    {"inversion", "adapters", "words", "autotune"},
    {"methods"},
    {"models"},
    {"prompts", "cuda_graphs"},
    {"backbone"},
    {"ops"},
    {"reference", "kernels", "_native"},
    {"_C"},
    {"_stored", "_values", "hub", "images"},
    {"_files", "_json"},
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


# packages of the extras, and timm with what it pulls in: only those who use them pay for them
HEAVY = {
    *("timm", "torchvision", "matplotlib", "sklearn", "transformers", "open_clip"),
    *("datasets", "webdataset", "torchdata", "onnx", "onnxruntime", "openvino", "fastapi"),
    *("uvicorn", "tensorboard", "accelerate", "optuna", "torchmetrics"),
}


def test_import_is_light():
    """`import pgn_fast` and `pgn-fast --help` must not pay for timm (10 s) or torchvision."""
    code = (
        "import sys, pgn_fast\n"
        f"heavy = {HEAVY | {'torch', 'numpy'}} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from pgn_fast import ops, PromptGenerator\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
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
    (transformers,) = project()["optional-dependencies"]["hf"]
    wanted = [*project()["dependencies"], transformers.partition(";")[0]]
    allowed = dict(requirement.split(">=") for requirement in wanted)
    lines = re.findall(r"^FLOOR(?:S|_HF) := (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    run = dict(requirement.split("==") for requirement in " ".join(lines).split())
    assert {name: version.split(".") for name, version in allowed.items()} == {
        name: version.split(".")[: allowed[name].count(".") + 1] for name, version in run.items()
    }


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: Iterable[str]) -> set[str]:
    """Distributions that requirements name, as PyPI spells them."""
    found = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


def test_the_hard_dependencies_are_few():
    wanted = {"torch", "timm", "numpy", "safetensors", "pillow", "rich"}
    assert names(project()["dependencies"]) == wanted


def test_extras_that_are_named_exist():
    """Every `pip install 'pgn_fast[NAME]'` of a message, a page or another extra."""
    extras = project()["optional-dependencies"]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in [ROOT / "pyproject.toml", *PACKAGE.rglob("*.py"), *pages]:
        for named in re.findall(r"pgn_fast\[([\w, ]+)\]", path.read_text()):
            assert set(re.split(r", ?", named)) <= set(extras), f"{path}: pgn_fast[{named}]"
    users = set(extras) - {"docs", "test", "dev", "all"}
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything.partition("[")[2])) == users


# what a module is installed by, where it does not have its distribution's name
INSTALLED_BY = {
    "PIL": "pillow",
    "yaml": "timm",
    "huggingface_hub": "timm",
    "torchvision": "timm",
    "typing_extensions": "torch",
    "triton": "torch",
    "starlette": "fastapi",
    "open_clip": "open-clip-torch",
    "sklearn": "scikit-learn",
    "pgn_fast": "torch",
}


def test_every_import_has_a_requirement():
    """What a module of the package imports when it is imported comes with every installation, what
    it imports later at least with an extra. The server and the readers of other libraries' models
    are themselves imported late."""
    extras = names(r for listed in project()["optional-dependencies"].values() for r in listed)
    always = names(project()["dependencies"])
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported = [node.module]
            else:
                continue
            for name in {name.partition(".")[0] for name in imported} - sys.stdlib_module_names:
                package = INSTALLED_BY.get(name, name.replace("_", "-"))
                late = node not in tree.body or {"serve", "twins"} & {*path.parts}
                assert package in (always | extras if late else always), f"{path}: {name}"


def closure(*distributions: str) -> set[str]:
    """Installed distributions that these need, with their own."""
    found: set[str] = set()
    waiting = list(distributions)
    while waiting:
        name = waiting.pop()
        if name not in found and (needed := requirements(name)) is not None:
            found.add(name)
            waiting += names(r for r in needed if "extra ==" not in r)
    return found


def requirements(distribution: str) -> list[str] | None:
    try:
        return metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:  # of another platform or Python
        return None


def test_what_is_downloaded_beside_torch_and_timm_is_small():
    """At most 10 MB, the CUDA kernels apart (tools/check_wheel.py looks at a wheel with them)."""
    beside = closure(*names(project()["dependencies"])) - closure("torch", "timm")
    files = [
        found.locate()
        for name in beside
        for found in metadata.files(name) or []
        if found.suffix != ".pyc"
    ]
    own = [*PACKAGE.rglob("*"), *(ROOT / "kernels").rglob("*.py")]
    files += [f for f in own if f.suffix != ".pyc" and f.name != "_C_cuda.so"]
    downloaded = sum(len(zlib.compress(f.read_bytes(), 1)) for f in files if f.is_file())
    assert downloaded <= 10e6, f"{downloaded / 1e6:.1f} MB, with {sorted(beside)}"


def test_a_wheel_may_ship_what_the_package_holds():
    """Every file of data is one that tools/check_wheel.py knows, and looks for."""
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".pyc", ".so", ".txt"):
            name = path.relative_to(ROOT).as_posix()
            assert check_wheel.SHIPPED.fullmatch(name), name
            if path.suffix in (".json", ".npz", ".safetensors"):
                assert name in check_wheel.NEEDED, name


def test_the_library_is_tied_to_no_torch():
    """torch's stable ABI of 2.10: a wheel serves every later torch."""
    pytest.importorskip("torch_abi_audit")
    library = next(PACKAGE.glob("_C.*.so"), None)
    if library is None:
        pytest.skip("the extension module is not built")
    done = check_wheel.audit(library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Min torch:   2.10.0" in done.stdout
