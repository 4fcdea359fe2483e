from pathlib import Path

import pytest

from lorry.actors.config import ActorSettings
from lorry.config import ModelConfig, ServeConfig
from lorry.placement import placed
from lorry.wire.errors import InvalidRequestError


def settings(*said: str, replicas: int = 1, **options: object) -> dict[str, ActorSettings]:
    models = tuple(ModelConfig(name, f"/models/{name}") for name in ("small", "org/big"))
    actor = ActorSettings(**options)  # pyright: ignore[reportArgumentType]
    config = ServeConfig(models, Path(), replicas=replicas, actor=actor, settings_for=said)
    return {actor.name: actor.settings for actor in placed(config)}


def test_all_actors_have_the_settings_of_all() -> None:
    assert settings(replicas=2, slots=3) == dict.fromkeys(
        ("small#0", "small#1", "org/big#0", "org/big#1"), ActorSettings(slots=3)
    )


def test_what_is_said_of_a_model_holds_for_its_actors_and_what_is_said_of_one_for_that() -> None:
    found = settings(
        "org/big#1:tensor-parallel=2",
        "org/big:tensor-parallel=4",
        "small:compile=true",
        "small:sample-share=0.25",
        replicas=2,
    )
    assert [found[f"org/big#{i}"].tensor_parallel for i in (0, 1)] == [4, 2]
    assert found["small#1"] == ActorSettings(compile=True, sample_share=0.25)


def test_actors_take_the_devices_of_a_range_in_turn() -> None:
    found = settings("org/big:tensor-parallel=3", replicas=2, device="cuda:1-8")
    assert [actor.device for actor in found.values()] == ["cuda:1", "cuda:2", "cuda:3", "cuda:6"]
    found = settings("org/big:device=cuda:4-5", device="cuda")
    assert [actor.device for actor in found.values()] == ["cuda", "cuda:4"]


def test_what_one_is_given_by_name_is_not_taken_out_of_a_range() -> None:
    found = settings("small#0:device=cuda:1", "org/big:tensor-parallel=2", replicas=2, device="cuda:0-5")
    assert [actor.device for actor in found.values()] == ["cuda:1", "cuda:0", "cuda:2", "cuda:4"]
    found = settings("org/big:device=cuda:0-1", device="cuda:0-2")
    assert [actor.device for actor in found.values()] == ["cuda:0", "cuda:1"]


def test_a_range_of_too_few_is_refused_before_anything_starts() -> None:
    with pytest.raises(InvalidRequestError, match=r"device is 'cuda:0-2'.*org/big#1 wants 1 side by side"):
        settings(replicas=2, device="cuda:0-2")


@pytest.mark.parametrize(
    "said", ["big:slots=2", "small:slot=2", "small:slots", "small:slots=", "slots=2", "small#1:slots=2", "small:=2"]
)
def test_a_name_or_an_option_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"for is '.*NAME:OPTION=VALUE, of org/big, org/big#0, small, small#0"
    ):
        settings(said)


@pytest.mark.parametrize("said", ["small:slots=0", "small:slots=many", "small:quantize=int3", "small:compile=perhaps"])
def test_a_value_that_the_option_does_not_take_is_refused(said: str) -> None:
    with pytest.raises(InvalidRequestError, match="another value"):
        settings(said)


def test_two_models_of_one_name_are_refused_before_anything_starts() -> None:
    """Their actors would be taken for one that was started again, and expel each other for ever."""
    models = (ModelConfig("small", "/models/a"), ModelConfig("small", "/models/b"))
    with pytest.raises(InvalidRequestError, match="model is 'small', expected a name for each"):
        placed(ServeConfig(models, Path()))
