"""A tenant with another's ids, in every message that there is, learns nothing: it is told what it is told of ids that
nobody has. And nothing that is secret is written down."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import anyio
import pytest

import lorry
from lorry.client.connection import Connection, open_connection
from lorry.wire import sockets
from lorry.wire.admin_messages import Administer, CreateKey, EndKey, KeyCreated, new_key_id
from lorry.wire.catalogue_messages import (
    AssignProject,
    AuditBetween,
    CheckpointFilter,
    ClientSessionCreated,
    Completions,
    CopyCheckpoint,
    CountClientEvents,
    CreateClientSession,
    DeleteCheckpoint,
    DeleteCheckpoints,
    ExpireCheckpoint,
    FindRuns,
    FinishClientSession,
    GetMetrics,
    JoinSampler,
    LaneState,
    LendCheckpoint,
    MintToken,
    OwnJobs,
    PublishCheckpoint,
    Query,
    QueueState,
    RevokeKey,
    SessionTimeline,
    SetPriority,
    Slot,
    TouchClientSession,
    UsageBetween,
)
from lorry.wire.client_messages import (
    VERSION,
    Cancel,
    CreateRun,
    CreateSampler,
    Drain,
    Failed,
    FromClient,
    Goodbye,
    Hello,
    ImportAdapter,
    Ping,
    Probe,
    Read,
    Refuse,
    SamplerCreated,
    Submit,
    Watch,
)
from lorry.wire.codec import decode, encode
from lorry.wire.errors import ErrorInfo, LorryError
from lorry.wire.ids import ActorId, FutureId, LaneId, ProjectId, RunId, TenantId, future_id
from lorry.wire.metrics import LatestMetrics, LogMetrics, ReadMetrics
from lorry.wire.news import Follow, Unfollow
from lorry.wire.types import LoraConfig, SaveWeightsResponse

from .test_client_door import DATUM, Serving

MALLORY = TenantId("mallory")
ANYTHING: Any = Any
LORA = LoraConfig(rank=4, seed=0)


@dataclass(frozen=True, slots=True)
class Things:
    """What somebody has, by the names that they have on the wire."""

    run: str
    sampler: str
    future: str
    sampled: str
    path: str
    session: str
    key: str
    nonce: str

    def hide(self, text: str) -> str:
        """Without these names, so that two answers can be compared."""
        for name in sorted(map(str, (getattr(self, field) for field in self.__slots__)), key=len, reverse=True):
            text = text.replace(name, "…")
        return text


NOBODYS = Things(
    "run-0000000000000000",
    "sampler-0000000000000000",
    "run-0000000000000000:0",
    "sampler-0000000000000000:0",
    "tinker://run-0000000000000000/weights/kept",
    "session-0000000000000000",
    "tml-nobody",
    "nonce-0",
)

ASKS: dict[type, list[Callable[[int, Things], object]]] = {
    CreateRun: [
        lambda n, of: CreateRun(n, of.nonce, "m", LORA, slot=Slot(of.session, 0)),
        lambda n, of: CreateRun(n, of.nonce, "nobody", LORA),
    ],
    CreateSampler: [
        lambda n, of: CreateSampler(n, of.nonce, model_path=of.path),
        lambda n, of: CreateSampler(n, of.nonce, base_model="m", slot=Slot(of.session, 1)),
    ],
    Submit: [
        lambda n, of: Submit(n, LaneId(of.run), 9, "optim_step"),
        lambda n, of: Submit(n, LaneId(of.run), 0, "forward_backward"),
        lambda n, of: Submit(n, LaneId(of.sampler), 0, "sample"),
    ],
    Refuse: [lambda n, of: Refuse(n, LaneId(of.run), 9, "optim_step", ErrorInfo("LorryError", "no"))],
    Watch: [lambda n, of: Watch([FutureId(of.future)]), lambda n, of: Watch([FutureId(of.sampled)])],
    Read: [lambda n, of: Read(n, [FutureId(of.future), FutureId(of.sampled)])],
    Cancel: [lambda n, of: Cancel(n, FutureId(of.future)), lambda n, of: Cancel(n, FutureId(of.sampled))],
    Query: [
        *(
            lambda n, of, what=what: Query(n, what, of.run)
            for what in ("run", "checkpoints", "lineage", "metric_names", "failures")
        ),
        lambda n, of: Query(n, "sampler", of.sampler),
        *(lambda n, of, what=what: Query(n, what, of.path) for what in ("weights", "files")),
        *(
            lambda n, of, what=what: Query(n, what)
            for what in ("capabilities", "usage", "sessions", "tenant", "projects", "storage_price")
        ),
    ],
    FindRuns: [lambda n, of: FindRuns(n), lambda n, of: FindRuns(n, ProjectId("secret"))],
    AssignProject: [lambda n, of: AssignProject(n, of.session, ProjectId("mine"))],
    SetPriority: [lambda n, of: SetPriority(n, LaneId(of.run), 9), lambda n, of: SetPriority(n, LaneId(of.sampler), 9)],
    TouchClientSession: [lambda n, of: TouchClientSession(n, of.session)],
    FinishClientSession: [lambda n, of: FinishClientSession(n, of.session, "errored")],
    JoinSampler: [lambda n, of: JoinSampler(n, of.sampler)],
    DeleteCheckpoint: [lambda n, of: DeleteCheckpoint(n, of.path)],
    DeleteCheckpoints: [lambda n, of: DeleteCheckpoints(n, CheckpointFilter(run=of.run))],
    PublishCheckpoint: [lambda n, of: PublishCheckpoint(n, of.path, True)],
    LendCheckpoint: [lambda n, of: LendCheckpoint(n, of.path, TenantId("mallory"))],
    ExpireCheckpoint: [lambda n, of: ExpireCheckpoint(n, of.path, 1)],
    CopyCheckpoint: [lambda n, of: CopyCheckpoint(n, of.nonce, of.path, Slot(of.session, 2))],
    RevokeKey: [lambda n, of: RevokeKey(n, of.key)],
    UsageBetween: [lambda n, of: UsageBetween(n, time.time() - 86_400, time.time() + 60)],
    AuditBetween: [lambda n, of: AuditBetween(n, 0.0, 1e12)],
    LaneState: [lambda n, of: LaneState(n, LaneId(of.run), 0.1), lambda n, of: LaneState(n, LaneId(of.sampler), 0.1)],
    QueueState: [lambda n, of: QueueState(n, FutureId(of.future))],
    Completions: [lambda n, of: Completions(n, LaneId(of.run), 0, 9, timeout_s=0.1)],
    SessionTimeline: [lambda n, of: SessionTimeline(n, of.session), lambda n, of: SessionTimeline(n, of.run)],
    LogMetrics: [lambda n, of: LogMetrics(n, RunId(of.run))],
    LatestMetrics: [lambda n, of: LatestMetrics(n, [RunId(of.run)])],
    ReadMetrics: [
        lambda n, of: ReadMetrics(n, RunId(of.run)),
        lambda n, of: ReadMetrics(n, RunId(of.run), at_most_points=4),
    ],
    OwnJobs: [lambda n, of: OwnJobs(n, of.run), lambda n, of: OwnJobs(n, of.sampler)],
    Administer: [lambda n, of: Administer(n, EndKey(of.key))],  # type: ignore[arg-type]
    Drain: [lambda n, of: Drain(n, "", ActorId("scripted"))],
    ImportAdapter: [lambda n, of: ImportAdapter(n, "", TenantId("alice"), RunId(of.run), "m", LORA, "a", 1, "")],
}
NAMES_NOTHING = {
    Hello,
    Probe,
    Ping,
    Goodbye,
    MintToken,
    CreateClientSession,
    CountClientEvents,
    GetMetrics,
    Follow,
    Unfollow,
}


def test_every_message_is_tried_or_names_nothing() -> None:
    assert ASKS.keys() | NAMES_NOTHING == set(get_args(FromClient))
    assert not ASKS.keys() & NAMES_NOTHING


async def outcome(connection: Connection, ask: Callable[[int, Things], object], of: Things) -> str:
    """All that comes of it, without the names that were said."""
    message = ask(connection.next_request(), of)
    try:
        with anyio.fail_after(60):
            if isinstance(message, Submit):
                future = connection.expect(future_id(message.lane, message.seq))
                acknowledged = connection.submit(message, b"", future)
                await acknowledged.wait()
                return of.hide(repr(await future))
            if isinstance(message, Watch):
                return of.hide(repr(await connection.watch(message.futures[0])))
            return of.hide(repr(await connection.ask(message, ANYTHING)))
    except LorryError as error:
        return of.hide(f"{type(error).__name__}: {error}")


async def test_with_anothers_ids_a_tenant_is_told_what_it_is_told_of_ids_that_nobody_has(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        async with (
            lorry.connect(service.address, api_key=service.key) as client,
            open_connection(service.address, service.key) as alice,
            open_connection(service.address, service.store.create_key(MALLORY, 1.0)) as mallory,
        ):
            things = await alices(client, alice, service.key)
            before = await seen(alice, things)
            for kind, asks in ASKS.items():
                for number, ask in enumerate(asks):
                    told = await outcome(mallory, ask, things)
                    assert told == await outcome(mallory, ask, NOBODYS), f"{kind.__name__} {number}"
                    assert await seen(alice, things) == before, f"{kind.__name__} {number} touched something of hers"


async def alices(client: lorry.ServiceClient, alice: Connection, key: str) -> Things:
    training = await client.create_lora_training_client_async("m", rank=4)
    await training.forward_backward([DATUM], "cross_entropy")
    saved: SaveWeightsResponse = await training.save_state("kept")
    session = await alice.ask(CreateClientSession(alice.next_request(), "test"), ClientSessionCreated)
    create = CreateSampler(alice.next_request(), "nonce-of-alices-sampler", base_model="m")
    run, lane = training.model_id, LaneId((await alice.ask(create, SamplerCreated)).sampler)
    sampled = alice.expect(future_id(lane, 0))
    alice.submit(Submit(alice.next_request(), lane, 0, "sample"), b"", sampled)
    await sampled
    return Things(run, lane, f"{run}:0", f"{lane}:0", saved.path, session.session, key, "nonce-of-alice")


async def seen(alice: Connection, things: Things) -> list[str]:
    """What she has, as she sees it."""
    lists = [await alice.ask(Query(alice.next_request(), what), ANYTHING) for what in ("checkpoints", "sessions")]
    lists.append(await alice.ask(FindRuns(alice.next_request()), ANYTHING))
    state = await alice.ask(Query(alice.next_request(), "run", things.run), ANYTHING)
    return [repr(each) for each in (*lists, state)]


async def test_a_wrong_key_ten_thousand_times_keeps_nobody_out_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        async with lorry.connect(service.address, api_key=service.key) as client:
            training = await client.create_lora_training_client_async("m", rank=4)
            tried, told = 0, Counter[str]()

            async def try_wrong_keys(number: int) -> None:
                nonlocal tried
                with sockets.connect(service.address, None, b"mallory-%d" % number) as door:
                    for _ in range(500):
                        door.send([encode(Hello(VERSION, f"tml-wrong-{tried}", "mallory"))])
                        ((answer,),) = await door.receive()
                        told[decode(answer, Failed).error.code] += 1
                        tried += 1

            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(try_wrong_keys, number)
                done = 0
                while tried < 10_000:
                    await training.forward_backward([DATUM], "cross_entropy")
                    done += 1
            assert done >= 10, "who has a right key goes on meanwhile"
            assert set(told) == {"AuthenticationError", "TooManyTriesError"}
            assert told["AuthenticationError"] >= 20 * 20, "each connection has that many tries at once"
        assert service.store.rows("SELECT count(*) AS n FROM sessions")[0]["n"] == 1
        async with lorry.connect(service.address, api_key=service.store.create_key(TenantId("new"), 1.0)):
            pass


async def test_keys_tokens_prompts_and_samples_are_nowhere_in_clear(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of what is kept as bytes, prompts are in the journal's payloads, and samples in its results: nowhere else."""
    async with Serving(tmp_path) as service:
        service.may_work.set()
        admin = service.store.create_key(TenantId("boss"), 1.0, scopes=["admin"])
        async with (
            open_connection(service.address, service.key) as alice,
            open_connection(service.address, admin) as boss,
        ):
            token = await alice.ask(MintToken(alice.next_request()), str)
            order = CreateKey(new_key_id(), TenantId("eve"))
            made = await boss.ask(Administer(boss.next_request(), order), KeyCreated)
            async with open_connection(service.address, token) as by_token:
                await by_token.tell(FindRuns(by_token.next_request()))
            for wrong in (service.key + "x", token + "x", made.api_key[:-1]):
                with pytest.raises(LorryError) as refused:
                    async with open_connection(service.address, wrong):
                        pass
                assert wrong[9:] not in str(refused.value)
        service.store.checkpoint_wal()
        written = all_bytes(tmp_path)
        printed = "".join(capfd.readouterr())
        for secret in (service.key, admin, made.api_key, token):
            assert secret.encode() not in written
            assert secret not in printed
            assert secret[4:24].encode() not in written, "nor the beginning of one"


def all_bytes(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
