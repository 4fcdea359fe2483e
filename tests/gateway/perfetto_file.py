"""Reads a Perfetto file by the official schema, and by the rules of track events: a slice ends where the last that
began on its track does. It shares nothing with what writes them."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent


@dataclass(slots=True)
class Slice:
    """`path` are the names of its tracks, the outermost first; times are in nanoseconds, `dur` None of one that goes on
    still."""

    path: tuple[str, ...]
    name: str
    category: str
    ts: int
    flows: tuple[int, ...]
    args: dict[str, Any]
    dur: int | None = None


@dataclass(slots=True)
class Tracks:
    names: dict[int, str] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)

    def path(self, uuid: int) -> tuple[str, ...]:
        above = self.path(self.parents[uuid]) if uuid in self.parents else ()
        return (*above, self.names[uuid])


def slices(content: bytes) -> list[Slice]:
    trace = Trace.FromString(content)
    tracks, events = Tracks(), defaultdict[int, list[Any]](list)
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id
        if packet.HasField("track_descriptor"):
            described = packet.track_descriptor
            assert described.uuid not in tracks.names
            tracks.names[described.uuid] = described.name
            if described.HasField("parent_uuid"):
                tracks.parents[described.uuid] = described.parent_uuid
        else:
            events[packet.track_event.track_uuid].append(packet)
    found: list[Slice] = []
    for uuid, packets in events.items():
        found += _of_track(tracks.path(uuid), packets)
    return found


def _of_track(path: tuple[str, ...], packets: list[Any]) -> list[Slice]:
    """In the order of their times; of those of one time, as they stand in the file."""
    found: list[Slice] = []
    stack: list[Slice] = []
    for packet in sorted(packets, key=lambda each: each.timestamp):
        event = packet.track_event
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            notes = {note.name: getattr(note, note.WhichOneof("value")) for note in event.debug_annotations}
            (category,) = event.categories
            stack.append(Slice(path, event.name, category, packet.timestamp, tuple(event.flow_ids), notes))
            found.append(stack[-1])
        else:
            assert event.type == TrackEvent.TYPE_SLICE_END
            ended = stack.pop()
            ended.dur = packet.timestamp - ended.ts
    return found
