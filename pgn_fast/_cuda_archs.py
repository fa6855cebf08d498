"""CUDA architectures by name: what a build is asked for, and which GPUs a built library runs on.

setup.py loads this file by its path before torch is there, so it imports the standard library only.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

OLDEST = (8, 0)  # bfloat16 and m16n8k16 products
DEFAULT = "8.0;9.0"  # where no GPU is seen and nothing is asked for
# names that torch and CMake give to lists of architectures
NAMES = {
    "pascal": "6.0;6.1",
    "volta": "7.0",
    "turing": "7.5",
    "ampere": "8.0;8.6",
    "ada": "8.9",
    "hopper": "9.0",
    "blackwell": "10.0;10.3;12.0;12.1",
    "blackwell+tegra": "11.0",
    "all": "8.0;8.6;8.9;9.0;10.0;12.0+PTX",
    "all-major": "8.0;9.0;10.0;12.0+PTX",
    "common": "8.0;8.6;8.9;9.0;10.0;12.0+PTX",
}
_NUMBER = re.compile(
    r"(?P<prefix>sm_?|compute_?)?(?:(?P<major>\d+)\.(?P<minor>\d)|(?P<number>\d{2,3}))"
    r"(?P<suffix>[af]?)(?P<kind>\+ptx|-real|-virtual)?"
)


class Arch(NamedTuple):
    """One architecture of a CUDA binary."""

    major: int
    minor: int
    suffix: str = ""  # "a": this architecture alone; "f": its family, the later minors of its major
    code: bool = True  # machine code
    ptx: bool = False  # PTX, which the driver compiles for GPUs that the code does not fit

    def __str__(self) -> str:
        """As TORCH_CUDA_ARCH_LIST spells it."""
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    def cmake(self) -> str:
        """As CMAKE_CUDA_ARCHITECTURES spells it."""
        kind = "" if self.code and self.ptx else "-real" if self.code else "-virtual"
        return f"{self.major}{self.minor}{self.suffix}{kind}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability runs it."""
        own = (self.major, self.minor)
        if self.suffix == "a":
            return capability == own
        same_major = capability[0] == self.major and capability >= own
        if self.suffix == "f" or not self.ptx:
            return same_major
        return capability >= own


def parse(text: str) -> tuple[list[Arch], list[str]]:
    """The architectures that a list names, and the words in it that name none.

    Takes what TORCH_CUDA_ARCH_LIST, CMAKE_CUDA_ARCHITECTURES and nvcc take: "8.0;9.0a", "Hopper",
    "10.0+PTX", "80-real", "sm_90a", "12.0f", separated by semicolons, commas or spaces. A number
    without a dot, prefix or kind is CMake's: machine code and PTX.
    """
    found: list[Arch] = []
    unknown: list[str] = []
    for word in re.split(r"[;,\s]+", text.strip()):
        name, ptx = re.fullmatch(r"(.*?)(\+ptx)?", word.lower()).groups()  # type: ignore[union-attr]
        if name in NAMES:
            named, _ = parse(NAMES[name])
            if ptx:
                named[-1] = named[-1]._replace(ptx=True)
            found += named
        elif match := _NUMBER.fullmatch(word.lower()):
            part = match.groupdict()
            number = part["number"] or part["major"] + part["minor"]
            kind, prefix = part["kind"] or "", (part["prefix"] or "").rstrip("_")
            cmake = bool(part["number"]) and not kind and not prefix
            virtual = kind == "-virtual" or prefix == "compute"
            found.append(
                Arch(
                    *(int(number[:-1]), int(number[-1]), part["suffix"]),
                    code=not virtual,
                    ptx=virtual or kind == "+ptx" or cmake,
                )
            )
        elif word:
            unknown.append(word)
    return list(dict.fromkeys(found)), unknown


def visible_gpus() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs of this machine, by nvidia-smi; none where it is missing."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^(\d+)\.(\d)$", done.stdout, flags=re.MULTILINE)
    return sorted({(int(major), int(minor)) for major, minor in found})


def for_build(
    text: str | None,
    *,
    compiler_knows: Iterable[str] | None = None,
    gpus: Callable[[], Sequence[tuple[int, int]]] = visible_gpus,
) -> tuple[list[Arch], list[str]]:
    """The architectures to build for, and a line on each one that was asked for and is not built.

    Args:
        text: TORCH_CUDA_ARCH_LIST; None or "native" takes this machine's GPUs, where it has any.
        compiler_knows: numbers such as "90" that nvcc takes; None takes all.
        gpus: this machine's compute capabilities.
    """
    lines: list[str] = []
    words = [word for word in re.split(r"[;,\s]+", text or "native") if word]
    if any(word.lower() in ("native", "auto") for word in words):
        native = [f"{major}.{minor}" for major, minor in gpus()]
        if text and not native:
            lines.append(f"native: no GPU is visible here, building for {DEFAULT} instead")
        for word in [word for word in words if word.lower() in ("native", "auto")]:
            at = words.index(word)
            words[at : at + 1] = native or [DEFAULT]
    asked, unknown = parse(";".join(words))
    lines += [f"{word}: no CUDA architecture of this name, left out" for word in unknown]
    known = None if compiler_knows is None else set(compiler_knows)
    built: list[Arch] = []
    for arch in asked:
        if (arch.major, arch.minor) < OLDEST:
            lines.append(f"{arch}: the kernels need compute capability 8.0, left out")
        elif known is not None and f"{arch.major}{arch.minor}" not in known:
            lines.append(f"{arch}: this nvcc does not know it, left out")
        elif (arch.major, arch.minor, arch.suffix) == (9, 0, "") and arch.code:
            # the same GPUs, with Hopper's own instructions; its PTX would run nowhere else
            built.append(arch._replace(suffix="a", ptx=False))
            if arch.ptx:
                built.append(arch._replace(code=False))
        else:
            built.append(arch)
    return list(dict.fromkeys(built)), lines


def missing_code(archs: Sequence[Arch], capability: tuple[int, int]) -> str | None:
    """Why a library built for ``archs`` does not run on such a GPU; None where it does."""
    if any(arch.runs_on(capability) for arch in archs):
        return None
    major, minor = capability
    found = f"this device has compute capability {major}.{minor}"
    if capability < OLDEST:
        return f"the CUDA kernels need compute capability 8.0 or later, {found}"
    built = ", ".join(map(str, archs)) or "no architecture"
    wanted = for_build(f"{major}.{minor}")[0][0]
    return (
        f"the CUDA kernels were built for {built}, {found}; rebuild with "
        f"TORCH_CUDA_ARCH_LIST={wanted} pip install --no-build-isolation --no-deps -e ."
    )
