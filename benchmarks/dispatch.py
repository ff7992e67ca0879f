"""Ragged dispatch against Transformers' grouped_mm and eager backends and against a dense feed-forward of equal FLOPs.

    python benchmarks/dispatch.py            # all tables, some minutes
    python benchmarks/dispatch.py --quick    # small sizes

All contestants of a row get the same tokens, the same routing and the same experts, in turn within one process; the
numbers are medians. The dense feed-forward runs every token through one expert as wide as the experts a token uses
on average. `autocast` means float32 weights under bf16 autocast.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from common import interleaved_ms, keep_freed_memory, make_parser, markdown_table, median, publish
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe.modeling.experts.ffn import FfnExperts
from hf_moe.modeling.routing import MoELayerSpec


# (tokens, hidden, intermediate, experts, top_k)
SHAPES = [(1024, 576, 1536, 8, 2), (1024, 576, 512, 32, 6), (4096, 512, 1024, 16, 4), (16, 576, 1536, 8, 2)]
FEW_TOKENS = [(tokens, 576, 512, experts, 2) for tokens in (1, 4, 16) for experts in (8, 32, 128)]
QUICK_SHAPES = [(64, 32, 64, 4, 2)]
DTYPES = ("float32", "bfloat16", "autocast")
MODES = ("forward", "training")
Shape = tuple[int, int, int, int, int]


def build_experts(shape: Shape, dtype: str) -> FfnExperts:
    """Return gated experts without bias, the kind of almost every published decoder."""
    _, hidden, intermediate, num_experts, top_k = shape
    spec = MoELayerSpec(0, hidden, num_experts, top_k, intermediate)
    experts = FfnExperts(SimpleNamespace(_experts_implementation="ragged"), spec)
    experts.initialize(0.02)
    return experts.to(torch.bfloat16) if dtype == "bfloat16" else experts


def random_routing(shape: Shape, empty_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uniformly random distinct experts (T, K) and weights that sum to 1, a share of the slots being empty."""
    tokens, _, _, num_experts, top_k = shape
    index = torch.rand(tokens, num_experts).topk(top_k).indices  # (T, K)
    empty = torch.randperm(index.numel())[: round(empty_share * index.numel())]
    index.view(-1)[empty] = num_experts
    weight = torch.rand(tokens, top_k).masked_fill(index == num_experts, 0.0)
    return index, weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)


def contestants(shape: Shape, dtype: str, mode: str, empty_share: float) -> dict[str, Callable[[], None]]:
    """Return one run per contestant: a forward pass without gradients, or a forward and a backward pass."""
    tokens, hidden, intermediate, num_experts, top_k = shape
    experts = build_experts(shape, dtype)
    weight_dtype = experts.down_proj.dtype
    hidden_states = torch.randn(tokens, hidden, dtype=weight_dtype, requires_grad=mode == "training")
    index, weight = random_routing(shape, empty_share)
    weight = weight.to(weight_dtype).requires_grad_(mode == "training")
    upstream = torch.randn(tokens, hidden, dtype=weight_dtype)

    used = int((index < num_experts).sum()) / tokens
    width = max(16, 16 * round(used * intermediate / 16))
    gate_up = (0.02 * torch.randn(2 * width, hidden)).to(weight_dtype).requires_grad_()
    down = (0.02 * torch.randn(hidden, width)).to(weight_dtype).requires_grad_()

    def dense() -> torch.Tensor:
        return F.linear(experts._apply_gate(F.linear(hidden_states, gate_up)), down)

    functions = {
        name: partial(function, experts, hidden_states, index, weight)
        for name, function in (
            ("ragged", ALL_EXPERTS_FUNCTIONS["ragged"]),
            ("grouped_mm", ALL_EXPERTS_FUNCTIONS["grouped_mm"]),
            ("eager", FfnExperts.eager),
        )
    }
    leaves = [hidden_states, weight, *experts.parameters(), gate_up, down]

    def run(function: Callable[[], torch.Tensor]) -> None:
        with (
            torch.set_grad_enabled(mode == "training"),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"),
        ):
            output = function()
        if mode == "training":
            output.backward(upstream.to(output.dtype))
            for leaf in leaves:
                leaf.grad = None

    return {name: partial(run, function) for name, function in {**functions, "dense": dense}.items()}


def measure(shape: Shape, dtype: str, mode: str, empty_share: float, seeds: int, repetitions: int) -> dict:
    """Return one row: the facts of the measurement and the median milliseconds of every contestant."""
    times: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name, values in interleaved_ms(contestants(shape, dtype, mode, empty_share), repetitions).items():
            times.setdefault(name, []).extend(values)
    names = ("tokens", "hidden", "intermediate", "experts", "top_k")
    facts = {"dtype": dtype, "mode": mode, "empty_share": empty_share}
    return {**dict(zip(names, shape, strict=True)), **facts, **{f"{k}_ms": median(v) for k, v in times.items()}}


def ratio_row(row: dict, rows: list[dict]) -> dict:
    """Return a line of the printed table: ratios of the times of one row."""
    full = next(other for other in rows if other["empty_share"] == 0.0 and all(
        other[key] == row[key] for key in ("tokens", "intermediate", "experts", "dtype", "mode")))  # fmt: skip
    sizes = "-".join(str(row[key]) for key in ("tokens", "hidden", "intermediate", "experts", "top_k"))
    return {
        "tokens-d-f-E-K": sizes,
        "dtype": row["dtype"],
        "mode": row["mode"],
        "empty": f"{row['empty_share']:.0%}",
        "ragged ms": row["ragged_ms"],
        "ragged / grouped_mm": row["ragged_ms"] / row["grouped_mm_ms"],
        "ragged / eager": row["ragged_ms"] / row["eager_ms"],
        "dense / ragged": row["dense_ms"] / row["ragged_ms"],
        "ragged / ragged at 0%": row["ragged_ms"] / full["ragged_ms"],
    }


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    keep_freed_memory()
    shapes = QUICK_SHAPES if arguments.quick else SHAPES + FEW_TOKENS
    rows = []
    for shape in shapes:
        # Small shapes take microseconds and jitter by as much: they are repeated more often.
        repetitions = 5 if arguments.quick else 7 if shape[0] > 16 else 41
        for dtype in DTYPES:
            for mode in MODES:
                for empty_share in (0.0, 0.4) if shape not in FEW_TOKENS else (0.0,):
                    rows.append(measure(shape, dtype, mode, empty_share, arguments.seeds, repetitions))
    tables = markdown_table([ratio_row(row, rows) for row in rows])
    publish("dispatch", arguments, {"rows": rows}, tables)


if __name__ == "__main__":
    main()
