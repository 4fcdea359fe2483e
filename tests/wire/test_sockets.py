"""What sockets do about peers that are gone, refuse, or come back."""

import anyio
import zmq

from lorry.wire import sockets
from lorry.wire.sockets import Channel


async def test_what_is_sent_while_there_is_no_connection_at_all_is_dropped() -> None:
    """After a handshake that failed ZeroMQ has nowhere to put it, and says so in an error: it ended a client whose
    heartbeat it was. A DEALER that nobody has connected to is in the same state."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.bind("tcp://127.0.0.1:*")
    with Channel(socket) as channel:
        channel.send([b"heartbeat"])


async def test_a_reconnect_is_told_and_the_first_connection_is_not() -> None:
    told = anyio.Event()
    with sockets.bind("tcp://127.0.0.1:*", 2**20) as door:
        address = door.address
        with sockets.connect(address, None, b"patient") as channel:
            channel.on_reconnect = told.set
            channel.send([b"before"])
            assert await door.receive() == [[b"patient", b"before"]]
            assert not told.is_set()
            channel.reconnect()
            await told.wait()
            channel.send([b"after"])
            assert await door.receive() == [[b"patient", b"after"]]
