"""Every code block of README and docs: Python runs, commands are ones that the parser takes.

Python runs on tiny stand-ins: timm's pretrained models are small random ones of the same class, and
the adapters that a page loads were saved just before.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

import pgn_fast
from pgn_fast.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.M | re.S)
# blocks that need a running server; test_client.py and test_serve_*.py show it
NEED_A_SERVER = ("RgbClient(", "TaskClient(", "InferenceServerClient(")


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (str(page.relative_to(ROOT)), code)
        for page in PAGES
        for kind, code in BLOCK.findall(page.read_text())
        if kind == language
    ]


def commands() -> list[str]:
    found = []
    for page, code in blocks("bash"):
        for line in code.replace("\\\n", " ").splitlines():
            if re.search(r"\bpgn-fast (?!COMMAND)|-m pgn_fast ", line):
                found.append(f"{page}: {line.partition(' #')[0].strip()}")
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line):
    command = re.split(r"\bpgn-fast |-m pgn_fast ", line)[-1]
    words = [word for word in shlex.split(command) if word != "..."]
    arguments = build_parser(words[0]).parse_args(words)
    assert arguments.command == words[0]


@pytest.fixture
def small_world(tmp_path, monkeypatch):
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
        "text_features": torch.randn(5, 768),
    }


@pytest.mark.parametrize("page, code", blocks("python"))
def test_python_runs(page, code, small_world):
    if "import ray" in code or "from ray" in code:
        pytest.skip("needs Ray: tests/test_scale.py runs it")
    if any(name in code for name in NEED_A_SERVER):
        pytest.skip("needs a server: tests/test_client.py runs one")
    if "pgn_fast.fit(" in code:
        pytest.skip("trains for 20 epochs: tests/test_fit.py does with less")
    if "from_official" in code:
        pytest.skip("the published checkpoint is 768 wide: tests/test_official_pgn.py loads it")
    if "encode_class_names(" in code:
        pytest.skip("needs a text tower: tests/test_words.py makes one")
    if "PatchMap" in code:
        small_world["images"] = torch.rand(2, 3, 56, 56)
    if "adapters/pets" in code:
        small_world["model"] = pgn_fast.VPT("pgn_demo_vit", 3, num_prompts=2)
    exec(compile(code, page, "exec"), small_world)
