"""A Perfetto trace of what became of commands: when each waited, was executed, and where.

It has a group of tracks for each run, and one for each actor. What overlaps lies on tracks of the same name, which the
viewer shows as one. Times are the journal's, to the microsecond.
"""

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import IO, TYPE_CHECKING, Literal, TypeAlias

from ..wire.timelines import TimedCommand

if TYPE_CHECKING:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TracePacket

Stage: TypeAlias = Literal["queue", "execution", "actor"]
SUFFIX = ".pftrace"
_SEQUENCE = 1
"""All packets are of one writer."""


def nanoseconds(at: float) -> int:
    """Of Unix seconds, by the microsecond: a float holds no more of them."""
    return round(at * 1e6) * 1000


class SessionTrace:
    """Written to `file` as it is told: it holds tracks in memory, and no command."""

    def __init__(self, file: IO[bytes], subject: str) -> None:
        from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

        self._builder = StreamingTraceProtoBuilder(file)
        self._numbers = 0
        self._groups: dict[tuple[str, ...], int] = {}
        self._free: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        """Of each name, its tracks, by when the last slice of each ends."""
        self._root = subject

    def add(self, commands: Iterable[TimedCommand]) -> None:
        for command in commands:
            self._add(command)

    def _add(self, command: TimedCommand) -> None:
        flow = self._next()
        run = f"run {command.run}" if command.run else f"samplers of {command.base_model}"
        group = (self._root, run)
        begin, end = nanoseconds(command.accepted_at), _optional(command.finished_at)
        started = _optional(command.started_at)
        self._slice((*group, "queue"), "queue", command, flow, begin, end if started is None else started)
        if started is None or end is None:
            return
        self._slice((*group, "execution"), "execution", command, flow, started, end)
        if command.actor is not None:
            self._slice(("actors", f"actor {command.actor}"), "actor", command, flow, started, end)

    def _slice(
        self, place: tuple[str, ...], stage: Stage, command: TimedCommand, flow: int, begin: int, end: int | None
    ) -> None:
        """One without an end goes on still."""
        track = self._track(place, begin)
        packet = self._event(track, begin)
        event = packet.track_event
        event.type = event.TYPE_SLICE_BEGIN
        event.name = command.kind
        event.categories.append(stage)
        event.flow_ids.append(flow)
        for name, value in _arguments(command).items():
            note = event.debug_annotations.add(name=name)
            if isinstance(value, int):
                note.int_value = value
            elif isinstance(value, float):
                note.double_value = value
            else:
                note.string_value = value
        self._builder.write_packet(packet)
        if end is not None:
            end = max(begin, end)
            packet = self._event(track, end)
            packet.track_event.type = packet.track_event.TYPE_SLICE_END
            self._builder.write_packet(packet)
            heappush(self._free[place], (end, track))

    def _event(self, track: int, at: int) -> "TracePacket":
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.timestamp = at
        packet.track_event.track_uuid = track
        return packet

    def _track(self, place: tuple[str, ...], begin: int) -> int:
        """One of this name on which nothing happens any more at `begin`."""
        free = self._free.setdefault(place, [])
        if free and free[0][0] <= begin:
            return heappop(free)[1]
        return self._made(place[-1], self._group(place[:-1]))

    def _group(self, place: tuple[str, ...]) -> int:
        if place not in self._groups:
            parent = self._group(place[:-1]) if place[:-1] else None
            self._groups[place] = self._made(place[-1], parent)
        return self._groups[place]

    def _made(self, name: str, parent: int | None) -> int:
        packet, uuid = self._builder.create_packet(), self._next()
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.track_descriptor.uuid = uuid
        packet.track_descriptor.name = name
        if parent is not None:
            packet.track_descriptor.parent_uuid = parent
        self._builder.write_packet(packet)
        return uuid

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers


def _optional(at: float | None) -> int | None:
    return None if at is None else nanoseconds(at)


def _arguments(command: TimedCommand) -> dict[str, int | float | str]:
    """What the viewer shows of a slice."""
    told: dict[str, int | float | str] = {
        "seq": command.seq,
        "request": command.future,
        "model": command.base_model,
        "state": command.state,
        "tokens": sum(command.tokens.values()),
        **{f"tokens.{kind}": count for kind, count in command.tokens.items()},
    }
    if command.attempts > 1:
        told["retries"] = command.attempts - 1
    if command.actor is not None:
        told["actor"] = command.actor
    if command.device_s is not None:
        told["device_s"] = command.device_s
    if command.error is not None:
        told["error"] = command.error
    return told
