"""Images, and what a tiny model of the Qwen3-VL family reads of them: 8 x 8 pixels are a token."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lorry.actors.images.eyes import Eyes
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.wire.model_input import Chunk, EncodedTextChunk, ImageChunk, ModelInput

IMAGE, START, END = 90, 92, 93
"""The tokens of `models.with_eyes` that stand for an image's, and for its beginning and end."""


def published_processor() -> Qwen2VLImageProcessorPil:
    """With the numbers that Qwen3-VL is published with."""
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 65_536, "longest_edge": 16_777_216},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )


def wrap_with_eyes(model: PreTrainedModel, **options: Any) -> BaseModel:
    return wrap_model(model, Eyes(model, processor(), **options))


def save_processor(folder: Path) -> None:
    processor().save_pretrained(folder)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Large patches of colour, which JPEG keeps."""
    colours = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def file(image: Image.Image, format: str = "png", **options: Any) -> bytes:
    image.save(written := BytesIO(), format, **options)
    return written.getvalue()


def chunk(width: int, height: int, seed: int = 0, tokens: int | None = None) -> ImageChunk:
    return ImageChunk(file(picture(width, height, seed)), "png", tokens)


def between(*parts: list[int] | ImageChunk) -> ModelInput:
    """Texts and images, these between the tokens of their beginning and end."""
    chunks: list[Chunk] = []
    for part in parts:
        if isinstance(part, ImageChunk):
            chunks += [EncodedTextChunk([START]), part, EncodedTextChunk([END])]
        else:
            chunks.append(EncodedTextChunk(part))
    return ModelInput(chunks)


def as_the_model_takes(tokens: ModelInput, more: list[int] | None = None) -> dict[str, Any]:
    """`tokens`, and `more` of text, as transformers has its users say it: all images through the processor at once."""
    images = [Image.open(BytesIO(image.data)) for image in tokens.images]
    if not images:
        return {"input_ids": torch.tensor([tokens.to_ints() + (more or [])])}
    seen = processor()(images=images, return_tensors="pt")
    counts = iter((seen["image_grid_thw"].prod(-1) // 4).tolist())
    ids = [
        token
        for part in tokens.chunks
        for token in (part.tokens if isinstance(part, EncodedTextChunk) else [IMAGE] * next(counts))
    ]
    input_ids = torch.tensor([ids + (more or [])])
    return {"input_ids": input_ids, "mm_token_type_ids": (input_ids == IMAGE).int(), **seen}
