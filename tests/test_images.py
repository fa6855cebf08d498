"""The one decoder, and a geometry that takes bounded memory: every mode, orientation and shape."""

from __future__ import annotations

import io
import os
import random
import tracemalloc

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_images import deep_rgb, encode, noise, oriented, png_of
from PIL import Image
from timm.data import create_transform

from pgn_fast import images
from pgn_fast.images import (
    MAX_ASPECT,
    OversizedImage,
    UnreadableImage,
    bounded,
    read_image,
    readable_suffixes,
)
from pgn_fast.serve.decode import decode_call
from pgn_fast.serve.errors import ApiError
from pgn_fast.serve.preprocess import Preprocessing

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


def pixels(data: bytes, **options) -> np.ndarray:
    image = read_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def gray_png(levels: np.ndarray, **options) -> bytes:
    return encode(Image.fromarray(levels), **options)


# what becomes RGB, and how


@pytest.mark.parametrize("convention", [257, 256], ids=["scaled", "shifted"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind, convention):
    eight = np.arange(256, dtype=np.uint16).reshape(8, 32)
    data = encode(Image.fromarray(eight * np.uint16(convention)), kind)
    assert (pixels(data) == eight[..., None]).all()


def test_every_byte_order_and_width_of_sixteen_bits():
    levels = np.array([[0, 3000, 30000, 65535]])
    expected = [[[v >> 8] * 3 for v in levels[0]]]
    for mode, dtype in (("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")):
        picture = Image.frombytes(mode, (4, 1), levels.astype(dtype).tobytes())
        assert np.asarray(images.upright_rgb(picture)).tolist() == expected, mode
    maxval = b"P5 4 1 65535\n" + levels.astype(">u2").tobytes()
    assert pixels(maxval).tolist() == expected
    rng = random.Random(0)
    assert pixels(deep_rgb(rng)).ndim == 3


@pytest.mark.parametrize("mode, levels", [("I", [[0, 70000]]), ("I", [[-1, 5]]), ("F", [[0, 1]])])
def test_pixels_without_a_known_range_are_refused(mode, levels):
    array = np.array(levels, np.int32 if mode == "I" else np.float32)
    with pytest.raises(UnreadableImage, match="save it with 8 or 16 bits"):
        read_image(encode(Image.fromarray(array), "TIFF"))


HIDDEN = [(0, 0, 0), (0, 0, 255), (9, 200, 9)]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_composed_over_white(kind):
    for hidden in HIDDEN:
        rgba = np.zeros((4, 6, 4), np.uint8)
        rgba[..., :3] = hidden
        rgba[1:3, 1:3] = (210, 40, 40, 255)
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        seen = pixels(encode(Image.fromarray(rgba), kind, **options))
        assert (seen[0, 0] == 255).all() and seen[1, 1].tolist() == [210, 40, 40]


def test_transparent_gray_palettes_and_color_keys():
    rng = random.Random(0)
    two = np.stack([np.full((3, 3), 7), np.zeros((3, 3))], -1).astype(np.uint8)
    assert (pixels(encode(Image.fromarray(two))) == 255).all()
    palette = noise(rng, size=(8, 8)).quantize(4)
    for kind in ("PNG", "GIF"):
        clear = pixels(encode(palette, kind, transparency=0))
        assert (clear[np.asarray(palette) == 0] == 255).all(), kind
        assert not (clear[np.asarray(palette) != 0] == 255).all(), kind
    key = pixels(encode(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)))
    assert (key == 255).all()
    gray = np.array([[5, 6]], np.uint8)
    assert pixels(gray_png(gray, transparency=5))[0, :, 0].tolist() == [255, 6]
    deep = np.array([[600, 6000]], np.uint16)
    assert pixels(gray_png(deep, transparency=600))[0, :, 0].tolist() == [255, 6000 >> 8]
    with_bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert pixels(encode(with_bits))[0, :, 0].tolist() == [0, 255]


def test_premultiplied_alpha():
    for mode, plain in (("La", "LA"), ("RGBa", "RGBA")):
        picture = noise(random.Random(1), plain, (5, 5)).convert(mode)
        expected = np.asarray(images.upright_rgb(picture.convert(plain)))
        assert (np.asarray(images.upright_rgb(picture)) == expected).all()


