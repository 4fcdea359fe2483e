"""What a command's error says of the command that it is about, and of those that it is not about."""

import pytest

from lorry.scheduler.telling import told
from lorry.storage.rows import CommandRow
from lorry.wire.client_messages import CommandArguments
from lorry.wire.commands import CommandKind
from lorry.wire.errors import ActorKilledError, ActorLostError, ErrorInfo, InvalidRequestError, LorryError
from lorry.wire.ids import FutureId, LaneId, TenantId


def message(kind: CommandKind, error: LorryError) -> str:
    row = CommandRow(FutureId("run:7"), LaneId("run"), 7, kind, TenantId("t"), "base", 1, 0, CommandArguments())
    return told(row, error.info).message


def test_a_mistake_in_a_part_says_which_part_it_was_and_what_the_others_added() -> None:
    said = message("forward_backward", InvalidRequestError.of("data[0]", 5, "less"))
    assert said.startswith("In request 7 of this run: data[0] is 5")
    assert "stand until the next optim_step" in said


@pytest.mark.parametrize("error", [ActorKilledError("x"), ActorLostError("x")])
def test_whoever_lost_a_run_or_killed_actors_is_not_told_to_send_it_again(error: LorryError) -> None:
    assert "again, not" not in message("forward_backward", error)


@pytest.mark.parametrize("kind", ["optim_step", "save_state", "load_state"])
def test_what_is_never_sent_in_parts_is_told_as_it_is(kind: CommandKind) -> None:
    error = InvalidRequestError.of("name", "a/b", "a name")
    assert message(kind, error) == error.info.message


def test_an_error_is_never_longer_than_a_header() -> None:
    info: ErrorInfo = InvalidRequestError("x" * 100_000).info
    assert len(info.message) < 3000 and info.message.endswith("send it again.")
