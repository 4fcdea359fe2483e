"""tinker-cookbook's own renderer of images, against a model that can see: how many tokens it says that an image is, an
actor must say, too, or it refuses it."""

import shutil
from itertools import pairwise
from pathlib import Path

from tests.actors.models import tiny_qwen3_vl
from tests.actors.pictures import file, picture, published_processor
from tests.conftest import BASE_MODEL, start_server

from .test_cookbook import hub_of, run

SEEING = "Qwen/Qwen3-VL-30B-A3B-Instruct"
TOKENS = {(640, 480): 300, (1024, 768): 768, (300, 200): 70, (31, 47): 70, (1000, 30): 94, (257, 513): 128}
"""Of images of these sizes, as Qwen3-VL is published: 32 x 32 pixels each, once they are rounded, and at least 64."""


def test_its_renderers_counts_are_the_actors_and_its_examples_are_learned(tmp_path: Path) -> None:
    folder, images = tmp_path / "model", tmp_path / "images"
    tiny_qwen3_vl(patch_size=16, vocab_size=2048, max_position_embeddings=4096).save_pretrained(folder)
    published_processor().save_pretrained(folder)
    for name in BASE_MODEL.iterdir():
        if name.name.startswith("token") or name.suffix == ".jinja":
            shutil.copy(name, folder)
    images.mkdir()
    for width, height in TOKENS:
        (images / f"{width}x{height}.png").write_bytes(file(picture(width, height, width)))
    server = start_server(tmp_path / "data", "--http", "127.0.0.1:0", model=f"{SEEING}={folder}")
    try:
        seen = run(server, hub_of(SEEING, folder, tmp_path / "hub"), "seen", images)
    finally:
        server.stop()
    assert seen["counts"] == {f"{width}x{height}.png": tokens for (width, height), tokens in TOKENS.items()}
    assert all(after < before for before, after in pairwise(seen["losses"]))