def test_bands_of_a_large_transparent_picture_join(monkeypatch):
    picture = noise(random.Random(2), "RGBA", (13, 40))
    whole = np.asarray(images.upright_rgb(picture))
    monkeypatch.setattr(images, "_BAND", 50)
    assert (np.asarray(images.upright_rgb(picture)) == whole).all()


def test_cmyk_and_first_frames():
    cmyk = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(pixels(cmyk) - (255, 0, 0)).max() <= 2
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "lime", "blue")]
    kinds = ["GIF", "PNG", "TIFF", "WEBP"]
    if int(PIL.__version__.split(".")[0]) >= 11:  # older ones write an MPO that they cannot read
        kinds.append("MPO")
    for kind in kinds:
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(data) - (255, 0, 0)).max() <= 8, kind


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a viewer turns into ``upright`` by this tag."""
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }.get(orientation, upright)
    return np.ascontiguousarray(stored)


@settings(max_examples=60, deadline=None)
@given(
    orientation=st.integers(0, 9),
    mode=st.sampled_from(["L", "LA", "RGB", "RGBA", "I;16", "1"]),
    kind=st.sampled_from(["PNG", "TIFF"]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_orientation_commutes_with_every_mode(orientation, mode, kind, size):
    rng = random.Random(repr((mode, size)))
    if mode == "I;16":
        levels = np.frombuffer(rng.randbytes(2 * size[0] * size[1]), "<u2").reshape(size[::-1])
    else:
        source = "L" if mode == "1" else mode
        levels = np.asarray(noise(rng, source, size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright, turned = (
        Image.fromarray(a if mode != "1" else (a > 127))
        for a in (levels, stored_as(levels, orientation))
    )
    assert (pixels(encode(turned, kind, exif=exif)) == pixels(encode(upright, kind))).all()


def test_a_damaged_tag_block_leaves_the_picture_as_stored():
    data = encode(noise(random.Random(0), size=(9, 5)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert pixels(data).shape == (5, 9, 3)


# what is refused


def test_damaged_files_are_named_by_their_reason(tmp_path):
    whole = encode(noise(random.Random(0), size=(64, 64)), "JPEG")
    for data in (whole[:300], whole[:-200], b"", b"no picture", whole[:2]):
        with pytest.raises(UnreadableImage) as refusal:
            read_image(data)
        assert "BytesIO" not in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(UnreadableImage, match=r"^no such file"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        read_image(tmp_path / "pipe.png")


def test_postscript_is_never_run():
    with pytest.raises(UnreadableImage, match="no image format"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert not {".eps", ".ps", ".h5", ".mpg"} & readable_suffixes()
    assert {".webp", ".bmp", ".gif", ".tif", ".tiff", ".jpg", ".jp2"} <= readable_suffixes()


@pytest.mark.parametrize(
    "size", [(250_000, 1), (1, 250_000), (1, MAX_ASPECT + 1), (60_000, 60_000), (2**31 - 1, 1)]
)
def test_bombs_are_refused_by_their_header(size):
    data = png_of(*size, 1, 0, bytes(1000))
    tracemalloc.start()
    with pytest.raises(OversizedImage, match=r"declares|exceeds limit"):
        read_image(data)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_memory_that_is_not_there_is_a_reason(monkeypatch):
    def full(image):
        raise MemoryError

    monkeypatch.setattr(images, "upright_rgb", full)
    with pytest.raises(UnreadableImage, match="no memory left"):
        read_image(encode(noise(random.Random(0))))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_flipped_bits_never_raise_anything_else(seed, kind):
    rng = random.Random(seed)
    data = bytearray(encode(noise(rng, size=(24, 24)), kind))
    for _ in range(rng.randint(1, 12)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    try:
        read_image(bytes(data[: rng.randint(len(data) // 2, len(data))]), max_pixels=10**6)
    except UnreadableImage as error:
        assert str(error)


# JPEG at a part of its size


def test_a_jpeg_is_scaled_while_it_is_decoded():
    wave = np.linspace(0, 6, 400)
    levels = (127 + 100 * np.sin(wave[:, None] + wave)).astype(np.uint8)
    data = encode(Image.fromarray(levels).convert("RGB"), "JPEG", quality=95)
    assert read_image(data, at_least=90).size == (100, 100)
    assert read_image(data, at_least=201).size == (400, 400)
    small = np.asarray(read_image(data, at_least=100)).astype(int)
    assert np.abs(small - np.asarray(read_image(data).resize((100, 100)))).mean() < 1.5
    # other formats have no such way
    assert read_image(encode(Image.fromarray(levels)), at_least=50).size == (400, 400)
    # beyond the limit: half the size, up to four times as many pixels
    assert read_image(data, max_pixels=50_000).size == (200, 200)
    with pytest.raises(OversizedImage):
        read_image(data, max_pixels=30_000)
    turned = oriented(random.Random(3))
    assert sorted(read_image(turned, at_least=1).size) <= sorted(read_image(turned).size)


# geometry


GEOMETRIES = [
    {},
    {"crop_pct": 1.0, "interpolation": "bilinear"},
    {"crop_mode": "squash"},
    {"crop_mode": "border", "crop_pct": 1.0},
    {"input_size": (3, 24, 40)},
    {"is_training": True, "no_aug": True},
]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(GEOMETRIES), st.tuples(st.integers(1, 200), st.integers(1, 200)), st.integers()
)
def test_ordinary_pictures_are_timms_to_the_bit(changed, size, seed):
    transform = create_transform(**CONFIG | changed)
    picture = noise(random.Random(seed), size=size)
    if changed.get("crop_mode") == "border" and max(size) > 32 * 2 * min(size):
        return  # timm rounds the shorter side to no pixel, and fails
    assert torch.equal(bounded(transform)(picture), transform(picture))


@pytest.mark.parametrize("changed", [{}, {"crop_pct": 1.0}, {"input_size": (3, 24, 40)}], ids=str)
@pytest.mark.parametrize("size", [(3, 300), (300, 3), (23, 400), (2, 90), (1, 9), (60, 900)])
def test_the_kept_part_equals_the_crop_of_the_whole(monkeypatch, changed, size):
    for interpolation in ("bicubic", "bilinear", "lanczos"):
        transform = create_transform(**CONFIG | changed | {"interpolation": interpolation})
        expected = transform(picture := noise(random.Random(5), size=size))
        monkeypatch.setattr(images, "_WHOLE_RESIZE", 0)
        # a level is 2 / 255 after normalization
        levels = (bounded(transform)(picture) - expected).abs() * 255 / 2
        assert levels.mean() < 0.5, interpolation
        # of noise that shrinks, the order of the axes decides what is clipped
        assert levels.max() < 1.01 or min(size) > 40, interpolation


def test_thin_pictures_take_bounded_memory():
    for changed in GEOMETRIES:
        transform = bounded(create_transform(**CONFIG | {"input_size": (3, 512, 512)} | changed))
        for size in [(30, 30_000), (30_000, 30), (1, 1000), (1000, 1)]:
            before = peak_bytes()
            assert transform(Image.new("RGB", size, (210, 40, 40))).shape[0] == 3
            assert peak_bytes() - before < 150e6, (changed, size)


def peak_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def test_arrays_of_any_strides():
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for view in (levels[::2, ::-1], levels.swapaxes(0, 1), levels[..., ::-1]):
        file = io.BytesIO()
        Image.fromarray(view).save(file, "PNG")
        assert (pixels(file.getvalue()) == view).all()


@pytest.mark.parametrize("size", [(250_000, 1), (1, 62_500), (2_000_000, 12)])
def test_a_server_refuses_thin_pictures_by_their_header(size):
    with pytest.raises(ApiError, match="more than 1000 to 1") as refusal:
        next(decode_call([png_of(*size, 1, 0, b"")], 25_000_000, 100_000_000))
    assert (refusal.value.status, refusal.value.code) == (413, "too_thin")


def test_a_server_without_memory_for_a_resize_asks_to_come_again(monkeypatch):
    preprocessing = Preprocessing(CONFIG)
    monkeypatch.setattr(preprocessing, "_geometry", lambda image: bytearray(2**62))
    with pytest.raises(ApiError) as refusal:
        preprocessing.geometry(Image.new("RGB", (9, 9)))
    assert refusal.value.status == 503
