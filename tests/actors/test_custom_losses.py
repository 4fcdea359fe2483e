"""Users' losses: they come to what the Tinker SDK makes of them, and nothing else comes of them."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types
from tinker.lib.public_interfaces.custom_loss import encode_graph, run_loss_handle, trace_loss

from lorry.actors.adapters.shares import PartResult, merged
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.custom_losses import ELEMENTS_AT_MOST, check_shapes, evaluate_custom
from lorry.wire.codec import decode, encode
from lorry.wire.commands import ForwardBackwardInput
from lorry.wire.custom_loss import FUNCTIONS, METHODS, CustomLoss, LossInput, LossNode, check_custom_loss
from lorry.wire.errors import InvalidRequestError, NonFiniteError
from lorry.wire.types import Datum, ForwardBackwardOutput, TensorData

from .models import tiny_qwen3
from .workshop import Workshop, assert_close, job, request, succeeded

Loss = Callable[..., Any]


def uploaded(loss: Loss, **ranks: int) -> CustomLoss:
    """As the SDK sends it, over JSON."""
    handle = trace_loss(loss, ranks, "session")  # type: ignore[arg-type]
    nodes = [node.model_dump() for node in encode_graph(handle).nodes]
    told = {"name": handle.name, "inputs": [each.model_dump() for each in handle.inputs], "nodes": nodes}
    converted = msgspec.convert(json.loads(json.dumps(told)), CustomLoss)
    check_custom_loss(converted)
    return decode(encode(converted), CustomLoss)


def likelihood(logprobs: Any, weights: Any) -> Any:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss, "custom/tokens:mean": weights.sum()}


def clipped(logprobs: Any, sampled: Any, advantages: Any) -> Any:
    ratio = torch.exp(logprobs - sampled)
    bounded = torch.clamp(ratio, 0.8, 1.2)
    kl = (ratio - 1 - torch.log(ratio)).mean()
    loss = -torch.minimum(ratio * advantages, bounded * advantages).sum() + 0.01 * kl
    return loss, {"custom/kl:mean": kl, "custom/clipped:mean": (ratio != bounded).float().mean()}


def windows(logprobs: Any, weights: Any) -> Any:
    """Slices, shapes, several tensors, numbers of Python's."""
    n = logprobs.shape[0]
    head, tail = logprobs[: n // 2], logprobs[n // 2 :]
    both = torch.cat([head.cumsum(0), torch.nn.functional.softplus(tail)])
    masked = torch.where(weights > 0.5, both, torch.zeros_like(both))
    scaled = masked.masked_fill(torch.isnan(masked), 0.0) / float("inf") + masked / n
    return scaled.square().mean() ** 0.5, {"custom/top:sum": masked.amax(), "custom/n:sum": both[..., -1]}


def of_several(logprobs: Any, scale: Any) -> Any:
    """[T, K] and a scalar."""
    best = torch.logsumexp(logprobs, dim=-1)
    return -(best * scale).sum(), {"custom/best:mean": best.max()}


def pairs(logprobs: Any) -> Any:
    gaps = logprobs.unsqueeze(0) - logprobs.unsqueeze(1)
    return torch.nn.functional.logsigmoid(gaps).mean().neg(), {}


CASES: list[tuple[Loss, dict[str, int], dict[str, tuple[int, ...]]]] = [
    (likelihood, {"logprobs": 1, "weights": 1}, {"weights": (7,)}),
    (clipped, {"logprobs": 1, "sampled": 1, "advantages": 1}, {"sampled": (7,), "advantages": (7,)}),
    (windows, {"logprobs": 1, "weights": 1}, {"weights": (7,)}),
    (of_several, {"logprobs": 2, "scale": 0}, {"scale": ()}),
    (pairs, {"logprobs": 1}, {}),
]


@pytest.mark.parametrize(("loss", "ranks", "shapes"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_loss_comes_to_what_the_sdk_makes_of_it_in_the_client(
    loss: Loss, ranks: dict[str, int], shapes: dict[str, tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(3)
    logprobs = -torch.rand((7, 3) if ranks["logprobs"] == 2 else (7,), generator=generator) * 3
    inputs = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    custom = uploaded(loss, **ranks)
    check_shapes("data[0]", custom, [tuple(logprobs.shape), *shapes.values()], [torch.float32] * (1 + len(shapes)))
    found = evaluate_custom("data[0]", custom, logprobs, list(inputs.values()))

    leaf = logprobs.clone().requires_grad_()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1]),
        loss_fn_inputs={name: types.TensorData.from_torch(each) for name, each in inputs.items()},
    )
    handle = trace_loss(loss, ranks, "session")  # type: ignore[arg-type]
    expected, metrics = run_loss_handle(handle, [datum], [leaf])
    (grad,) = torch.autograd.grad(expected, leaf)
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(found.grad, grad)
    assert found.metrics == pytest.approx(metrics)


def test_its_gradient_is_that_of_its_built_in_twin_beside_jobs_of_other_losses() -> None:
    def twin(logprobs: Any, weights: Any) -> Any:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/nll:sum": loss, "custom/share:mean": weights.mean()}

    shop = Workshop(tiny_qwen3())
    for key in ("built-in", "custom", "other"):
        shop.add(key, AdapterSpec(rank=4, seed=1))
    data = request(1, candidates=2).data
    custom = ForwardBackwardInput(data, "custom", custom=uploaded(twin, logprobs=2, weights=2))
    jobs = [
        job("built-in", ForwardBackwardInput(data, "cross_entropy")),
        job("custom", custom),
        job("other", request(2, loss_fn="gspo")),
    ]
    built_in, mine, other = (succeeded(outcome) for outcome in shop.engine.forward_backward(jobs))
    assert_close(shop.pool.get("custom").grad, shop.pool.get("built-in").grad)
    assert mine.metrics["loss:sum"] == pytest.approx(built_in.metrics["loss:sum"], rel=1e-5)
    assert mine.metrics["custom/nll:sum"] == pytest.approx(mine.metrics["loss:sum"], rel=1e-5)
    weights = [datum.loss_fn_inputs["weights"].to_numpy().mean() for datum in data]
    assert mine.metrics["custom/share:mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    assert set(other.metrics) == {"loss:sum"}


def test_one_that_fails_fails_alone() -> None:
    def logarithm(logprobs: Any) -> Any:
        return torch.log(logprobs).sum(), {}

    def unbounded(logprobs: Any) -> Any:
        return logprobs.sum(), {"custom/x:sum": logprobs.sum() / 0.0}

    def misshapen(logprobs: Any, weights: Any) -> Any:
        return (logprobs * weights[:3]).sum(), {}

    shop = Workshop(tiny_qwen3())
    for key in "abcd":
        shop.add(key, AdapterSpec(rank=4, seed=1))
    data = request(1).data
    losses = [uploaded(logarithm, logprobs=1), uploaded(unbounded, logprobs=1)]
    jobs = [job(key, ForwardBackwardInput(data, "custom", custom=loss)) for key, loss in zip("ab", losses, strict=True)]
    jobs.append(job("c", ForwardBackwardInput(data, "custom", custom=uploaded(misshapen, logprobs=1, weights=1))))
    jobs.append(job("d", request(2)))
    not_finite, metric, shape, good = shop.engine.forward_backward(jobs)
    assert isinstance(not_finite, NonFiniteError) and "has a loss of nan" in str(not_finite)
    assert isinstance(metric, NonFiniteError) and "has a metric custom/x:sum of -inf" in str(metric)
    assert isinstance(shape, InvalidRequestError) and "operator.mul of node mul" in str(shape)
    succeeded(good)
    assert [bool(shop.pool.get(key).grad.any()) for key in "abcd"] == [False, False, False, True]


def test_more_than_fits_is_refused_before_it_is_computed() -> None:
    custom = uploaded(pairs, logprobs=1)
    with pytest.raises(InvalidRequestError, match=f"at most results of {ELEMENTS_AT_MOST:,} elements in all"):
        check_shapes("data[0]", custom, [(1 << 15,)], [torch.float32])

    def grows(logprobs: Any) -> Any:
        return logprobs.expand(1 << 40, logprobs.shape[0]).sum(), {}

    with pytest.raises(InvalidRequestError, match="elements"):
        check_shapes("data[0]", uploaded(grows, logprobs=1), [(4,)], [torch.float32])


def graph(*nodes: tuple[str, str, list[Any]], **kwargs: Any) -> CustomLoss:
    """Of logprobs, and one node after the other; the last is the loss."""
    made = [LossNode("placeholder", "logprobs", "logprobs")]
    made += [LossNode(op, f"n{i}", target, args, kwargs) for i, (op, target, args) in enumerate(nodes)]  # type: ignore[arg-type]
    output = {"tuple": [{"ref": made[-1].name}, {"dict": {}}]}
    return CustomLoss("hostile", [LossInput("logprobs", 1)], [*made, LossNode("output", "output", "output", [output])])


X = {"ref": "logprobs"}
REFUSED: list[tuple[CustomLoss, str]] = [
    (graph(("call_function", "os.system", ["true"])), "os.system"),
    (graph(("call_function", "torch.load", ["/etc/passwd"])), "torch.load"),
    (graph(("call_function", "torch.ops.load_library", ["x"])), "torch.ops.load_library"),
    (graph(("call_function", "getattr", [X, "__class__"])), "__class__"),
    (graph(("call_function", "builtins.eval", ["1"])), "builtins.eval"),
    (graph(("call_method", "backward", [X])), "backward"),
    (graph(("call_method", "item", [X])), "item"),
    (graph(("call_method", "add_", [X, 1])), "add_"),
    (graph(("call_method", "numpy", [X])), "numpy"),
    (graph(("call_method", "register_hook", [X, X])), "register_hook"),
    (graph(("call_function", "torch.rand_like", [X])), "torch.rand_like"),
    (graph(("call_function", "torch.matmul", [X, X])), "torch.matmul"),
    (graph(("call_function", "torch.exp", [{"ref": "later"}])), "later"),
    (graph(("call_function", "torch.exp", [{"eval": "1"}])), "eval"),
    (graph(("call_function", "torch.exp", [{"device": "cuda"}])), "device"),
    (graph(("call_function", "torch.exp", [[[[[[[[1]]]]]]]])), "lists in each other"),
    (graph(*[("call_function", "torch.exp", [X])] * 400), "graph.nodes"),
]


@pytest.mark.parametrize(("loss", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_is_not_on_the_list_is_refused_by_name(loss: CustomLoss, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named.replace(".", r"\.").replace("[", r"\[")):
        check_custom_loss(loss)


@pytest.mark.parametrize(
    "loss",
    [
        graph(("call_function", "operator.pow", [10, 10**6])),
        graph(("call_function", "operator.mul", ["x", 10**9])),
        graph(("call_function", "operator.mul", [[1], 10**9])),
        graph(("call_function", "operator.mod", ["%1000000000d", 5])),
        graph(("call_function", "operator.getitem", [X, X])),
        graph(("call_function", "torch.where", [X])),
        graph(("call_method", "to", [X, "cuda"])),
        graph(("call_method", "exp", [3])),
        graph(("call_function", "torch.exp", [X]), out=X),
        graph(("call_function", "math.exp", [X])),
        graph(("call_function", "operator.not_", [X])),
        graph(("call_function", "torch.sum", [X, 5])),
        graph(("call_function", "torch.exp", [X])),
        graph(("call_function", "operator.add", [1, 2])),
    ],
    ids=range(14),
)
def test_what_operations_cannot_do_with_their_arguments_is_told(loss: CustomLoss) -> None:
    check_custom_loss(loss)
    with pytest.raises(InvalidRequestError, match=r"data\[0\]"):
        check_shapes("data[0]", loss, [(5,)], [torch.float32])


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(-2, 2), st.sampled_from(["a", "sum", "mean"]),
    st.sampled_from([{"float": "inf"}, {"dtype": "int64"}, {"ellipsis": True}, {"slice": [0, None, 2]}]),
    st.integers(0, 20).map(lambda i: {"ref": f"#{i}"}),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(lambda v: {"tuple": v}),
        st.dictionaries(st.sampled_from(["dim", "a"]), inner, max_size=2).map(lambda v: {"dict": v}),
    ),
    max_leaves=4,
)
names = ("dim", "keepdim", "min", "max", "alpha", "dtype", "out", "unbiased", "correction", "rounding_mode", "other")
node = st.tuples(
    st.one_of(
        st.tuples(st.just("call_function"), st.sampled_from(sorted(FUNCTIONS))),
        st.tuples(st.just("call_method"), st.sampled_from(sorted(METHODS))),
    ),
    st.lists(values, max_size=4),
    st.dictionaries(st.sampled_from(names), values, max_size=2),
)


def pointed(value: Any, before: list[str]) -> Any:
    """`#i` is one of the nodes before."""
    match value:
        case {"ref": name}:
            return {"ref": before[int(name[1:]) % len(before)]}
        case {"tuple": inner} | list(inner):
            found = [pointed(each, before) for each in inner]
            return {"tuple": found} if isinstance(value, dict) else found
        case {"dict": inner}:
            return {"dict": {key: pointed(each, before) for key, each in inner.items()}}
        case _:
            return value


@settings(max_examples=200)
@given(st.lists(node, min_size=1, max_size=8))
def test_no_graph_of_allowed_operations_raises_what_is_no_mistake_in_it(drawn: list[Any]) -> None:
    before, nodes = ["logprobs"], [LossNode("placeholder", "logprobs", "logprobs")]
    for i, ((op, target), args, kwargs) in enumerate(drawn):
        told = [{"ref": before[i % len(before)]}, *(pointed(each, before) for each in args)]
        nodes.append(LossNode(op, f"n{i}", target, told, {k: pointed(v, before) for k, v in kwargs.items()}))
        before.append(f"n{i}")
    nodes.append(LossNode("call_function", "total", "torch.sum", [{"ref": before[-1]}]))
    nodes.append(LossNode("output", "output", "output", [[{"ref": "total"}, {"dict": {}}]]))
    loss = CustomLoss("random", [LossInput("logprobs", 1)], nodes)
    try:
        check_custom_loss(loss)
        check_shapes("data[0]", loss, [(6,)], [torch.float32])
        evaluate_custom("data[0]", loss, -torch.rand(6), [])
    except InvalidRequestError:
        pass


def test_metrics_of_a_command_that_several_executed_are_reduced_as_their_names_end() -> None:
    def part(chosen: list[int], **metrics: float) -> PartResult:
        outputs = [{"logprobs": TensorData([0.0])} for _ in chosen]
        return PartResult(chosen, ForwardBackwardOutput("ArrayRecord", outputs, metrics), 0)

    parts = [
        part([0, 2, 3], **{"loss:sum": 3.0, "custom/x:mean": 1.0}),
        part([1], **{"loss:sum": 1.0, "custom/x:mean": 5.0}),
    ]
    assert merged(parts).metrics == {"loss:sum": 4.0, "custom/x:mean": 2.0}


def test_a_loss_that_its_data_do_not_fit_is_refused_naming_the_datum() -> None:
    shop = Workshop(tiny_qwen3())
    shop.add("run", AdapterSpec(rank=4, seed=1))
    data = request(1).data
    bare = [Datum(datum.model_input, {"target_tokens": datum.loss_fn_inputs["target_tokens"]}) for datum in data]
    of_weights, of_scale = uploaded(likelihood, logprobs=1, weights=1), uploaded(of_several, logprobs=2, scale=0)
    wanted = [
        (ForwardBackwardInput([data[0], bare[1]], "custom", custom=of_weights), r"data\[1\]"),
        (ForwardBackwardInput(data, "custom", custom=of_scale), "scale"),
        (ForwardBackwardInput(data, "custom"), "custom where a loss comes with it"),
        (ForwardBackwardInput(data, "cross_entropy", custom=uploaded(pairs, logprobs=1)), "custom where a loss comes"),
    ]
    for given_, said in wanted:
        (outcome,) = shop.engine.forward_backward([job("run", given_)])
        assert isinstance(outcome, InvalidRequestError)
        with pytest.raises(InvalidRequestError, match=said):
            raise outcome
