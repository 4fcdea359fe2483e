"""What it costs an actor to read an image: files that are made to be dear, and the largest that it takes.

Each goes the way of a request: what its bytes claim is checked, its pixels decoded and laid out as Qwen3-VL's published
image processor has them. No model sees them. Seconds are of one thread; memory is the process's peak above what it had.
Prints a table and a JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.goals import at_most, settle
from lorry.actors.images.eyes import MAX_PIXELS, Eyes
from lorry.wire.errors import InvalidRequestError
from lorry.wire.model_input import ImageChunk
from tests.actors.hostile import black, harmless, hostile, saved
from tests.actors.pictures import published_processor

MOST_SECONDS_REFUSED, MOST_MIB_REFUSED = 0.5, 64
MOST_MIB_TAKEN = 1536
SIDE = int(MAX_PIXELS**0.5)


@dataclass(frozen=True, slots=True)
class Cost:
    name: str
    file_kib: float
    seconds: float
    peak_mib: float
    ends: str


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    eyes = Eyes(cast("Any", None), published_processor())

    def read(image: ImageChunk) -> str:
        try:
            pixels = eyes.ask(eyes.open("image", image)[0])
            return f"{len(pixels.result().patches):,} patches" if pixels else "known"
        except InvalidRequestError as error:
            return str(error).partition(". This")[0][:90]

    read(ImageChunk(black(64, 64), "png"))  # imports
    refused = [cost(one.name, ImageChunk(one.data, one.format, one.expected_tokens), read) for one in hostile()]  # type: ignore[arg-type]
    odd = ((name, ImageChunk(data, format)) for name, (data, format) in harmless().items())  # type: ignore[arg-type]
    taken = [cost(name, image, read) for name, image in (*odd, *largest())]
    table = Table("a file", "KiB", "ms", "peak MiB", "ends as", title="Reading images")
    for each in (*refused, *taken):
        table.add_row(
            each.name, f"{each.file_kib:,.0f}", f"{1000 * each.seconds:,.1f}", f"{each.peak_mib:,.0f}", each.ends
        )
    Console().print(table)
    found = {
        "refused_s": max(each.seconds for each in refused),
        "refused_mib": max(each.peak_mib for each in refused),
        "taken_s": max(each.seconds for each in taken),
        "taken_mib": max(each.peak_mib for each in taken),
    }
    print(json.dumps({"bench": "images"} | found))
    missed = at_most("seconds to refuse a hostile image", found["refused_s"], MOST_SECONDS_REFUSED)
    missed += at_most("MiB to refuse a hostile image", found["refused_mib"], MOST_MIB_REFUSED)
    return missed + at_most("MiB to read the largest image", found["taken_mib"], MOST_MIB_TAKEN)


def largest() -> Iterator[tuple[str, ImageChunk]]:
    """Of as many pixels as are taken."""
    yield f"{SIDE} x {SIDE} in black", ImageChunk(black(SIDE, SIDE), "png")
    small = np.random.default_rng(0).integers(0, 255, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
    noise = Image.fromarray(small).resize((SIDE, SIDE))
    for options in ({}, {"progressive": True}):
        name = f"{SIDE} x {SIDE} of noise, {'progressive' if options else 'plain'} JPEG"
        yield name, ImageChunk(saved(noise, "jpeg", quality=50, **options), "jpeg")


def cost(name: str, image: ImageChunk, read: Callable[[ImageChunk], str]) -> Cost:
    before = reset_peak()
    started = time.perf_counter()
    ends = read(image)
    seconds = time.perf_counter() - started
    return Cost(name, len(image.data) / 1024, seconds, (memory_of_process("VmHWM") - before) / 1024, ends)


def reset_peak() -> int:
    """KiB that the process has now; Linux alone can tell."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_of_process("VmRSS")


def memory_of_process(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    settle(main())
