"""Every code block of README and docs: Python and curl run, commands are ones that are understood.

Python runs on tiny stand-ins: timm's pretrained models are small random ones of the same class, a
repository of the hub is a folder of its name, and what a page loads was saved just before. Clients
and curl call servers that listen. Blocks for Ray are in examples/, which tests/test_scale.py runs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from serving import serving
from small_world import transformers_of_the_twins
from tiny_clip import tiny_transformers

import pgn_fast
from pgn_fast.cli import build_parser
from pgn_fast.client import encode_plain
from pgn_fast.inversion import CanvasLayout, GamutLibrary, PatchMap
from pgn_fast.serve import create_app, load_served_model, load_served_tasks
from pgn_fast.serve.admin import create_admin

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
RAY, CLIENT = r"^(import|from) ray\b", r"\b(RgbClient|TaskClient|InferenceServerClient)\("


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (str(page.relative_to(ROOT)), code)
        for page in PAGES
        for kind, code in BLOCK.findall(page.read_text())
        if kind == language
    ]


def python(pattern: str, found: bool) -> list[tuple[str, str]]:
    """Python blocks that hold the pattern, or those that do not; never Ray's."""
    return [
        (page, code)
        for page, code in blocks("python")
        if bool(re.search(pattern, code)) is found and not re.search(RAY, code, flags=re.M)
    ]


