"""Architecture lists as people and images write them, and what is built and run for each."""

from __future__ import annotations

import pytest

from pgn_fast import _cuda_archs, _native
from pgn_fast._cuda_archs import Arch, for_build, missing_code, parse

NVCC_13 = ["75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121"]


def built(text: str | None, gpus: tuple[tuple[int, int], ...] = ()) -> tuple[str, list[str]]:
    archs, lines = for_build(text, compiler_knows=NVCC_13, gpus=lambda: gpus)
    return " ".join(arch.cmake() for arch in archs), lines


@pytest.mark.parametrize(
    "text, cmake",
    [
        ("8.0;9.0a", "80-real 90a-real"),
        # the Hopper kernel needs 9.0a; it runs on the same GPUs as 9.0
        ("9.0", "90a-real"),
        ("9.0+PTX", "90a-real 90-virtual"),
        ("8.0, 8.6  8.9", "80-real 86-real 89-real"),
        ("10.0+PTX", "100"),
        ("12.0f", "120f-real"),
        ("12.1a", "121a-real"),
        ("Hopper", "90a-real"),
        ("hopper+PTX", "90a-real 90-virtual"),
        ("Ampere;Ada", "80-real 86-real 89-real"),
        ("sm_80;compute_90", "80-real 90-virtual"),
        ("80-real;90a-real", "80-real 90a-real"),
        ("86", "86"),
        ("8.0;8.0", "80-real"),
        ("", "80-real 90a-real"),
        (None, "80-real 90a-real"),
    ],
)
def test_lists_that_are_built_whole(text, cmake):
    assert built(text) == (cmake, [])


def test_the_list_of_a_vendor_image_loses_what_the_kernels_cannot_run_on():
    cmake, lines = built("5.2 6.0 7.0 7.5 8.0 8.6 9.0+PTX")
    assert cmake == "80-real 86-real 90a-real 90-virtual"
    assert [line.split(":")[0] for line in lines] == ["5.2", "6.0", "7.0", "7.5"]
    assert all("8.0" in line and "left out" in line for line in lines)


@pytest.mark.parametrize(
    "text, name", [("8.0;Feynman", "Feynman"), ("8.0;9.x", "9.x"), ("8.0;13.0", "13.0")]
)
def test_what_is_unknown_is_named_and_the_rest_built(text, name):
    cmake, (line,) = built(text)
    assert cmake == "80-real" and line.startswith(f"{name}:")


def test_only_old_architectures_leave_none():
    cmake, lines = built("Turing;7.0")
    assert cmake == "" and len(lines) == 2


def test_native_takes_the_gpus_of_this_machine():
    assert built("native", ((8, 9), (9, 0))) == ("89-real 90a-real", [])
    assert built(None, ((12, 0),)) == ("120-real", [])
    assert built("native;10.0+PTX", ((8, 0),)) == ("80-real 100", [])
    cmake, (line,) = built("native")
    assert cmake == "80-real 90a-real" and "no GPU" in line


def test_a_machine_of_an_old_and_a_new_gpu_is_built_for_the_new():
    cmake, (line,) = built(None, ((7, 5), (8, 6)))
    assert cmake == "86-real" and line.startswith("7.5")


@pytest.mark.parametrize(
    "library, capability, runs",
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("90-virtual", (12, 0), True),
        ("90a", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("100f-real", (12, 0), False),
        ("120f-real", (12, 1), True),
        ("100", (12, 0), True),
        ("80", (7, 5), False),
    ],
)
def test_which_gpus_run_a_library(library, capability, runs):
    archs, unknown = parse(library)
    assert not unknown and (missing_code(archs, capability) is None) == runs


def test_the_advice_is_a_list_that_works():
    """Whoever follows the message gets a library that runs on the very device."""
    for capability in ((8, 6), (9, 0), (12, 0)):
        message = missing_code([], capability)
        advised = message.split("TORCH_CUDA_ARCH_LIST=")[1].split()[0]
        archs, lines = for_build(advised, compiler_knows=NVCC_13)
        assert not lines and missing_code(archs, capability) is None
    assert "TORCH_CUDA_ARCH_LIST" not in missing_code([], (7, 5))


def test_every_spelling_is_read_back():
    for arch in (Arch(8, 0), Arch(9, 0, "a"), Arch(10, 0, ptx=True), Arch(9, 0, "", False, True)):
        assert parse(arch.cmake()) == ([arch], [])


def test_no_gpu_tool_is_no_gpu(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert _cuda_archs.visible_gpus() == []


@pytest.mark.parametrize(
    "library, driver, refused",
    [(13000, 13000, False), (12080, 12040, False), (13000, 12080, True), (13020, 0, False)],
)
def test_a_driver_older_than_the_library_is_refused(library, driver, refused):
    reason = _native.driver_unsupported_reason(library, driver)
    assert (reason is not None) == refused
    if reason:
        assert "CUDA 13.0" in reason and "up to 12.8" in reason and "update the driver" in reason
