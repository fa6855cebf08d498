"""What setup.py builds where CUDA is off, old or broken: the CPU core stands, the reason is kept.

The CPU core itself is not built again here; CMake is run for the CUDA kernels alone.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import setuptools
from setuptools.dist import Distribution

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py's command on a copy of the sources; ``parts`` is what it gave to CMake."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("needs the sources")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "pgn_fast").mkdir()
    for name in ("CMakeLists.txt", "csrc", "pgn_fast/_cuda_archs.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    parts: list[tuple[str, ...]] = []

    class Build(script.CMakeBuild):
        def cmake(self, part: str, *definitions: str) -> None:
            parts.append((part, *definitions))
            if part == "cpu":
                (tmp_path / "pgn_fast/_C.so").touch()
            else:
                self.cuda(part, *definitions)

        cuda = script.CMakeBuild.cmake

    command = Build(Distribution())
    command.inplace, command.editable_mode, command.parts = True, False, parts
    command.package = tmp_path / "pgn_fast"
    return command


def compiler(monkeypatch, tmp_path, body: str) -> Path:
    """A program that stands where nvcc does."""
    path = tmp_path / "nvcc"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(path))
    return path


def reason(build) -> str:
    assert (build.package / "_C.so").exists()
    assert not (build.package / "_C_cuda.so").exists()
    return (build.package / "_C_cuda.txt").read_text()


def test_off_leaves_them_out_and_removes_those_of_before(build, monkeypatch):
    monkeypatch.setenv("PGN_FAST_CUDA", "off")
    (build.package / "_C_cuda.so").touch()
    build.run()
    assert reason(build) == "PGN_FAST_CUDA=off\n"
    assert [part for part, *_ in build.parts] == ["cpu"]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_failing_compiler_costs_only_them(build, monkeypatch, tmp_path, capfd):
    nvcc = compiler(monkeypatch, tmp_path, "exit 1")
    build.run()
    text = reason(build)
    assert text.startswith(f"nvcc ({nvcc}) failed to build them for 80-real;90a-real")
    assert "PGN_FAST_CUDA=on pip install -v -e . shows why" in text
    assert f"building without the CUDA kernels: nvcc ({nvcc}) failed" in capfd.readouterr().out
    monkeypatch.setenv("PGN_FAST_CUDA", "on")
    with pytest.raises(SystemExit, match="PGN_FAST_CUDA=on, but nvcc"):
        build.run()


def test_an_old_architecture_is_dropped_with_a_line(build, monkeypatch, tmp_path, capfd):
    compiler(monkeypatch, tmp_path, "exit 0")
    build.cuda = lambda *given: None
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0")
    build.run()
    assert "TORCH_CUDA_ARCH_LIST: 7.5: " in capfd.readouterr().out
    assert build.parts[1][:3] == ("cuda", "-DPGN_FAST_CUDA=ON", "-DPGN_FAST_CUDA_ARCHS=80-real")
    assert not (build.package / "_C_cuda.txt").exists()


def test_a_wheel_carries_no_lines_for_profilers(build, monkeypatch, tmp_path):
    """They are more than half of the library; a build in place has them."""
    compiler(monkeypatch, tmp_path, "exit 0")
    build.cuda = lambda *given: None
    for build.inplace, wanted in ((True, "ON"), (False, "OFF")):
        build.build_lib = str(tmp_path / "lib")
        (tmp_path / "lib/pgn_fast").mkdir(parents=True, exist_ok=True)
        build.run()
        assert f"-DPGN_FAST_LINE_INFO={wanted}" in build.parts[-1]


def test_old_architectures_alone_leave_none(build, monkeypatch, tmp_path):
    compiler(monkeypatch, tmp_path, "exit 0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    build.run()
    assert reason(build).startswith("TORCH_CUDA_ARCH_LIST=7.5 leaves none: 7.5: ")
    assert [part for part, *_ in build.parts] == ["cpu"]


def test_no_compiler_is_a_reason(build, monkeypatch, tmp_path):
    monkeypatch.setattr(
        shutil, "which", lambda name, **rest: "/usr/bin/c++" if "+" in name else None
    )
    build.run()
    assert reason(build) == "no nvcc was found; put it on PATH or set CUDA_HOME\n"


def test_another_word_is_refused(build, monkeypatch):
    monkeypatch.setenv("PGN_FAST_CUDA", "maybe")
    with pytest.raises(SystemExit, match="auto, on or off, got 'maybe'"):
        build.run()
    assert build.parts == []
