"""`python -m lorry` is the `lorry` command."""

from lorry.actors.uncollected import uncollected

with uncollected():
    from lorry.cli import app

if __name__ == "__main__":
    app()