def lines(pattern: str) -> list[tuple[str, str]]:
    """(page, command) of every shell line that holds the pattern."""
    return [
        (page, re.split(r"\s#", line)[0].strip())
        for page, code in blocks("bash")
        for line in code.replace("\\\n", " ").splitlines()
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("page, line", lines(r"\bpgn-fast (?!COMMAND)|-m pgn_fast "))
def test_commands_are_understood(page, line):
    command = re.split(r"\bpgn-fast |-m pgn_fast ", line)[-1]
    words = [word for word in shlex.split(command) if word != "..."]
    arguments = build_parser(words[0]).parse_args(words)
    assert arguments.command == words[0]


@pytest.mark.parametrize("page, line", lines(r"\b(make|python|pytest) "))
def test_targets_and_files_of_commands_exist(page, line):
    words = shlex.split(line)
    for target in words[words.index("make") + 1 :] if "make" in words else ():
        assert "=" in target or target in TARGETS, f"make {target}"
    for word in words:
        if re.match("(bench|examples|tests|tools)/", word) and "results/" not in word:
            assert (ROOT / word).exists(), word


def test_no_commands_stand_in_a_block_without_a_language():
    """No test would look at them."""
    for page, code in blocks(""):
        assert not re.match(r"(pgn-fast|python|pytest|make|pip|curl|torchrun|cd) ", code), page


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_outside_the_site_lead_somewhere(page):
    """``mkdocs build --strict`` looks at those of docs/."""
    text = page.read_text()
    heads = {
        re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in re.findall("^#+ (.*)$", text, re.M)
    }
    heads = {head.lower() for head in heads}
    for place, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        assert (ROOT / place).exists(), place
        assert place or anchor in heads, anchor


def test_every_script_is_named_where_people_look():
    places = [*PAGES, ROOT / "Makefile", *(ROOT / "tests").glob("*.py")]
    named = "".join(place.read_text() for place in places if place != Path(__file__))
    for folder in ("bench", "examples", "tools"):
        for script in (ROOT / folder).glob("*.py"):
            if "__main__" in script.read_text():
                assert re.search(rf"\b{script.stem}\b", named), script


def test_the_api_pages_have_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    documented = set(re.findall(r"^::: pgn_fast\.(\w+)$", pages, flags=re.M))
    assert documented == set(pgn_fast._EXPORTS)


@pytest.fixture
def small_world(tmp_path, monkeypatch) -> dict[str, Any]:
    """Names that the pages take for granted."""
    real = timm.create_model
    sizes = {"img_size": 56, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}

    def create(name: str, pretrained: bool = False, **options):
        return real(name, **(sizes if pretrained else {}) | options)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.chdir(tmp_path)
    photos = pgn_fast.VPT("pgn_demo_vit", 3, num_prompts=2)
    photos.save_pretrained("runs/photos/best", class_names=["a", "b", "c"])
    backbone = create("vit_base_patch32_clip_224", pretrained=True, dynamic_img_size=True)
    return {
        "torch": torch,
        "pgn_fast": pgn_fast,
        "backbone": backbone,
        "images": torch.rand(2, 3, 32, 32),
        "sizes": sizes,
    }


@pytest.mark.parametrize("page, code", python(CLIENT, False))
def test_python_runs(page, code, small_world):
    if "PatchMap" in code:
        small_world["images"] = torch.rand(2, 3, 56, 56)
    if "adapters/pets" in code:
        small_world["model"] = pgn_fast.VPT("pgn_demo_vit", 3, num_prompts=2)
    if "from_official" in code:  # what was published is 768 wide
        small_world["sizes"] |= {"embed_dim": 768, "depth": 1}
        small_world["text_features"] = torch.randn(5, 512)
        shutil.copy(ROOT / "tests/fixtures/official_pgn/pgn_clip_cifar100.pt", ".")
    if "encode_class_names(" in code:
        tiny_transformers(Path("openai/clip-vit-base-patch32"))
        small_world["clip_backbone"] = pgn_fast.load_backbone("openai/clip-vit-base-patch32")
    if "pgn_fast.fit(" in code:
        pairs = [(torch.rand(3, 56, 56), label) for label in range(4)]
        small_world |= {"train": pairs, "val": pairs}
    if "import transformers" in code:
        transformers_of_the_twins()
    exec(compile(code, page, "exec"), small_world)


@pytest.fixture
def tasks(tmp_path) -> Any:
    """What a server of the task ``pets`` answers with; its adapter is in ``adapters/pets``."""
    model = pgn_fast.VPT("pgn_demo_vit", 3, num_prompts=2)
    model.save_pretrained(tmp_path / "adapters/pets", class_names=["Sphynx", "Beagle", "Pug"])
    for name in ("cat.png", "dog.jpg"):
        Image.new("RGB", (40, 50), "gray").save(tmp_path / name)
    return load_served_tasks(tmp_path / "adapters", watch_s=0)


@pytest.fixture
def urls(tasks) -> Iterator[dict[str, str]]:
    """The pages' addresses -> those of servers that listen."""
    with (
        serving(create_app(tasks)) as (predict, _),
        serving(create_admin(tasks)) as (admin, _),
    ):
        places = {"127.0.0.1:8000": predict, "127.0.0.1:8001": admin}
        yield {page: url.removeprefix("http://") for page, url in places.items()}


def moved(text: str, places: dict[str, str]) -> str:
    for old, new in places.items():
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("page, code", python(r"\b(TaskClient|InferenceServerClient)\(", True))
def test_clients_of_tasks_run(page, code, small_world, urls):
    levels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    world = small_world | {"images": levels, "encoded": encode_plain(levels)}
    exec(compile(moved(code, urls), page, "exec"), world)


@pytest.mark.parametrize("page, code", python(r"\bRgbClient\(", True))
def test_clients_of_an_untouched_model_run(page, code, small_world):
    served = load_served_model("pgn_demo_vit")
    layout = CanvasLayout.border(grid=(4, 4), image=(3, 3), prompts=2)
    library = GamutLibrary(8, PatchMap.from_backbone(served.model, layout=layout))
    model = pgn_fast.PGN("pgn_demo_vit", 3, num_prompts=2, library_size=8, token_library=library)
    model.save_pretrained("runs/pgn/best")
    with serving(create_app(served)) as (url, _):
        code = moved(code, {"http://127.0.0.1:8000": url})
        exec(compile(code, page, "exec"), small_world)
    assert small_world["logits"].shape == (2, 3)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    "page, line", [found for found in lines(r"^curl ") if "?task" not in found[1]]
)
def test_curl_gets_an_answer(page, line, tasks, urls, tmp_path):
    if '"source"' in line:
        tasks.remove("pets")  # as the page's comes in
        line = line.replace("/adapters", str(tmp_path / "adapters"))
    words = ["curl", "--fail-with-body", "-sS", *shlex.split(moved(line, urls))[1:]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
