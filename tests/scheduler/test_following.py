"""News: each follower is told what is new of its own, once, in order, and nothing where there is nothing; who is slow
is told that it missed some, and costs no memory."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

import lorry
from lorry.client.connection import open_connection
from lorry.client.following import Feed, merged
from lorry.scheduler import broker, client_door, following
from lorry.scheduler.following import Following
from lorry.scheduler.observing.newsroom import DEPLOYMENT, Newsroom
from lorry.storage.store import Store
from lorry.wire import sockets
from lorry.wire.admin_messages import Administer, CreateKey, EndKey, KeyCreated, new_key_id
from lorry.wire.catalogue_messages import Query
from lorry.wire.client_messages import VERSION, Answer, Hello, NewsCame, Ping, Pong, ToClient, Welcome
from lorry.wire.codec import decode, encode
from lorry.wire.errors import AuthenticationError, PermissionDeniedError
from lorry.wire.ids import RunId, TenantId
from lorry.wire.metrics import RunPoint
from lorry.wire.news import BYTES_AT_MOST, POINTS_AT_MOST, Follow, News
from lorry.wire.sequenced import Link
from lorry.wire.types import AdamParams

from .test_client_door import DATUM, Serving
from .test_metrics import a_run

ALICE = TenantId("alice")


def serving(folder: Path, news_s: float = 0.02, *, works: bool = True) -> Serving:
    service = Serving(folder)
    service.config = replace(service.config, news_s=news_s)
    if works:
        service.may_work.set()
    return service


async def until(feed: Feed, *changes: str) -> list[News]:
    """What comes up to the item in which all of these have been named."""
    found: list[News] = []
    async for item in feed:
        found.append(item)
        if {change for each in found for change in each.changed} >= set(changes):
            return found
    raise AssertionError("a feed ends by an error alone")


def test_a_newsroom_keeps_nothing_of_whom_nobody_follows_and_one_point_of_a_step() -> None:
    room, stirred = Newsroom(), list[int]()
    room.on_news = lambda: stirred.append(1)
    room.measured(ALICE, RunPoint(RunId("r"), "loop", 0, 1.0, {}))
    room.changed(ALICE, "runs")
    assert room.due() == [] and stirred == []
    room.follow(ALICE)
    assert room.due() == [ALICE] and stirred == [1]
    for at in range(3):
        room.measured(ALICE, RunPoint(RunId("r"), "loop", 0, float(at), {}))
    room.measured(TenantId("bob"), RunPoint(RunId("b"), "loop", 0, 1.0, {}))
    assert stirred == [1, 1], "who is due already is not stirred again"
    assert [point.at for point in room.take(ALICE).points.values()] == [2.0]
    for step in range(POINTS_AT_MOST + 5):
        room.measured(ALICE, RunPoint(RunId("r"), "loop", step, 1.0, {}))
    taken = room.take(ALICE)
    assert len(taken.points) == POINTS_AT_MOST and taken.missed and not room.take(ALICE).missed


def test_the_deployment_is_told_of_everybodys_changes_and_of_nobodys_numbers() -> None:
    room = Newsroom()
    room.follow(DEPLOYMENT)
    room.measured(ALICE, RunPoint(RunId("r"), "loop", 0, 1.0, {}))
    room.changed(ALICE, "checkpoints")
    room.changed(DEPLOYMENT, "actors")
    taken = room.take(DEPLOYMENT)
    assert taken.points == {} and taken.changed == {"checkpoints", "audit", "actors"}


def test_two_items_are_one_for_who_is_slow_and_too_many_points_are_missed() -> None:
    def item(at: float, steps: range, *changed: str, missed: bool = False) -> News:
        points = [RunPoint(RunId("r"), "loop", step, at, {"x": at}) for step in steps]
        return News(at, points, list(changed), int(at), missed)  # type: ignore[arg-type]

    both = merged(item(1.0, range(3), "runs"), item(2.0, range(2, 4), "jobs"))
    assert [(point.step, point.at) for point in both.points] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]
    assert (both.at, both.changed, both.waiting, both.missed) == (2.0, ["jobs", "runs"], 2, False)
    assert merged(item(1.0, range(1), missed=True), item(2.0, range(1))).missed
    much = merged(item(1.0, range(POINTS_AT_MOST)), item(2.0, range(POINTS_AT_MOST, POINTS_AT_MOST + 1)))
    assert much.missed and much.points == []


async def test_a_follower_sees_each_number_and_change_of_its_own_and_nothing_of_anothers(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        other = service.store.create_key(TenantId("bob"), 1.0)
        async with (
            lorry.connect(service.address, api_key=service.key) as client,
            open_connection(service.address, other) as bob,
            client.follow() as feed,
            bob.follow("own") as bobs,
        ):
            first = await until(feed)
            assert (first[0].points, first[0].waiting, first[0].missed) == ([], 0, False)
            training = await client.create_lora_training_client_async("m", rank=4)
            await until(feed, "runs")
            for step in range(3):
                await training.log_metrics({"reward": float(step)}, step)
                await training.forward_backward([DATUM], "cross_entropy")
                await training.optim_step(AdamParams())
            await training.save_state("kept")
            found = await until(feed, "checkpoints", "jobs")
            assert not any(item.missed or item.overview for item in found)
            latest = {(p.source, p.step): p.values for item in found for p in item.points}
            assert latest == {("loop", step): {"reward": float(step)} for step in range(3)} | {
                ("training", step): {"loss:sum": 1.0, "grad_norm": 0.5} for step in range(3)
            }
            await a_run(bob)
            seen = await until(bobs, "runs")
            assert {point.run for item in seen for point in item.points} == set()
            assert {change for item in seen for change in item.changed} == {"runs"}


async def test_nothing_comes_while_nothing_goes_on(tmp_path: Path) -> None:
    """However short the pause between two would be: there is none to tell of."""
    async with (
        serving(tmp_path, news_s=0.0) as service,
        open_connection(service.address, service.key) as connection,
        connection.follow("own") as feed,
    ):
        assert len(await until(feed)) == 1
        for _ in range(20):
            assert await connection.ask(Query(connection.next_request(), "tenant"), str) == ALICE
        await a_run(connection)
        assert [item.changed for item in await until(feed, "runs")] == [["runs"]]


async def test_readers_of_one_connection_share_what_it_follows_and_the_last_ends_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, open_connection(service.address, service.key) as connection:
        async with connection.follow("own") as first:
            await until(first)
            async with connection.follow("own") as second:
                assert len(await until(second)) == 1, "what the first was told last"
                training = await a_run(connection)
                assert await until(first, "runs") and await until(second, "runs")
            await training.log_metrics({"x": 1.0}, 0)
            item = (await until(first))[0]
            assert [point.values for point in item.points] == [{"x": 1.0}]
        with anyio.CancelScope() as scope:
            async with connection.follow("own") as third:
                async for _ in third:
                    scope.cancel()
        await training.log_metrics({"x": 2.0}, 1)
        async with connection.follow("own") as again:
            assert (await until(again))[0].points == [], "what was while nobody followed is nobody's"


async def test_the_deployment_is_for_administrators_and_seen_while_it_changes(tmp_path: Path) -> None:
    async with serving(tmp_path, works=False) as service:
        boss = service.store.create_key(TenantId("boss"), 1.0, scopes=["admin"])
        async with (
            open_connection(service.address, service.key) as alice,
            open_connection(service.address, boss) as admin,
        ):
            with pytest.raises(PermissionDeniedError, match="expected admin for 'deployment'"):
                async with alice.follow("deployment"):
                    pass
            with pytest.raises(PermissionDeniedError, match="expected read for 'own'"):
                async with admin.follow("own"):
                    pass
            async with admin.follow("deployment") as feed:
                first = (await until(feed))[0]
                assert first.overview is not None and [load.base_model for load in first.overview.actors] == ["m"]
                order = CreateKey(new_key_id(), TenantId("eve"))
                await admin.ask(Administer(admin.next_request(), order), KeyCreated)
                found = await until(feed, "tenants", "keys", "audit")
                assert not any(item.points for item in found)
                training = await a_run(alice)
                seen = await until(feed, "runs")
                future = training.forward_backward([DATUM], "cross_entropy")
                for waiting in (1, 0):
                    while not ((look := seen[-1].overview) and seen[-1].waiting == look.commands == waiting):
                        seen += await until(feed)
                    service.may_work.set()
                await future
                assert not any(item.points for item in seen)


async def test_what_a_revoked_key_followed_ends(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        boss = service.store.create_key(TenantId("boss"), 1.0, scopes=["admin"])
        async with open_connection(service.address, boss) as admin:
            order = CreateKey(new_key_id(), ALICE)
            made = await admin.ask(Administer(admin.next_request(), order), KeyCreated)
            async with open_connection(service.address, made.api_key) as connection, connection.follow("own") as feed:
                await until(feed)
                await admin.tell(Administer(admin.next_request(), EndKey(made.info.key)))
                with pytest.raises(AuthenticationError, match="revoked"):
                    async for _ in feed:
                        pass


async def test_after_a_restart_it_is_followed_again_and_the_first_item_says_that_some_were_missed(
    tmp_path: Path,
) -> None:
    config = replace(serving(tmp_path).config, bind=f"ipc://{tmp_path}/clients", heartbeat_s=0.2)
    lives = [(anyio.Event(), anyio.Event()) for _ in range(2)]

    async def serve() -> None:
        for started, is_over in lives:
            async with broker.running(config):
                started.set()
                await is_over.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve)
        await lives[0][0].wait()
        with closing(Store(tmp_path)) as store:
            key = store.create_key(ALICE, 1.0)
        async with open_connection(config.bind, key) as connection, connection.follow("own") as feed:
            assert not (await until(feed))[0].missed
            lives[0][1].set()
            assert (await until(feed))[0].missed
            await a_run(connection)
            assert not any(item.missed for item in await until(feed, "runs"))
        lives[1][1].set()


async def test_who_does_not_confirm_is_sent_nothing_more_and_then_told_that_it_missed_some(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, open_connection(service.address, service.key) as connection:
        training = await a_run(connection)
        with sockets.connect(service.address, None, b"slow") as door:
            link = Link(door.send)
            door.send([encode(Hello(VERSION, service.key, "slow"))])
            ((welcome,),) = await door.receive()
            link.open(decode(welcome, Welcome).session)
            link.send([encode(Follow(1, "own")), b""])
            sent: list[list[bytes]] = []
            while len(sent) < 2:  # the answer, and what is told at once
                sent += await door.receive()
            async with connection.follow("own") as feed:
                for step in range(10):
                    await training.log_metrics({"x": 1.0}, step)
                    while not any(point.step == step for item in await until(feed) for point in item.points):
                        pass
            link.beat([encode(Ping())])  # says that it has nothing
            while len(sent) < 3:
                sent += await door.receive()
            told = [message for frames in sent for message in link.arrived(frames)]
            assert [type(decode(header, ToClient)) for header, *_ in told] == [Answer, NewsCame, Pong]
            link.confirm()
            (late,) = [message for frames in await door.receive() for message in link.arrived(frames)]
            assert decode(late[1], News).missed


async def test_who_comes_with_another_key_follows_nothing_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Following] = []

    class Kept(Following):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(client_door, "Following", Kept)
    async with serving(tmp_path, works=False) as service:
        other = service.store.create_key(TenantId("bob"), 1.0)
        with sockets.connect(service.address, None, b"both") as door:
            link = Link(door.send)
            door.send([encode(Hello(VERSION, service.key, "both"))])
            ((welcome,),) = await door.receive()
            link.open(decode(welcome, Welcome).session)
            link.send([encode(Follow(1, "own")), b""])
            await door.receive()
            assert [len(following) for following in made] == [1]
            door.send([encode(Hello(VERSION, other, "both"))])
            first = decode(welcome, Welcome).session
            sessions = {first}
            while sessions == {first}:
                for frames in await door.receive():
                    if len(frames) == 1 and isinstance(came := decode(frames[0], ToClient), Welcome):
                        sessions.add(came.session)
            assert [len(following) for following in made] == [0]


def test_what_is_gathered_and_merged_is_bounded_in_bytes() -> None:
    values = {f"{i:0200}": 1.0 for i in range(256)}
    points = [RunPoint(RunId("r"), "loop", step, 1.0, values) for step in range(40)]
    room = Newsroom()
    room.follow(ALICE)
    for point in points:
        room.measured(ALICE, point)
        room.measured(ALICE, point)  # again: it takes no more room
    taken = room.take(ALICE)
    assert taken.missed and len(encode(list(taken.points.values()))) < BYTES_AT_MOST < 60_000 * len(taken.points)
    for point in points[:10]:
        room.measured(ALICE, point)
    assert not room.take(ALICE).missed
    both = merged(News(1.0, points[:15], [], 0), News(2.0, points[15:30], [], 0))
    assert both.missed and both.points == []


async def test_news_that_cannot_be_read_were_missed_and_the_connection_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as service, open_connection(service.address, service.key) as connection:
        training = await a_run(connection)
        async with connection.follow("own") as feed:
            await until(feed)
            monkeypatch.setattr(following, "encode", lambda _: b"\xc1")
            await training.log_metrics({"x": 1.0}, 0)
            assert [(item.missed, item.points) for item in await until(feed)] == [(True, [])]
            monkeypatch.undo()
            await training.log_metrics({"x": 1.0}, 1)
            assert [(item.missed, len(item.points)) for item in await until(feed)] == [(False, 1)]
