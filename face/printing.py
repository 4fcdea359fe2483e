"""What commands print is printed as it is: keys, names, paths and errors are data, not rich's markup."""

from rich.console import Console


def plain_console(*, stderr: bool = False) -> Console:
    """Without this, rich swallows `[...]` in a key or a path and makes a picture of the middle of `SESSION:train:0`."""
    return Console(stderr=stderr, emoji=False, markup=False, highlight=False)
