"""Experts on a new routing in every step, as in training, beside experts on one that is repeated.

    OMP_NUM_THREADS=1 python benchmarks/new_routings.py            # two minutes
    OMP_NUM_THREADS=1 python benchmarks/new_routings.py --quick    # small sizes

Where the products of experts go to oneDNN, as in bf16, it compiles a kernel for every number of rows that it has not
seen, and routing brings new ones in each step. Steps are forward and backward; times are CPU times of the process. A
step on a new routing, one on the repeated one and a dense feed-forward of equal FLOPs take turns. Medians of the first
ten steps and of those after them, whose kernels have been compiled in part.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from common import keep_freed_memory, make_parser, markdown_table, median, publish
from dispatch import Shape, build_experts, random_routing
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe.modeling.experts.ffn import FfnExperts


# (tokens, hidden, intermediate, experts, top_k)
SHAPES = [(1024, 576, 768, 8, 2), (2048, 192, 256, 8, 2), (2048, 192, 128, 64, 4), (256, 256, 128, 128, 4)]
QUICK_SHAPES = [(64, 32, 64, 4, 2)]
DTYPES = ("float32", "bfloat16", "autocast")
BACKENDS = ("ragged", "grouped_mm", "eager")
FIRST = 10


def timed(
    function: Callable[[], torch.Tensor], upstream: torch.Tensor, leaves: list[torch.Tensor], dtype: str
) -> float:
    """Return the milliseconds of a step."""
    start = time.process_time()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        output = function()
    output.backward(upstream.to(output.dtype))
    spent = 1000 * (time.process_time() - start)
    for leaf in leaves:
        leaf.grad = None
    return spent


def measure(shape: Shape, dtype: str, backend: str, steps: int) -> dict:
    """Return one row: medians of the milliseconds of a step."""
    torch.manual_seed(0)
    tokens, hidden, intermediate, num_experts, top_k = shape
    experts = build_experts(shape, dtype)
    kind = experts.down_proj.dtype
    run = FfnExperts.eager if backend == "eager" else ALL_EXPERTS_FUNCTIONS[backend]
    hidden_states = torch.randn(tokens, hidden, dtype=kind, requires_grad=True)
    upstream = torch.randn(tokens, hidden, dtype=kind)
    width = top_k * intermediate
    gate_up, down = (
        nn.Parameter((0.02 * torch.randn(sizes)).to(kind)) for sizes in ((2 * width, hidden), (hidden, width))
    )
    leaves = [hidden_states, *experts.parameters(), gate_up, down]
    # Some experts are more popular than others, and keep so.
    popularity = 0.3 * torch.rand(num_experts)

    def route() -> tuple[torch.Tensor, torch.Tensor]:
        _, weight = random_routing(shape, 0.0)
        index = (torch.rand(tokens, num_experts) + popularity).topk(top_k).indices
        return index, weight.to(kind).requires_grad_()

    def dense() -> torch.Tensor:
        return F.linear(experts._apply_gate(F.linear(hidden_states, gate_up)), down)

    repeated = route()
    times: dict[str, list[float]] = {"new": [], "repeated": [], "dense": []}
    for _ in range(steps):
        for name, routing in (("new", route()), ("repeated", repeated)):
            times[name].append(timed(partial(run, experts, hidden_states, *routing), upstream, leaves, dtype))
        times["dense"].append(timed(dense, upstream, leaves, dtype))
    names = ("tokens", "hidden", "intermediate", "experts", "top_k")
    return {
        **dict(zip(names, shape, strict=True)),
        "dtype": dtype,
        "backend": backend,
        "first_new_ms": median(times["new"][1:FIRST]),
        **{f"{name}_ms": median(values[FIRST:]) for name, values in times.items()},
    }


def line(row: dict) -> dict:
    """Return a line of the table."""
    return {
        "tokens-d-f-E-K": "-".join(str(row[key]) for key in ("tokens", "hidden", "intermediate", "experts", "top_k")),
        "dtype": row["dtype"],
        "backend": row["backend"],
        "new ms": row["new_ms"],
        "new / repeated": row["new_ms"] / row["repeated_ms"],
        "first ten / later": row["first_new_ms"] / row["new_ms"],
        "new / dense": row["new_ms"] / row["dense_ms"],
    }


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    keep_freed_memory()
    shapes, steps = (QUICK_SHAPES, 12) if arguments.quick else (SHAPES, 20)
    rows = [measure(shape, dtype, backend, steps) for shape in shapes for dtype in DTYPES for backend in BACKENDS]
    publish("new_routings", arguments, {"rows": rows}, markdown_table([line(row) for row in rows]))


if __name__ == "__main__":
    main()
