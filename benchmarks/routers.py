"""Every registered router alone: its time against `top_k`, parameters, FLOPs, waits for a GPU, whether it compiles.

    python benchmarks/routers.py            # a minute
    python benchmarks/routers.py --quick    # small sizes

All routers decide about the same tokens, each with its own defaults, in turn within one process. Times are CPU times
of the process: medians of repetitions whose order is drawn anew each time, and a ratio is that of the same run. A
decision is `router(hidden_states, context)` in training mode. The backward pass starts from everything in it that
experts or losses read, down to the hidden states. FLOPs are those that torch's counter sees, matrix products alone. A
wait is an operation at which a GPU would stop the host until it has caught up: it is counted on tensors without data,
whose device is called CUDA. A router compiles if `torch.compile(fullgraph=True)` traces its forward pass.
"""

import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import interleaved_ms, keep_freed_memory, make_parser, markdown_table, median, publish
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_moe import list_mechanisms
from hf_moe.modeling.decisions import Decision
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing import Router
from hf_moe.modeling.routing_context import RoutingContext


REFERENCE = "top_k"
VOCABULARY = 32_000
# A router may take so many times as long as `top_k`, unless its own equations need more.
LIMIT = 3.0

# torch's counter does not know the products that go to oneDNN.
ONEDNN = {torch.ops.mkldnn._linear_pointwise: lambda rows, weight, *_, **__: 2 * rows[0] * rows[1] * weight[0]}

# What a router needs of the layer, where it does not fit 64 experts and 2 slots.
LAYERS: dict[str, dict[str, Any]] = {
    "modality": {"num_experts": 2},
    "soft_moe": {"causal": False},
}


# Options without a default.
OPTIONS: dict[str, dict[str, Any]] = {"cmoe_contextual": {"contexts": {"day": [0, 1, 2, 3], "night": [4, 5, 6, 7]}}}


@dataclass(frozen=True)
class Size:
    """How many rows of how many tokens are routed, over how many experts, and their width."""

    rows: int = 16
    positions: int = 256
    hidden: int = 512
    experts: int = 64
    slots: int = 2


QUICK = Size(2, 16, 32, 16, 2)


def build_router(name: str, size: Size) -> Router:
    """Return a router with its own defaults, for one slot where it refuses more."""
    widths = {"hidden_size": size.hidden, "expert_intermediate_size": 4 * size.hidden, "vocab_size": VOCABULARY}
    facts = {"layer_idx": 1, "num_experts": size.experts, **widths, **LAYERS.get(name, {})}
    cls, options = get_mechanism("router", name), OPTIONS.get(name, {})
    try:
        router = build("router", cls, options, MoELayerSpec(num_experts_per_tok=size.slots, **facts))
    except ValueError:
        router = build("router", cls, options, MoELayerSpec(num_experts_per_tok=1, **facts))
    assert isinstance(router, Router)
    return router


class Subject:
    """A router with the tokens that it decides about."""

    def __init__(self, name: str, size: Size):
        router = self.router = build_router(name, size).train()
        self.router.initialize(0.02)
        self.shared = type(self.router).shared_part([self.router])
        if self.shared is not None:
            self.shared.initialize(0.02)
        shape = (size.rows, size.positions)
        self.hidden_states = torch.randn(size.rows * size.positions, size.hidden)
        # Half of a row is text, around an image, a video and a sound; the first row begins with padding.
        part = torch.arange(size.positions) * 8 // size.positions
        self.modality_ids = torch.tensor([0, 0, 1, 1, 2, 3, 0, 0])[part].expand(shape)
        self.token_mask = torch.ones(shape, dtype=torch.bool)
        self.token_mask[0, : size.positions // 8] = False
        self.input_ids = torch.randint(0, VOCABULARY, shape)
        condition = torch.arange(size.rows) % max(router.num_conditions, 1)
        features = torch.rand(size.rows, router.num_condition_features)
        known = condition if router.num_conditions else features
        self.condition_ids = {} if router.condition is None else {router.condition: known}
        self.upstream: dict[str, torch.Tensor] = {}

    def context(self) -> RoutingContext:
        """Return the context of a call in the middle of a training."""
        context = RoutingContext(self.modality_ids, self.token_mask, self.input_ids, self.condition_ids, progress=0.5)
        context.shared = {} if self.shared is None else {self.router.shared_name: self.shared}
        return context

    def forward(self) -> Decision:
        with torch.no_grad():
            return self.router(self.hidden_states, self.context())

    def both(self) -> None:
        """Decide, and go back from all that is read of the decision."""
        hidden_states = self.hidden_states.detach().requires_grad_()
        outputs = dict(differentiable(self.router(hidden_states, self.context())))
        for name, value in outputs.items():
            if name not in self.upstream:
                self.upstream[name] = torch.rand_like(value)
        if outputs:
            torch.autograd.backward(list(outputs.values()), [self.upstream[name] for name in outputs])
        self.router.zero_grad()
        if self.shared is not None:
            self.shared.zero_grad()

    def parameters(self) -> int:
        """Return how many parameters the router and its shared part have."""
        parts = [self.router] if self.shared is None else [self.router, self.shared]
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    def flops(self) -> int:
        """Return the FLOPs of the matrix products of a forward and a backward pass."""
        with FlopCounterMode(display=False, custom_mapping=ONEDNN) as counter:
            self.both()
        return counter.get_total_flops()

    def compiles(self) -> bool | str:
        """Whether the forward pass is one graph, or the first line of what torch says against it."""
        torch._dynamo.reset()
        context = self.context()
        try:
            torch.compile(self.router, fullgraph=True, backend="eager")(self.hidden_states, context)
        except torch._dynamo.exc.TorchDynamoException as error:
            return str(error).strip().splitlines()[0]
        return True


def differentiable(decision: Decision) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a decision that have a gradient, by name."""
    values = {field.name: getattr(decision, field.name) for field in fields(decision)}
    for name, value in {**values, **values["signals"]}.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            yield name, value


class Waits(TorchDispatchMode):
    """Notes the operations at which the host would wait for a GPU, each with the line that asks."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim",
            "unique_consecutive", "equal", "bincount")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in self.WAIT or self.is_counted(name, args, kwargs):
            calls = [call for call in traceback.extract_stack()[:-1] if "site-packages" not in call.filename]
            self.found.add(f"{Path(calls[-1].filename).name}:{calls[-1].lineno} {calls[-1].line}")
        if name == "_local_scalar_dense":  # a value for the tensor that has none
            return False if args[0].dtype is torch.bool else 1
        if name == "_grouped_mm":  # the kernel takes float32, what torch knows of its shapes does not
            output = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs)
            return output.to(args[0].dtype)
        return func(*args, **kwargs)

    @staticmethod
    def is_counted(name: str, args: Any, kwargs: Any) -> bool:
        """Whether the arguments make an operation wait: masks as indices, repeats without a total, copies."""
        if name in ("index", "index_put", "index_put_"):
            return any(index is not None and index.dtype is torch.bool for index in args[1])
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name == "_to_copy":
            return not kwargs.get("non_blocking") and kwargs.get("device", args[0].device) != args[0].device
        return name == "copy_" and args[0].device != args[1].device


