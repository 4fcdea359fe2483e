"""Whatever a network does between two ends of a link, each reads what the other sent, once and in order."""

from collections.abc import Sequence
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from lorry.wire.client_messages import Ping
from lorry.wire.codec import encode
from lorry.wire.sequenced import (
    ANSWERED_EVERY,
    CONFIRMED_EVERY,
    HELD_AT_MOST,
    HELD_BYTES_AT_MOST,
    UNCONFIRMED_AT_MOST,
    Kind,
    Link,
    Stamp,
    stamp_of,
)

Side = Literal[0, 1]
BEAT = b"beat"


class Network:
    """Two ends, and what is under way between them, which may be taken in any order."""

    def __init__(self) -> None:
        self.under_way: list[tuple[Side, list[bytes]]] = []
        self.links = (Link(self._carry(1), "a", bounds=True), Link(self._carry(0), "a"))
        self.sent: tuple[list[bytes], list[bytes]] = ([], [])
        self.read: tuple[list[bytes], list[bytes]] = ([], [])

    def _carry(self, to: Side):
        def send(frames: Sequence[bytes]) -> None:
            self.under_way.append((to, list(frames)))

        return send

    def send(self, side: Side) -> None:
        content = b"%d" % len(self.sent[side])
        self.sent[side].append(content)
        self.links[side].send([content])

    def arrive(self, to: Side, frames: list[bytes]) -> None:
        stamp = stamp_of(frames)
        assert stamp is not None and self.links[to].is_of(stamp)
        for (content,) in self.links[to].receive(stamp, frames[1:]):
            if content != BEAT:
                self.read[to].append(content)

    def heal(self) -> None:
        """From now on nothing happens to anything; a few heartbeats show and mend what was lost."""
        for _ in range(ANSWERED_EVERY + 1):
            for link in self.links:
                link.beat([BEAT])
            while self.under_way:
                self.arrive(*self.under_way.pop(0))


deeds = st.lists(
    st.tuples(st.sampled_from(["send", "send", "send", "arrive", "repeat", "lose", "beat"]), st.integers(0, 1000)),
    max_size=120,
)


@given(deeds)
def test_what_was_sent_is_read_once_and_in_order(deeds: list[tuple[str, int]]) -> None:
    network = Network()
    for deed, number in deeds:
        side: Side = 1 if number % 2 else 0
        if deed == "send":
            network.send(side)
        elif deed == "beat":
            network.links[side].beat([BEAT])
        elif network.under_way:
            index = number % len(network.under_way)
            if deed != "lose":
                network.arrive(*network.under_way[index])
            if deed != "repeat":
                del network.under_way[index]
        for end in (0, 1):
            assert network.read[end] == network.sent[1 - end][: len(network.read[end])]
    network.heal()
    assert network.read == (network.sent[1], network.sent[0])


def test_what_the_other_end_has_is_kept_no_longer_and_never_sent_again() -> None:
    network = Network()
    for _ in range(3):
        network.send(0)
    network.heal()
    network.arrive(0, [Stamp(Kind.AGAIN, network.links[0].tag, 0, 3).encode()])
    assert network.under_way == []


def test_one_gap_is_asked_for_once_however_many_come_behind_it() -> None:
    network = Network()
    for _ in range(2 * HELD_AT_MOST):
        network.send(0)
    network.under_way.pop(0)
    for to, frames in network.under_way[:]:
        network.arrive(to, frames)
    again = [frames for to, frames in network.under_way if to == 0]
    assert len(again) == 1
    network.heal()
    assert network.read[1] == network.sent[0]


def test_a_message_of_another_link_is_not_taken_for_one_of_this() -> None:
    network = Network()
    network.send(0)
    stamp = stamp_of(network.under_way[0][1])
    assert stamp is not None
    network.links[1].open("b")
    assert not network.links[1].is_of(stamp)
    network.links[1].open(None)
    assert not network.links[1].is_of(stamp)


@given(st.binary(max_size=40))
def test_no_header_is_taken_for_a_stamp(header: bytes) -> None:
    assert stamp_of([encode(Ping()), header]) is None
    found = stamp_of([header])
    assert found is None or header[0] == 0xC1


def test_an_end_that_reads_nothing_has_no_room_and_one_that_reads_says_so_by_itself() -> None:
    network = Network()
    large = bytes(CONFIRMED_EVERY)
    sent = 0
    while network.links[0].has_room:
        network.links[0].send([large])
        sent += 1
    assert sent == UNCONFIRMED_AT_MOST // CONFIRMED_EVERY
    while network.under_way:
        to, frames = network.under_way.pop(0)
        stamp = stamp_of(frames)
        assert stamp is not None
        network.links[to].receive(stamp, frames[1:])
        assert network.links[0].has_room or network.under_way
    assert network.links[0].has_room


def test_what_waits_for_an_earlier_message_is_bounded_in_bytes_and_arrives_all_the_same() -> None:
    network = Network()
    large, count = bytes(HELD_BYTES_AT_MOST // 4), 9
    for _ in range(count):
        network.links[1].send([large])
    missing = network.under_way.pop(0)
    for to, frames in list(network.under_way):
        network.links[to].receive(stamp(frames), frames[1:])
    read = network.links[0].receive(stamp(missing[1]), missing[1][1:])
    assert len(read) == 5, "the one that was missing, and four that took all the room there is"
    network.under_way.clear()
    network.links[1].beat([BEAT])
    while network.under_way:
        to, frames = network.under_way.pop(0)
        read += [due for due in network.links[to].receive(stamp(frames), frames[1:]) if to == 0 and due != [BEAT]]
    assert read == [[large]] * count


def test_who_asks_and_reads_nothing_is_not_listened_to_until_it_has_read() -> None:
    network = Network()
    large = bytes(CONFIRMED_EVERY)
    for _ in range(2 * UNCONFIRMED_AT_MOST // CONFIRMED_EVERY):
        network.links[0].send([large])
    unread, network.under_way = network.under_way, []
    for _ in range(3):
        network.send(1)
    for _ in range(2):
        network.links[1].beat([BEAT])
    while network.under_way:
        network.arrive(*network.under_way.pop(0))
    assert network.read[0] == []
    for to, frames in unread:
        network.links[to].receive(stamp(frames), frames[1:])
    while network.under_way:
        network.arrive(*network.under_way.pop(0))
    assert network.read[0] == network.sent[1], "it is asked for them as soon as there is room, not at a heartbeat"


def test_who_asks_for_the_same_again_and_again_does_not_get_it_each_time() -> None:
    network = Network()
    network.send(0)
    network.under_way.clear()
    for _ in range(10 * ANSWERED_EVERY):
        network.arrive(0, [Stamp(Kind.AGAIN, network.links[0].tag, 0, 0).encode()])
    assert len(network.under_way) == 3 + 10
    network.heal()
    assert network.read[1] == network.sent[0]


def stamp(frames: list[bytes]) -> Stamp:
    found = stamp_of(frames)
    assert found is not None
    return found
