"""What `make bench` runs is there, and takes the options that it is given."""

import argparse
import importlib

import pytest

from bench import __main__ as command


class Parsed(Exception):
    pass


@pytest.mark.parametrize("name", command.FULL)
def test_each_benchmark_has_a_main_and_knows_its_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser: argparse.ArgumentParser, options: list[str]) -> argparse.Namespace:
        parse(parser, options)  # which ends the process for one that it does not know
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    with pytest.raises(Parsed):
        importlib.import_module(f"bench.{name}").main(command.BRIEF.get(name, "").split())


def test_what_is_brief_is_part_of_all() -> None:
    assert set(command.BRIEF) <= set(command.FULL)
