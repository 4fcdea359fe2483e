"""A worker whose requests have images: what waits for their pixels, and what does not."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event, current_thread

import pytest
import torch
from PIL import Image

from lorry.actors.images import eyes as eyes_module
from lorry.actors.images.eyes import Eyes, Pixels, Sight
from lorry.actors.images.pictures import Picture, pixels_of
from lorry.actors.orders import Train
from lorry.wire.actor_messages import CancelCommand, Item, MicroBatch
from lorry.wire.codec import encode
from lorry.wire.ids import BatchId, FutureId
from lorry.wire.model_input import ImageChunk, ModelInput

from .hostile import usual
from .models import tiny_qwen3_vl
from .pictures import between, chunk, wrap_with_eyes
from .test_images import data_of
from .test_worker import Desk, started
from .workshop import Workshop


class Lab:
    """Pixels are there once `light` is set; `asked` for are those of so many images, of each by a thread."""

    def __init__(self) -> None:
        self.light, self.asking, self.threads = Event(), Event(), list[str]()

    @property
    def asked(self) -> int:
        return len(self.threads)

    def pixels_of(self, picture: Picture) -> Image.Image:
        self.threads.append(current_thread().name)
        self.asking.set()
        self.light.wait()
        return pixels_of(picture)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab()
    monkeypatch.setattr(eyes_module, "pixels_of", lab.pixels_of)
    yield lab
    lab.light.set()


@pytest.fixture
def desk(tmp_path: Path, lab: Lab, request: pytest.FixtureRequest) -> Iterator[Desk]:
    """Of so many slots, and so many bytes of what was seen."""
    slots, cache_bytes = getattr(request, "param", (8, 2**20))
    workshop = Workshop(tiny_qwen3_vl(), slots, base=partial(wrap_with_eyes, cache_bytes=cache_bytes))
    with started(Desk(tmp_path, workshop=workshop)) as desk:
        yield desk
        lab.light.set()  # before it is told to stop


def image(seed: int = 1) -> ModelInput:
    return between([1, 2], chunk(24, 16, seed), [3])


def train(desk: Desk, future: str, tokens: ModelInput) -> None:
    payload = encode(data_of([tokens], desk.base))
    item = Item(FutureId(future), "forward_backward", desk.state("run"), seq=desk.next_seq("run"))
    desk.worker.orders.put(Train(MicroBatch(BatchId(2), "train", [item], 20), [payload]))


def test_text_is_sampled_while_pixels_are_still_to_come(desk: Desk, lab: Lab) -> None:
    desk.sample("image", None, prompt=image())
    desk.sample("text", None)
    assert desk.until("text") == ["text"]
    lab.light.set()
    outcome = desk.next_outcome()
    assert (outcome.future, outcome.error, outcome.prefill_tokens) == ("image", None, 2 + 1 + 6 + 1 + 1)


def test_one_request_at_a_time_has_its_images_decoded(desk: Desk, lab: Lab) -> None:
    for seed in range(4):
        desk.sample(f"image {seed}", None, prompt=image(seed))
    desk.sample("text", None)
    desk.until("text")
    assert lab.asked == 1
    lab.light.set()
    assert desk.until("image 3") == [f"image {seed}" for seed in range(4)]
    assert lab.asked == 4


def test_a_request_can_be_cancelled_while_its_pixels_are_still_to_come(desk: Desk, lab: Lab) -> None:
    desk.sample("first", None, prompt=image(1))
    desk.sample("second", None, prompt=image(2))
    desk.worker.orders.put(CancelCommand(FutureId("first")))
    outcome = desk.next_outcome()
    assert outcome.future == "first"
    assert outcome.error is not None and outcome.error.code == "CommandCancelledError"
    lab.light.set()
    outcome = desk.next_outcome()
    assert (outcome.future, outcome.error) == ("second", None)


def test_a_broken_image_fails_its_request_alone(desk: Desk, lab: Lab) -> None:
    lab.light.set()
    desk.sample("broken", None, prompt=between([1], ImageChunk(usual()[:-40], "png"), [2]))
    desk.sample("good", None, prompt=image())
    outcomes = {outcome.future: outcome.error for outcome in (desk.next_outcome() for _ in range(2))}
    assert outcomes["good"] is None
    assert (error := outcomes["broken"]) is not None
    assert error.field == "prompt.chunks[2]" and "broken png" in error.message


def test_sequences_get_their_tokens_while_training_waits_for_pixels(desk: Desk, lab: Lab) -> None:
    desk.sample("long", None, new=100)
    train(desk, "trained", image())
    assert desk.until("long") == ["long"]
    lab.light.set()
    outcome = desk.next_outcome()
    assert (outcome.future, outcome.error, outcome.train_tokens) == ("trained", None, 11)


def test_training_that_waits_for_pixels_alone_goes_on_when_they_come(desk: Desk, lab: Lab) -> None:
    train(desk, "trained", image())
    lab.light.set()
    assert desk.next_outcome().error is None


def test_a_request_of_several_images_is_computed_as_a_whole(desk: Desk, lab: Lab) -> None:
    lab.light.set()
    desk.sample("long", None, new=60)
    desk.sample("three", None, prompt=between([1], chunk(8, 8, 1), chunk(16, 8, 2), chunk(8, 8, 1), [5]))
    outcomes = {outcome.future: outcome for outcome in (desk.next_outcome() for _ in range(2))}
    assert outcomes["three"].error is outcomes["long"].error is None
    assert outcomes["three"].prefill_tokens == 1 + 3 * 2 + 1 + 2 + 1 + 1
    assert lab.asked == 2, "an image that was seen is not decoded again"


# What goes wrong, or comes at a bad time ------------------------------------------------------------------------------


@pytest.mark.parametrize("desk", [(1, 2**20)], indirect=True)
def test_who_waits_for_a_slot_joins_when_the_last_sequence_ends(desk: Desk) -> None:
    desk.sample("a", "one")
    desk.sample("b", "two")
    assert desk.until("b") == ["a", "b"]


@pytest.mark.parametrize("new", range(1, 9))
def test_a_request_of_images_goes_on_whenever_the_last_sequence_ends(desk: Desk, lab: Lab, new: int) -> None:
    lab.light.set()
    desk.sample("text", None, new=new)
    desk.sample("images", None, prompt=between([1], *(chunk(8, 8, seed) for seed in range(3)), [5]), new=1)
    ended = {desk.next_outcome().future for _ in range(2)}
    assert ended == {"text", "images"}


def test_a_tower_that_raises_fails_its_request_alone(desk: Desk, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.light.set()
    look = Eyes._look  # pyright: ignore[reportPrivateUsage]

    def ill(self: Eyes, pixels: Pixels) -> Sight:
        if pixels.width == 4:
            raise RuntimeError("a bug")
        return look(self, pixels)

    monkeypatch.setattr(Eyes, "_look", ill)
    desk.sample("long", None, new=40)
    desk.sample("ill", None, prompt=between([1], chunk(16, 8, 1), [5]))
    train(desk, "ill, too", between([1], chunk(16, 8, 1), [5]))
    train(desk, "trained", image())
    desk.sample("good", None, prompt=image())
    outcomes = {outcome.future: outcome.error for outcome in (desk.next_outcome() for _ in range(5))}
    assert outcomes["long"] is outcomes["good"] is outcomes["trained"] is None
    for future in ("ill", "ill, too"):
        error = outcomes[FutureId(future)]
        assert error is not None and error.code == "InternalError" and "a bug" in error.message


def test_a_tower_that_finds_no_memory_fails_its_request_alone(
    desk: Desk, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.light.set()
    look = Eyes._look  # pyright: ignore[reportPrivateUsage]

    def large(self: Eyes, pixels: Pixels) -> Sight:
        if pixels.width == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return look(self, pixels)

    monkeypatch.setattr(Eyes, "_look", large)
    desk.sample("large", None, prompt=between([1], chunk(16, 8, 1), [5]))
    train(desk, "large, too", between([1], chunk(16, 8, 1), [5]))
    train(desk, "trained", image())
    outcomes = {outcome.future: outcome.error for outcome in (desk.next_outcome() for _ in range(3))}
    assert outcomes["trained"] is None
    for future, field in (("large", "prompt"), ("large, too", "data[0].model_input")):
        error = outcomes[FutureId(future)]
        assert error is not None and (error.code, error.field) == ("OutOfMemoryError", field)


@pytest.mark.parametrize("desk", [(8, 0)], indirect=True)
def test_the_compute_thread_decodes_nothing_though_little_is_kept(desk: Desk, lab: Lab) -> None:
    lab.light.set()
    for seed in range(8):
        desk.sample(f"image {seed}", None, prompt=image(seed))
    desk.until("image 7")
    assert lab.asked == 8
    assert {name.partition("_")[0] for name in lab.threads} == {"images"}


def test_what_was_cancelled_is_not_decoded(desk: Desk, lab: Lab) -> None:
    for number in range(5):
        desk.sample(f"cancelled {number}", None, prompt=image(number))
        desk.sample(f"text {number}", None)
        desk.until(f"text {number}")
        desk.worker.orders.put(CancelCommand(FutureId(f"cancelled {number}")))
        assert desk.next_outcome().future == f"cancelled {number}"
    desk.sample("last", None, prompt=image(9))
    lab.light.set()
    assert desk.next_outcome().future == "last"
    assert lab.asked == 2, "the first was under way"


def test_a_sequence_begins_while_training_waits_for_pixels(desk: Desk, lab: Lab) -> None:
    train(desk, "trained", image())
    lab.asking.wait()
    desk.sample("text", None)
    assert desk.until("text") == ["text"]
    lab.light.set()
    assert desk.next_outcome().future == "trained"


def test_training_keeps_its_share_beside_many_images(desk: Desk, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass ends long before all images that came before it have gone through a tower that takes its time."""
    lab.light.set()
    look = Eyes._look  # pyright: ignore[reportPrivateUsage]

    def slow(self: Eyes, pixels: Pixels) -> Sight:
        time.sleep(0.2)
        return look(self, pixels)

    monkeypatch.setattr(Eyes, "_look", slow)
    for seed in range(60):
        desk.sample(f"image {seed}", None, prompt=image(seed), new=1)
    desk.train("trained", rows=1)
    assert "image 59" not in desk.until("trained")
