"""Files of images, as far as Pillow and what stands before it read them."""

import zlib
from io import BytesIO
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorry.actors.images.layout import count_images
from lorry.actors.images.looking import read
from lorry.actors.images.pictures import open_picture, pixels_of
from lorry.actors.images.structure import MAX_SCANS, too_busy
from lorry.actors.model.base_model import wrap_model
from lorry.wire.errors import InvalidRequestError
from lorry.wire.model_input import ImageChunk, ModelInput

from .hostile import Hostile, black, hostile, png_chunk
from .models import tiny_qwen3, tiny_qwen3_vl
from .pictures import chunk, file, picture, wrap_with_eyes

GOOD = [file(picture(16, 24, mode=mode), format) for mode, format in (("RGB", "png"), ("RGB", "jpeg"))]


@pytest.mark.parametrize("one", hostile(), ids=lambda one: one.name)
def test_a_hostile_file_is_refused_by_name_and_the_next_one_is_seen(one: Hostile) -> None:
    base = wrap_with_eyes(tiny_qwen3_vl())
    tokens = ModelInput([ImageChunk(one.data, one.format, one.expected_tokens)])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"prompt\.chunks\[0\]") as refused:
        read("prompt", count_images("prompt", tokens, base.eyes, 256), base.eyes, keep=False)
    assert one.says in str(refused.value)
    assert refused.value.field is not None and refused.value.field.startswith("prompt.chunks[0]")
    assert base.eyes is not None and base.eyes.seen == 0
    assert len(read("prompt", ModelInput([chunk(32, 32)]), base.eyes, keep=False).ids) == 16


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
    with mock.patch.object(Image.Image, "load", side_effect=AssertionError("decoded")):
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


def test_usual_files_are_not_too_busy() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8))
    for options in ({}, {"progressive": True}, {"icc_profile": bytes(200_000)}, {"comment": b"x" * 1000}):
        assert too_busy(file(noise, "jpeg", **options), "jpeg") is None
    assert too_busy(file(noise), "png") is None
    small_chunks = file(noise)
    body = b"".join(zlib_parts(small_chunks))
    in_8_kib = b"".join(png_chunk(b"IDAT", body[at : at + 8192]) for at in range(0, len(body), 8192))
    assert too_busy(small_chunks[:33] + in_8_kib + small_chunks[-12:], "png") is None
    scans = file(noise.resize((64, 64)), "jpeg", progressive=True).count(b"\xff\xda")
    assert 1 < scans < MAX_SCANS / 2


def zlib_parts(png: bytes) -> list[bytes]:
    return [zlib.compress(Image.open(BytesIO(png)).tobytes())]


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
