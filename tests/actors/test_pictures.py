"""Files of images, as far as Pillow and what stands before it read them."""

import zlib
from io import BytesIO
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorry.actors.images.layout import count_images
from lorry.actors.images.pictures import open_picture, pixels_of
from lorry.actors.images.structure import Structure, structure_of
from lorry.actors.model.base_model import wrap_model
from lorry.wire.errors import InvalidRequestError
from lorry.wire.model_input import ImageChunk, ModelInput

from .hostile import Hostile, black, harmless, hostile, png_chunk, usual
from .models import tiny_qwen3, tiny_qwen3_vl
from .pictures import chunk, file, picture, wrap_with_eyes
from .test_images import read_in

GOOD = [file(picture(16, 24, mode=mode), format) for mode, format in (("RGB", "png"), ("RGB", "jpeg"))]


@pytest.mark.parametrize("one", hostile(), ids=lambda one: one.name)
def test_a_hostile_file_is_refused_by_name_and_the_next_one_is_seen(one: Hostile) -> None:
    base = wrap_with_eyes(tiny_qwen3_vl())
    tokens = ModelInput([ImageChunk(one.data, one.format, one.expected_tokens)])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"prompt\.chunks\[0\]") as refused:
        read_in(base, tokens)
    assert one.says in str(refused.value)
    assert refused.value.field is not None and refused.value.field.startswith("prompt.chunks[0]")
    assert base.eyes is not None and base.eyes.seen == 0
    assert len(read_in(base, ModelInput([chunk(32, 32)])).ids) == 16


@pytest.mark.parametrize("name", list(harmless()))
def test_what_nobody_needs_of_a_file_reaches_no_decoder(name: str) -> None:
    data, format = harmless()[name]
    found = open_picture("image", ImageChunk(data, format), 10_000)  # type: ignore[arg-type]
    assert len(found.structure.plain(data)) < 5000
    assert np.array_equal(np.asarray(pixels_of(found)), np.asarray(Image.open(BytesIO(data_of(format))).convert("RGB")))


def data_of(format: str) -> bytes:
    """What the harmless files are made of."""
    return usual() if format == "png" else file(Image.open(BytesIO(usual())), format)


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *((mode, "png") for mode in ("RGB", "RGBA", "LA", "L", "P", "1", "I;16")),
        *((mode, "jpeg") for mode in ("RGB", "L", "CMYK")),
    ],
)
def test_every_kind_of_png_and_jpeg_is_seen_in_colour(mode: str, format: str) -> None:
    image = picture(16, 24, mode=mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257)
    data = file(image, format)
    found = pixels_of(open_picture("image", ImageChunk(data, format), 10_000))  # type: ignore[arg-type]
    assert (found.size, found.mode) == ((16, 24), "RGB")
    expected = Image.open(BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_nothing_of_a_bomb_is_decoded() -> None:
    with mock.patch.object(Image, "open", side_effect=AssertionError("opened")):
        with pytest.raises(InvalidRequestError, match="at most 10,000"):
            open_picture("image", ImageChunk(black(101, 100), "png"), 10_000)
        assert open_picture("image", ImageChunk(black(100, 100), "png"), 10_000).width == 100


def test_an_image_for_a_model_without_eyes_is_refused() -> None:
    base = wrap_model(tiny_qwen3())
    with pytest.raises(InvalidRequestError, match=r"prompt\.chunks\[0\] is an image, and this model is served without"):
        count_images("prompt", ModelInput([chunk(8, 8)]), base.eyes, 256)


def test_a_prompt_is_refused_as_soon_as_its_images_outgrow_the_context() -> None:
    base = wrap_with_eyes(tiny_qwen3_vl())
    tokens = ModelInput([chunk(64, 64, seed) for seed in range(6)])
    with pytest.raises(InvalidRequestError, match=r"prompt has 320 tokens up to chunk 4, expected at most 256"):
        count_images("prompt", tokens, base.eyes, 256)


def structure(data: bytes, format: str) -> Structure:
    return structure_of(data, format)  # type: ignore[arg-type]


def assert_same_pixels(data: bytes, format: str) -> None:
    """What reaches the decoder is decoded to what all of the file is."""
    plain = Image.open(BytesIO(structure(data, format).plain(data))).convert("RGB")
    whole = Image.open(BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(plain), np.asarray(whole))


def noise(width: int = 80, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


EXIF = Image.Exif()
EXIF[0x0112] = 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"icc_profile": bytes(200_000)},
        {"comment": b"x" * 1000, "exif": EXIF},
        {"restart_marker_rows": 1},
        {"subsampling": 0, "optimize": True},
        {"keep_rgb": True},
    ],
)
def test_what_is_left_of_a_usual_jpeg_has_its_pixels(options: dict[str, Any]) -> None:
    data = file(noise(), "jpeg", **options)
    assert_same_pixels(data, "jpeg")
    assert_same_pixels(data + bytes(1000) + data, "jpeg")
    assert len(structure(data, "jpeg").plain(data)) <= min(len(data), 30_000)


def test_what_is_left_of_a_jpeg_in_other_colours_has_its_pixels() -> None:
    for mode in ("L", "CMYK"):
        assert_same_pixels(file(noise().convert(mode), "jpeg"), "jpeg")


def test_what_is_left_of_a_usual_png_has_its_pixels() -> None:
    about = PngInfo()
    about.add_text("author", "x" * 5000, zip=True)
    deep = Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80))
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
        image = deep if mode == "I;16" else noise().convert(mode)
        assert_same_pixels(file(image, "png", pnginfo=about, icc_profile=bytes(2000)), "png")
    assert_same_pixels(file(noise().convert("P"), "png", transparency=3), "png")
    moving = file(noise(), "png", save_all=True, append_images=[picture(80, 60)])
    assert_same_pixels(moving, "png")
    assert b"acTL" in moving and b"acTL" not in structure(moving, "png").plain(moving)


def test_pixels_in_chunks_of_usual_size_are_not_too_many() -> None:
    whole = file(noise(800, 600))
    body = zlib.compress(bytes(1_000_000), 0)
    in_8_kib = b"".join(png_chunk(b"IDAT", body[at : at + 8192]) for at in range(0, len(body), 8192))
    assert structure(whole[:33] + in_8_kib + whole[-12:], "png").width == 800


@given(cut=st.integers(0, 3000), junk=st.binary(max_size=40), good=st.sampled_from(GOOD), at=st.integers(0, 3000))
def test_bytes_of_any_kind_give_an_image_or_a_refusal(cut: int, junk: bytes, good: bytes, at: int) -> None:
    data = good[:at] + junk + good[at : at + cut]
    for format in ("png", "jpeg"):
        try:
            found = pixels_of(open_picture("image", ImageChunk(data, format), 10_000))  # type: ignore[arg-type]
        except InvalidRequestError as refused:
            assert refused.field == "image"
        else:
            assert found.mode == "RGB"
