"""The site of the pages builds without a warning, has all that there is to refer to, and fetches nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import lorry
from lorry.cli import app
from tests.test_docs import PAGES, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` does it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
    environment = os.environ | {"LORRY_SOURCE_URL": "https://forge.example/lorry/blob/main/"}
    ended = subprocess.run(
        [*command, "docs", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def test_every_page_is_in_the_site_and_can_be_found(site: Path) -> None:
    index = (site / "index.html").read_text()
    for page in PAGES:
        if page.parent.name == "docs" and page.stem != "index":
            assert (site / f"{page.stem}.html").exists()
            assert f'href="{page.stem}.html"' in index


def test_the_client_commands_and_routes_are_all_there(site: Path) -> None:
    client, commands, routes = ((site / f"{page}.html").read_text() for page in ("client", "commands", "routes"))
    assert [name for name in lorry.__all__ if f'id="lorry.{name}"' not in client] == []
    assert 'id="lorry.TrainingClient.forward_backward"' in client
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    assert [name for name in group.commands if f'id="lorry-{name}"' not in commands] == []
    assert "/api/v1/forward_backward" in routes


def test_a_link_to_a_file_leads_to_the_forge(site: Path) -> None:
    assert 'href="https://forge.example/lorry/blob/main/wire/codec.py"' in (site / "tour.html").read_text()


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', page.read_text())
        assert [one for pair in loaded for one in pair if re.match(r"(https?:)?//", one)] == [], page.name
