"""A model as one file for other runtimes: ONNX, torch's ``.pt2``, OpenVINO.

The file holds plain operators alone and needs nothing of this package. Its metadata name the
classes and the preprocessing.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .errors import UserError, brief, shown

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
# packages that write the format and that run it for the comparison; the extra has its name
_NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
_IMAGES, _BATCH = 256, 32
# what a file of protobuf's holds, less the graph around the weights
_LARGEST_ONNX = (2 << 30) - (16 << 20)


@dataclass(frozen=True)
class Parity:
    """How the exported file compares with the model's float weights, on random images.

    Attributes:
        error: largest difference of a logit, as a fraction of the largest logit.
        equal_argmax: images whose first class is the same, out of ``images``.
    """

    images: int
    error: float
    equal_argmax: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Whole(nn.Module):
    """Pixels (B, C, H, W) from 0 to 255 to logits, by the adapter's own mean and deviation."""

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.scale: Tensor
        self.shift: Tensor
        scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self.register_buffer("scale", scale)
        self.register_buffer(
            "shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.scale.dtype) * self.scale + self.shift)


class _Plain(nn.Module):
    """The model under one name of its argument, whatever its own is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def check_target(path: str | os.PathLike[str], format: str) -> Path:
    """Refuse what can be known to fail before a model is there; the path.

    Raises:
        UserError: an unknown format, a package that it needs and that is not installed, or a path
            where its file cannot be.
    """
    if not isinstance(format, str) or format not in SUFFIXES:
        raise UserError(f"format={shown(format)}; known: {', '.join(SUFFIXES)}.")
    absent = [p for p in _NEEDS[format] if importlib.util.find_spec(p) is None]
    if absent:
        hint = f"pip install 'pgn_fast[{format}]'"
        raise UserError(f"format={format!r}: {', '.join(absent)} not installed: {hint}.")
    target = Path(path)
    if target.suffix != SUFFIXES[format]:
        raise UserError(
            f"path={shown(str(path))}: a file of format {format!r} ends in {SUFFIXES[format]}."
        )
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}. Make it first.")
    for file in (target, *([target.with_suffix(".bin")] if format == "openvino" else [])):
        if file.is_dir():
            raise UserError(f"{file} is a folder; name a file.")
    try:
        os.rmdir(tempfile.mkdtemp(dir=target.parent, prefix=".export-"))
    except OSError as error:
        raise UserError(
            f"{target}: the folder {target.parent} cannot be written to: {error.strerror}."
        ) from error
    return target


def export(
    model: Any,
    path: str | os.PathLike[str],
    format: str = "onnx",
    *,
    preprocessing_inside: bool = False,
) -> Parity:
    """Write a model as one file and compare the file with the model.

    Args:
        model: a PGN, a VPT, a baseline or a model of a registered method, in float32 on the CPU.
        path: of the file, which ends in ``.onnx``, ``.pt2`` or ``.xml`` and replaces an older one;
            OpenVINO writes a second one with the ending ``.bin`` beside it.
        format: "onnx", "pt2" (``torch.export``) or "openvino".
        preprocessing_inside: the file takes uint8 pixels (B, C, H, W) and normalizes them itself;
            resizing stays outside. Else it takes normalized float32 images.

    Returns:
        The comparison on 256 random images. The file takes any number of images at once.

    Raises:
        UserError: (a ValueError) an unknown format, a package that is not installed, a path where
            no file can be, a model of another kind, dtype or device, with numbers that are not
            finite or of more than the 2 GiB that ONNX holds, a model that the format cannot say, or
            a file that differs from the model by more than a thousandth of the largest logit.
        OSError: the file could not be written; no half of it is left.
    """
    target = check_target(path, format)
    _check_model(model, format)
    pixels = _pixels(model)
    size = model.backbone.in_chans, *model.backbone.patch_embed.img_size
    training = model.training
    model.eval()
    try:
        module: nn.Module = _Plain(model)
        if preprocessing_inside:
            module = _Whole(model, list(pixels["mean"]), list(pixels["std"]))
        images = _random_images(size, preprocessing_inside)
        about = {
            "pgn_fast_version": __version__,
            "class_names": getattr(model, "class_names", None),
            "task": getattr(model, "task", "multiclass"),
            "preprocessing": {**pixels, "inside": preprocessing_inside},
        }
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
            written = Path(folder) / target.name
            try:
                run = _WRITERS[format](module.eval(), images[:2], written, about)
                parity = _compare(module, run, images)
            except (OSError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                # in torch's, ONNX's or OpenVINO's own words, which are pages long
                raise UserError(
                    f"the model cannot be written as {format}: {brief(error, 300)}"
                ) from error
            if not parity.error <= 1e-3:
                raise UserError(
                    f"the {format} file differs from the model by {parity.error:.1e} of the "
                    "largest logit and was not kept; please report the backbone."
                )
            for file in sorted(Path(folder).iterdir(), reverse=True):
                os.replace(file, target.parent / file.name)
    finally:
        model.train(training)
    return parity


def _check_model(model: Any, format: str) -> None:
    """Refuse what no writer takes, in one sentence, before it is traced."""
    if not isinstance(model, nn.Module) or not hasattr(model, "backbone"):
        raise UserError(
            f"model is a {type(model).__name__}; export takes a PGN, a VPT, a baseline or a model "
            "of a registered method."
        )
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in tensors.items():
        plain = tensor.dtype == torch.float32 or not tensor.is_floating_point()
        if tensor.device.type != "cpu" or not plain:
            raise UserError(
                f"model: {name} is {tensor.dtype} on {tensor.device}; export takes float32 on the "
                "CPU: pass model.float().cpu()."
            )
        # quantized weights (torchao) know no such question
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.isfinite().all():
            raise UserError(f"model: {name} has numbers that are not finite.")
    held = sum(tensor.nbytes for tensor in tensors.values())
    if "onnx" in _NEEDS[format] and held > _LARGEST_ONNX:
        raise UserError(
            f"format={format!r}: the model has {held / 2**30:.1f} GiB, an ONNX file holds at most "
            "2 GiB; format='pt2' takes it."
        )


def _pixels(model: Any) -> dict[str, Any]:
    """Preprocessing of the model's images, with a mean and a deviation for each channel."""
    from .adapters import backbone_pixels
    from .adapters.schema import plain_preprocessing

    own = backbone_pixels(model.backbone)
    pixels = plain_preprocessing({**own, **(getattr(model, "preprocessing", None) or {})})
    for name in ("mean", "std"):
        if len(pixels[name]) not in (1, model.backbone.in_chans):
            raise UserError(
                f"model.preprocessing: {name} has {len(pixels[name])} numbers, the backbone has "
                f"{model.backbone.in_chans} channels."
            )
    return pixels


def _random_images(size: tuple[int, ...], pixels: bool) -> Tensor:
    """Noise of several scales: smooth enough that images differ in more than their grain."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(_IMAGES, size[0], 4, 4, generator=generator)
    images = nn.functional.interpolate(coarse, size[1:], mode="bilinear", align_corners=False)
    images = 0.8 * images + 0.2 * torch.rand(images.shape, generator=generator)
    return (images * 255).to(torch.uint8) if pixels else (images - 0.5) * 4


def _compare(module: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> Parity:
    # a model that multiplies in 8 bits does so where gradients are off; the file is float32
    with torch.enable_grad():
        expected = torch.cat([module(part).detach() for part in images.split(_BATCH)])
    # an uneven last batch, for the file's dynamic batch
    with torch.no_grad():
        found = torch.cat([run(part) for part in images.split(_BATCH - 1)])
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    equal = int((expected.argmax(dim=1) == found.argmax(dim=1)).sum())
    return Parity(len(images), float((found - expected).abs().max() / largest), equal)


def _program(module: nn.Module, images: Tensor) -> Any:
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        return torch.export.export(module, (images,), dynamic_shapes={"images": {0: batch}})


def _write_pt2(module: nn.Module, images: Tensor, path: Path, about: dict[str, Any]) -> Any:
    torch.export.save(_program(module, images), path, extra_files={"about": json.dumps(about)})
    return torch.export.load(path).module()


def _write_onnx(module: nn.Module, images: Tensor, path: Path, about: dict[str, Any]) -> Any:
    import onnx
    import onnxruntime

    _write_bare_onnx(module, images, path)
    graph = onnx.load(str(path))
    for name, value in about.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
    onnx.save(graph, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _write_bare_onnx(module: nn.Module, images: Tensor, path: Path) -> None:
    # its optimizer warns of each LayerNorm that it leaves as it is
    optimizer = logging.getLogger("onnxscript.optimizer")
    level = optimizer.level
    optimizer.setLevel(logging.ERROR)
    try:
        torch.onnx.export(
            _program(module, images),
            f=str(path),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    finally:
        optimizer.setLevel(level)


def _write_openvino(module: nn.Module, images: Tensor, path: Path, about: dict[str, Any]) -> Any:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "model.onnx"
        _write_bare_onnx(module, images, bare)
        graph = openvino.convert_model(str(bare))
    for name, value in about.items():
        graph.set_rt_info(
            value if isinstance(value, str) else json.dumps(value), ["pgn_fast", name]
        )
    # float32 as it is: the default would halve the weights' precision
    openvino.save_model(graph, str(path), compress_to_fp16=False)
    compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


_WRITERS: dict[str, Callable[..., Any]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "openvino": _write_openvino,
}
