"""Ragged dispatch against Transformers' grouped_mm and eager backends and against a dense feed-forward of equal FLOPs.

    python benchmarks/dispatch.py            # all tables, some minutes
    python benchmarks/dispatch.py --quick    # small sizes

All contestants of a row get the same tokens, the same routing and the same experts, in turn within one process; the
numbers are medians. The dense feed-forward runs every token through one expert as wide as the experts a token uses
on average. `autocast` means float32 weights under bf16 autocast. The second table is a whole training step (forward,
backward, AdamW) of a four-layer decoder, MoE against dense of equal active parameters.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from common import interleaved_ms, keep_freed_memory, make_parser, markdown_table, median, publish
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.experts.ffn import FfnExperts
from hf_moe.modeling.layer_spec import MoELayerSpec


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


def build_decoders(hidden: int, intermediate: int) -> dict[str, torch.nn.Module]:
    """Return a dense decoder, and a MoE of it: top-2 of 8 experts of half the width, so as many active parameters."""
    text_config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        vocab_size=4096,
    )
    moe_config = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "expert_intermediate_size": intermediate // 2,
        "objectives": {"load_balance": 0.01, "router_z": 0.001},
    }
    dense = LlamaForCausalLM(text_config)
    return {
        "dense": dense,
        "moe": HfMoeForConditionalGeneration(HfMoeConfig(text_config=text_config, moe_config=moe_config)),
    }


def measure_step(rows: int, hidden: int, intermediate: int, dtype: str, seeds: int, repetitions: int) -> dict:
    """Return one row of the second table: median milliseconds of a training step on `rows` rows of 256 tokens."""
    times: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        models = build_decoders(hidden, intermediate)
        if dtype == "bfloat16":
            models = {name: model.to(torch.bfloat16) for name, model in models.items()}
        optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
        input_ids = torch.randint(0, 4096, (rows, 256))

        def step(name: str, backend: str | None, models=models, optimizers=optimizers, input_ids=input_ids) -> None:
            if backend is not None:
                models[name].set_experts_implementation(backend)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
                loss = models[name](input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

        runs = {backend: partial(step, "moe", backend) for backend in ("ragged", "grouped_mm", "eager")}
        for name, values in interleaved_ms({"dense": partial(step, "dense", None), **runs}, repetitions).items():
            times.setdefault(name, []).extend(values)
    sizes = {f"{name}_parameters": sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    facts = {"tokens": 256 * rows, "hidden": hidden, "intermediate": intermediate, "dtype": dtype, **sizes}
    return {**facts, **{f"{name}_ms": median(values) for name, values in times.items()}}


def step_row(row: dict) -> dict:
    """Return a line of the second printed table."""
    return {
        "tokens": row["tokens"],
        "dtype": row["dtype"],
        "parameters, dense": f"{row['dense_parameters'] / 1e6:.1f} M",
        "MoE": f"{row['moe_parameters'] / 1e6:.1f} M",
        "dense ms": row["dense_ms"],
        "MoE ms": row["ragged_ms"],
        "MoE / dense": row["ragged_ms"] / row["dense_ms"],
        "with grouped_mm / dense": row["grouped_mm_ms"] / row["dense_ms"],
        "with eager / dense": row["eager_ms"] / row["dense_ms"],
    }


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    keep_freed_memory()
    shapes = QUICK_SHAPES if arguments.quick else SHAPES + FEW_TOKENS
    rows = []
    for shape in shapes:
        # Small shapes take microseconds and jitter by as much: they are repeated more often.
        repetitions = 5 if arguments.quick or shape[0] > 16 else 15
        for dtype in DTYPES:
            for mode in MODES:
                for empty_share in (0.0, 0.4) if shape not in FEW_TOKENS else (0.0,):
                    rows.append(measure(shape, dtype, mode, empty_share, arguments.seeds, repetitions))
    sizes = (1, 64, 64) if arguments.quick else (4, 576, 1536)
    steps = [measure_step(*sizes, dtype, arguments.seeds, repetitions=5) for dtype in DTYPES]
    tables = [markdown_table([ratio_row(row, rows) for row in rows]), markdown_table([step_row(row) for row in steps])]
    publish("dispatch", arguments, {"rows": rows, "training_step": steps}, "\n\n".join(tables))


if __name__ == "__main__":
    main()