def waits(name: str, size: Size) -> list[str]:
    """Return the lines of a router's forward pass at which the host would wait for a GPU."""
    recent = patch("torch.cuda.get_device_capability", return_value=(9, 0))
    quiet = warnings.catch_warnings(action="ignore")  # a tensor without data has no address either
    with recent, quiet, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        with torch.device("cuda"):
            subject = Subject(name, size)
        context = subject.context()
        # Where a size depends on data, which are not there, the search ends at what reads it.
        with Waits() as mode, torch.no_grad(), suppress(GuardOnDataDependentSymNode):
            subject.router(subject.hidden_states, context)
    return sorted(mode.found)


def facts(name: str, subject: Subject, size: Size) -> dict[str, Any]:
    """Return what is true of a router without a clock."""
    return {
        "router": name,
        "num_experts": subject.router.spec.num_experts,
        "num_experts_per_tok": subject.router.spec.num_experts_per_tok,
        "parameters": subject.parameters(),
        "flops": subject.flops(),
        "waits": waits(name, size),
        "compiles": subject.compiles(),
    }


def measure(size: Size, repetitions: int) -> list[dict[str, Any]]:
    """Return a row per registered router."""
    torch.manual_seed(0)
    subjects = {name: Subject(name, size) for name in list_mechanisms("router")}
    modes = {
        "forward": {name: subject.forward for name, subject in subjects.items()},
        "both": {name: subject.both for name, subject in subjects.items()},
    }
    times = {mode: interleaved_ms(runs, repetitions, time.process_time) for mode, runs in modes.items()}
    rows = []
    for name, subject in subjects.items():
        row = facts(name, subject, size)
        for mode, found in times.items():
            row[f"{mode}_ms"] = median(found[name])
            row[f"{mode}_ratio"] = median(
                own / other for own, other in zip(found[name], found[REFERENCE], strict=True)
            )
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table, the slowest first, and who is above the limit."""
    reference = next(row for row in rows if row["router"] == REFERENCE)
    ordered = sorted(rows, key=lambda row: -row["both_ratio"])
    lines = [
        {
            "router": row["router"],
            "forward ms": row["forward_ms"],
            f"/ {REFERENCE}": row["forward_ratio"],
            "forward and backward ms": row["both_ms"],
            f"/ {REFERENCE} ": row["both_ratio"],
            "parameters": f"{row['parameters']:,}",
            "MFLOPs": f"{row['flops'] / 1e6:,.0f}",
            "FLOPs /": row["flops"] / reference["flops"],
            "waits": len(row["waits"]),
            "one graph": "yes" if row["compiles"] is True else "no",
        }
        for row in ordered
    ]
    slow = [row for row in ordered if row["both_ratio"] > LIMIT]
    names = [f"`{row['router']}` ({row['flops'] / reference['flops']:.1f} times the FLOPs)" for row in slow]
    return f"{markdown_table(lines)}\n\nOver {LIMIT:.0f} times as long as `{REFERENCE}`: {', '.join(names) or 'none'}."


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    keep_freed_memory()
    size = QUICK if arguments.quick else Size()
    rows = measure(size, 2 if arguments.quick else 15)
    publish("routers", arguments, {"size": vars(size), "rows": rows}, table(rows))


if __name__ == "__main__":
    main()
