"""What a simulated user does: runs and samplers, commands of all kinds, mistakes, impatience, and second thoughts."""

import itertools
from dataclasses import dataclass, field

import msgspec

from lorry.wire.catalogue_messages import DeleteCheckpoint
from lorry.wire.client_messages import Cancel, CommandArguments, CreateRun, CreateSampler, Refuse, Submit
from lorry.wire.commands import CommandKind
from lorry.wire.errors import ErrorInfo
from lorry.wire.ids import LaneId, future_id
from lorry.wire.types import LoraConfig

from .client import Client, Request
from .numbers import Flaw, Payload
from .world import MODEL, World

_KINDS: dict[CommandKind, int] = {
    "forward": 2,
    "forward_backward": 8,
    "optim_step": 5,
    "save_state": 3,
    "load_state": 2,
    "save_weights_for_sampler": 3,
}
"""How often each is drawn."""
_REINFORCED: tuple[CommandKind, ...] = ("forward_backward", "optim_step", "save_weights_for_sampler")
_SHED: tuple[tuple[CommandKind, str], ...] = (
    ("save_state", "a"),
    ("save_state", "b"),
    ("save_state", "b"),
    ("load_state", "a"),
)
"""What was loaded is needed for a replay, and nothing but the load leads to it once its name is deleted."""


@dataclass(slots=True)
class Tenant:
    """What a tenant wants, and has asked for so far by whatever connection; `sent` by the requests' numbers."""

    name: str
    key: str
    planned: list[Request] = field(default_factory=list[Request])
    sent: dict[int, Request] = field(default_factory=dict[int, Request])
    lanes: list[str] = field(default_factory=list[str])
    unnamed: list[str] = field(default_factory=list[str])


