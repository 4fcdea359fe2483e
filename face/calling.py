"""How a subcommand does its work: what the user can act on becomes one line and an exit status."""

import sys
from collections.abc import Awaitable, Callable

import anyio
from rich.text import Text

from lorry.printing import plain_console
from lorry.wire.errors import LorryError


def run_async(work: Callable[[], Awaitable[None]], *, uvloop: bool = False) -> None:
    async def awaited() -> None:
        await work()

    call(lambda: anyio.run(awaited, backend_options={"use_uvloop": uvloop}))


def call(work: Callable[[], None]) -> None:
    """Errors that the user can act on become one line and an exit status; anything else is a traceback."""
    from lorry.serve import CONFIGURATION_EXIT

    try:
        work()
    except KeyboardInterrupt:
        sys.exit(130)
    except (LorryError, BaseExceptionGroup) as error:
        leaf: BaseException = error
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        if not isinstance(leaf, LorryError):
            raise
        plain_console(stderr=True).print(Text.assemble(("lorry:", "red"), f" {leaf}"), soft_wrap=True)
        sys.exit(CONFIGURATION_EXIT if leaf.category == "user" else 1)
