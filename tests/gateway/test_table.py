"""docs/compatibility.md speaks of everything that the installed SDK can do, and of nothing that is not tested."""

import inspect
import re
import warnings

import click
import pytest
import tinker
from tinker.cli.__main__ import main_cli

from tests.conftest import ROOT

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient")
ROW = re.compile(r"^\| ([a-z][a-z_ -]*) \| (yes|same|no) \| (.+) \|$")


def rows(section: str) -> dict[str, tuple[str, str]]:
    text = (ROOT / "docs/compatibility.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = (ROW.match(line) for line in text.splitlines())
    return {match[1]: (match[2], match[3]) for match in found if match}


def methods(client: str) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for name, _ in inspect.getmembers(getattr(tinker, client), callable) if name[0] != "_"]
    return {name.removesuffix("_async") for name in names}


def commands(group: click.Group, before: str = "") -> set[str]:
    context, found = click.Context(group), set[str]()
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        found |= commands(command, f"{before}{name} ") if isinstance(command, click.Group) else {before + name}
    return found


@pytest.mark.parametrize("client", CLIENTS)
def test_every_method_of_the_sdk_has_a_row(client: str) -> None:
    assert set(rows(client)) == methods(client)


def test_every_tinker_command_has_a_row() -> None:
    assert set(rows("The `tinker` command")) == commands(main_cli)


def test_every_yes_names_a_test_that_exists() -> None:
    folders = (ROOT / "tests/gateway", ROOT / "tests/cookbook")
    tests = "".join(file.read_text() for folder in folders for file in folder.glob("test_*.py"))
    for section in (*CLIENTS, "The `tinker` command"):
        for name, (works, test) in rows(section).items():
            if works == "yes":
                assert f"def {test.partition(' ')[0]}(" in tests, f"{section}.{name}"