class Program:
    """Drives one client. Request numbers are never used twice in a history."""

    def __init__(self, world: World, tenant: Tenant, client: Client, numbers: "itertools.count[int]") -> None:
        self._world, self._tenant, self._client, self._numbers = world, tenant, client, numbers
        self._chance = world.chance

    async def train(self) -> None:
        number, seed = next(self._numbers), self._chance.randrange(10**6)
        first = self._chance.choice((0, 0, 1))
        run = await self._client.made_run(
            CreateRun(number, f"nonce-{number}", MODEL, LoraConfig(rank=4, seed=seed), first_seq=first)
        )
        self._tenant.lanes.append(run)
        self._world.note("run", tenant=self._tenant.name, lane=run, seed=seed)
        flavour = self._world.flavour
        if flavour.reinforces:
            await self._reinforce([self._command(run, first + i, _REINFORCED[i % 3]) for i in range(flavour.length)])
            return
        commands = [self._command(run, first + i) for i in range(flavour.length)]
        if flavour.sheds and self._chance.random() < 0.5:
            commands[: len(_SHED)] = [self._command(run, first + i, *drawn) for i, drawn in enumerate(_SHED)]
        await self._send_all(commands)

    async def _reinforce(self, commands: list[Request]) -> None:
        """Weights without a name after each step, sampled from at once, and now and then older ones once more."""
        self._tenant.planned.extend(commands)
        samplers: list[tuple[str, itertools.count[int]]] = []
        for command in commands:
            self.send(command)
            assert isinstance(command.message, Submit | Refuse)
            if not await self._client.succeeded(command) or command.message.kind != "save_weights_for_sampler":
                continue
            path = f"tinker://{command.message.lane}/sampler_weights/_{command.message.seq}"
            if (sampler := await self._made_sampler(path)) is not None:
                samplers.append((sampler, itertools.count()))
            if samplers and self._chance.random() < 0.7:
                self._ask(*samplers[-1])
            await self._world.pause(80.0)
            if samplers and self._chance.random() < 0.7:
                self._ask(*self._chance.choice(samplers[-3:]))

    def _ask(self, sampler: str, seqs: "itertools.count[int]") -> None:
        self.send(self._sample(sampler, next(seqs)))

    async def sample(self) -> None:
        """From the base model, or from whatever weights a run of the tenant has saved by now."""
        path = None
        await self._world.pause(20.0)
        if self._tenant.unnamed and self._chance.random() < 0.5:
            path = self._chance.choice(self._tenant.unnamed)
        elif self._tenant.lanes and self._chance.random() < 0.7:
            path = (
                f"tinker://{self._chance.choice(self._tenant.lanes)}/sampler_weights/{self._chance.choice(('w', 'v'))}"
            )
        if (sampler := await self._made_sampler(path)) is None:
            return
        await self._send_all([self._sample(sampler, seq) for seq in range(3)])
        if self._chance.random() < 0.5:  # once more, when its weights may be gone
            await self._world.pause(120.0)
            await self._send_all([self._sample(sampler, 3)])

    async def _made_sampler(self, path: str | None) -> str | None:
        number = next(self._numbers)
        create = CreateSampler(number, f"nonce-{number}", None if path else MODEL, path)
        self._world.note("asks sampler", tenant=self._tenant.name, request=number, path=path)
        if (sampler := await self._client.made_sampler(create)) is not None:
            self._world.note("sampler", tenant=self._tenant.name, request=number, lane=sampler, path=path)
            self._tenant.lanes.append(sampler)
        return sampler

    def _sample(self, sampler: str, seq: int) -> Request:
        number, told = next(self._numbers), CommandArguments(stream=self._chance.random() < 0.5)
        submit = Submit(number, LaneId(sampler), seq, "sample", 5, 1, told, timeout_s=self._timeout_s())
        return Request(submit, Payload(f"u{submit.request}", 4).packed())

    async def intrude(self, others: list[Tenant]) -> None:
        """On what is another tenant's, whose names it has got hold of."""
        while True:
            await self._world.pause(10.0)
            lanes = [lane for other in others for lane in other.lanes if other is not self._tenant]
            if not lanes:
                continue
            lane = LaneId(self._chance.choice(lanes))
            seq, number = self._chance.randrange(self._world.flavour.length + 2), next(self._numbers)
            self._world.note("intrudes", tenant=self._tenant.name, request=number, lane=lane)
            if self._chance.random() < 0.5:
                self._client.ask(Request(Cancel(number, future_id(lane, seq))))
            else:
                self._client.watch(future_id(lane, seq))
                self._client.ask(Request(Submit(number, lane, seq, "optim_step"), Payload(f"u{number}", 1).packed()))

    def _command(self, run: str, seq: int, kind: CommandKind | None = None, saved: str | None = None) -> Request:
        """`kind` and the name of what it saves or loads are drawn where they are not given."""
        chance = self._chance
        if kind is None:
            kind = chance.choices(list(_KINDS), list(_KINDS.values()))[0]
        number, lane = next(self._numbers), LaneId(run)
        if chance.random() < 0.04:
            return Request(Refuse(number, lane, seq, kind, ErrorInfo("OutOfMemoryError", "too large")))
        arguments, payload = CommandArguments(), b""
        if kind == "save_state":
            arguments = CommandArguments(name=saved or chance.choice(("a", "b", "a", "b", "../no")))
        elif kind == "save_weights_for_sampler":
            name = None if self._world.flavour.reinforces else chance.choice(("w", "v", None, None))
            arguments = CommandArguments(name=name, unnamed=name is None)
            if name is None:
                self._tenant.unnamed.append(f"tinker://{run}/sampler_weights/_{seq}")
        elif kind == "load_state":
            arguments = CommandArguments(
                path=f"tinker://{run}/weights/{saved or chance.choice(('a', 'b'))}", optimizer=True
            )
        else:
            payload = self._payload(number, kind).packed()
        submit = Submit(number, lane, seq, kind, chance.choice((1, 5, 20)), 0, arguments, timeout_s=self._timeout_s())
        return Request(submit, payload, chance.random() < 0.03)

    def _timeout_s(self) -> float | None:
        return self._chance.choice((0.01, 1.0, 10.0)) if self._chance.random() < 0.05 else None

    def _payload(self, number: int, kind: CommandKind) -> Payload:
        flaw: Flaw = ""
        if self._chance.random() < 0.1:
            flaw = "nan" if kind == "optim_step" else "bad"
        if self._world.flavour.deaths == "poison" and kind == "forward_backward" and self._chance.random() < 0.1:
            flaw = "poison"
        return Payload(f"u{number}", self._chance.randrange(1, 9), flaw)

    async def _send_all(self, commands: list[Request]) -> None:
        chance, flavour = self._chance, self._world.flavour
        self._tenant.planned.extend(commands)
        window = chance.choice((1, 1, 4, len(commands)))
        for start in range(0, len(commands), window):
            part = commands[start : start + window]
            chance.shuffle(part)
            for request in part:
                self.send(request)
                if chance.random() < 0.5:
                    await self._world.pause(2 * flavour.slowness_s)
                await self._misbehave(request)
            if chance.random() < 0.3:
                await part[-1].answered.wait()
            if chance.random() < 0.1:
                await self._world.pause(30.0)

    def send(self, request: Request) -> None:
        message = request.message
        assert isinstance(message, Submit | Refuse)
        self._tenant.sent[message.request] = request
        refusal = (
            "InvalidRequestError" if request.garbled else message.error.code if isinstance(message, Refuse) else None
        )
        arguments = message.arguments if isinstance(message, Submit) else CommandArguments()
        self._world.note(
            "sent",
            tenant=self._tenant.name,
            request=message.request,
            lane=message.lane,
            seq=message.seq,
            kind=message.kind,
            name=arguments.name,
            path=arguments.path,
            payload=request.payload,
            refusal=refusal,
            timeout_s=message.timeout_s if isinstance(message, Submit) else None,
        )
        self._client.ask(request)

    async def _misbehave(self, request: Request) -> None:
        """The same again; another under its number; it is not wanted any more, or what was saved is not."""
        chance, message = self._chance, request.message
        assert isinstance(message, Submit | Refuse)
        if chance.random() < 0.05:
            again = msgspec.structs.replace(message, request=next(self._numbers))
            self.send(Request(again, request.payload, request.garbled))
        if chance.random() < 0.04:
            payload = Payload(f"u{next(self._numbers)}", 2).packed()
            self.send(Request(Submit(next(self._numbers), message.lane, message.seq, "forward_backward", 1), payload))
        if chance.random() < 0.04:
            self._client.cancel(next(self._numbers), future_id(message.lane, message.seq))
        if chance.random() < 0.04:
            self._delete(f"tinker://{message.lane}/weights/{chance.choice(('a', 'b'))}")
        if self._world.flavour.sheds and isinstance(message, Submit) and message.kind == "load_state":
            await request.answered.wait()
            await self._world.pause(2.0)
            self._delete(message.arguments.path or "")

    def _delete(self, path: str) -> None:
        number = next(self._numbers)
        self._world.note("deletes", tenant=self._tenant.name, path=path)
        self._client.ask(Request(DeleteCheckpoint(number, path)))
