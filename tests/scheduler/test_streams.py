"""What was made of samples that are not over: kept within a limit, told to who keeps up, and to who has caught up."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorry
from lorry.client.connection import open_connection
from lorry.scheduler.access.sessions import Session, Sessions
from lorry.scheduler.client_post import ClientPost
from lorry.scheduler.streams import Streams
from lorry.storage.rows import KeyRow
from lorry.wire.client_messages import CommandArguments, CreateRun, RunCreated, Streamed, Submit
from lorry.wire.codec import decode, encode
from lorry.wire.commands import OptimStepInput
from lorry.wire.errors import InvalidRequestError
from lorry.wire.ids import FutureId, KeyHash, KeyId, LaneId, SessionId, TenantId, future_id
from lorry.wire.sequenced import UNCONFIRMED_AT_MOST, Kind, Stamp, stamp_of

from .test_client_door import Serving

A, B = FutureId("sampler-1:0"), FutureId("sampler-1:1")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.booleans()), max_size=40))
def test_no_more_is_kept_than_the_limit_and_what_is_kept_is_whole(steps: list[tuple[str, int, bool]]) -> None:
    streams, made, over = Streams(100), dict[str, list[bytes]](), Counter[str]()
    for name, size, ends in steps:
        future = FutureId(f"{name}:{over[name]}")
        if ends:
            streams.over(future)
            over[name] += 1
            made.pop(future, None)
        else:
            streams.made(future, bytes(size))
            made.setdefault(future, []).append(bytes(size))
        kept = {each: streams.so_far(FutureId(each)) for each in made}
        assert sum(len(b"".join(pieces)) for pieces in kept.values()) <= 100
        assert all(pieces in ([], made[each]) for each, pieces in kept.items())


class Heard:
    """The client's end of a session's link."""

    def __init__(self) -> None:
        self.frames: list[list[bytes]] = []
        sessions = Sessions()
        self.post = ClientPost(self, sessions)  # type: ignore[arg-type]
        self.link = self.post.link(b"c", "session")
        key = KeyRow(KeyHash("h"), KeyId("k"), TenantId("t"), "", frozenset(), 0.0)
        self.session = Session(SessionId("session"), TenantId("t"), key, b"c", 0.0, self.link)
        sessions.open(self.session)

    def send(self, frames: list[bytes]) -> None:
        self.frames.append(list(frames))

    def streamed(self) -> list[tuple[FutureId, bytes]]:
        told: list[tuple[FutureId, bytes]] = []
        for _, _, header, *payloads in self.frames:
            if b"streamed" in header:
                told += zip(decode(header, Streamed).futures, payloads, strict=True)
        self.frames.clear()
        return told

    def has_read_all(self) -> None:
        stamps = [stamp for frames in self.frames if (stamp := stamp_of(frames[1:])) is not None]
        self.link.receive(Stamp(Kind.HAVE, self.link.tag, 0, stamps[-1].number), [])
        self.frames.clear()


def test_who_does_not_keep_up_is_told_nothing_and_then_all_that_there_is() -> None:
    heard, streams = Heard(), Streams()
    streams.made(A, b"a1")
    heard.post.stream(b"c", [(A, b"a1")], streams.so_far)
    assert heard.streamed() == [(A, b"a1")]
    heard.link.send([bytes(UNCONFIRMED_AT_MOST)])
    for pieces in (b"a2", b"a3"):
        streams.made(A, pieces)
        heard.post.stream(b"c", [(A, pieces)], streams.so_far)
    assert [frames for frames in heard.frames if b"streamed" in frames[2]] == []
    heard.has_read_all()
    streams.made(A, b"a4")
    streams.made(B, b"b1")
    heard.post.stream(b"c", [(A, b"a4"), (B, b"b1")], streams.so_far)
    assert heard.streamed() == [(A, b"a1"), (A, b"a2"), (A, b"a3"), (A, b"a4"), (B, b"b1")]
    heard.post.stream(b"c", [(A, b"a5")], streams.so_far)
    assert heard.streamed() == [(A, b"a5")]


def test_what_is_over_is_behind_no_longer() -> None:
    heard, streams = Heard(), Streams()
    heard.link.send([bytes(UNCONFIRMED_AT_MOST)])
    heard.post.stream(b"c", [(A, b"a1")], streams.so_far)
    assert heard.session.behind == {A}
    heard.post.deliver([b"c"], A, None, b"whole")
    assert heard.session.behind == set() and heard.session.unsent == {A: None}


def test_many_pieces_at_once_are_several_messages() -> None:
    heard = Heard()
    heard.post.stream(b"c", [(A, b"x")] * 1200, Streams().so_far)
    assert len(heard.frames) == 3
    assert heard.streamed() == [(A, b"x")] * 1200


async def test_what_is_no_sample_is_not_streamed_and_its_run_goes_on(tmp_path: Path) -> None:
    async with (
        Serving(tmp_path) as service,
        open_connection(service.address, service.key) as connection,
    ):
        service.may_work.set()
        create = CreateRun(connection.next_request(), "n", "m", lorry.LoraConfig(rank=4))
        lane = LaneId((await connection.ask(create, RunCreated)).run)
        step = encode(OptimStepInput(lorry.AdamParams()))
        futures: list[lorry.Future[bytes]] = []
        for seq, arguments in enumerate((CommandArguments(stream=True), CommandArguments())):
            futures.append(connection.expect(future_id(lane, seq)))
            told = Submit(connection.next_request(), lane, seq, "optim_step", arguments=arguments)
            await connection.submit(told, step, futures[-1]).wait()
        with pytest.raises(InvalidRequestError, match=r"arguments.stream is True, expected False: a sample"):
            await futures[0]
        await futures[1]
