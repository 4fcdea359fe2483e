"""`python -m lorry` is the `lorry` command."""

from lorry.cli import app

if __name__ == "__main__":
    app()
