"""How Sphinx makes a site of these pages: `make docs`. Nothing is fetched while it builds, and nothing counts readers.

The pages are to be read on a forge, too. So what a forge shows and a site has not is made here, as they are read: links
to files of the repository, and the references of commands and routes.
"""

import os
import re
from importlib.metadata import version as installed

from sphinx.application import Sphinx
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from lorry.cli import app as commands
from lorry.gateway import app as gateway
from lorry.gateway.routes import API

project, author, release = "Lorry", "The Lorry contributors", installed("lorry")
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["grafana"]
html_theme, html_title = "furo", f"Lorry {release}"
html_show_sphinx = html_copy_source = html_show_sourcelink = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]
default_role = "code"
autodoc_member_order, autodoc_typehints, autodoc_class_signature = "bysource", "signature", "mixed"
autodoc_preserve_defaults = True
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!lorry\.).*"), ("py:.*", r"lorry\.(wire|client)\..*")]
"""Types of other libraries, and those of Lorry's own that have no entry: a signature names them."""

SOURCE_URL = os.environ.get("LORRY_SOURCE_URL")
"""Where a forge shows the repository's files, as https://HOST/OWNER/REPOSITORY/blob/main/."""


def with_sources(page: str) -> str:
    """A link to a file of the repository leads to the forge; without one, it is the file's name."""

    def told(link: re.Match[str]) -> str:
        text, path = link[1], link[2]
        return f"[{text}]({SOURCE_URL}{path})" if SOURCE_URL else f"`{path.rstrip('/')}`"

    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)\)", told, page)


def of_commands() -> str:
    command = get_command(commands)
    made = get_docs_for_click(obj=command, ctx=Context(command), name="lorry")
    return made.partition("\n")[2]  # the page has a title


def of_routes() -> str:
    """A route without a docstring has the first sentence of its file's."""
    lines = ["| method | path | what of |", "|---|---|---|"]
    for module in gateway._ROUTERS:
        for route in module.router.routes:
            said = route.endpoint.__doc__ or module.__doc__
            first = " ".join(said.split()).partition(". ")[0].rstrip(".").replace("|", "\\|")
            lines.append(f"| {', '.join(sorted(route.methods - {'HEAD'}))} | `{API}{route.path}` | {first} |")
    return "\n".join(lines)


GENERATED = {"commands": of_commands, "routes": of_routes}
"""What follows the page of this name."""


def read(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = with_sources(source[0])
    if made := GENERATED.get(page):
        source[0] += f"\n{made()}\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", read)
