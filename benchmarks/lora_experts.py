"""LoRA experts against PEFT's LoRA of equal active and of equal total rank, and against a loop over the experts.

    python benchmarks/lora_experts.py            # all rows, six minutes
    python benchmarks/lora_experts.py --quick    # small sizes

A number is the median of a whole training step (forward, backward, AdamW) of a two-layer decoder with an adapter on
all seven linear layers. Every token uses two experts; the router is shared by the targets of a layer. The loop is the
same adapter with the experts computed one after the other, each over the tokens that chose it. X-LoRA is PEFT's own,
on as many adapters of the same rank, which train with its classifier; it runs the model twice and every adapter on
every token, and is left out beyond 16. The second table keeps to the form that sorts tokens by expert, also where the
adapter would compute its few experts all at once. The third one is of a decoder of 24 layers that decodes a token with
a cache: four experts of rank 8 against a LoRA of rank 8 on all linear layers, both active and both disabled.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from common import interleaved_ms, keep_freed_memory, make_parser, markdown_table, median, publish
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import MoeLoraConfig
from hf_moe.adapters.low_rank import SharedAssignment
from hf_moe.adapters.stacks import Weights
from hf_moe.modeling.memory import cache_of


TOP_K = 2
# (rows of 256 tokens, hidden, intermediate, rank)
SIZES = (8, 576, 1536, 8)
QUICK_SIZES = (1, 64, 96, 8)
EXPERTS = (4, 16, 64)
DTYPES = ("float32", "bfloat16")
CONTESTANTS = ("moe_lora", "lora_equal_active", "lora_equal_total", "loop", "x_lora")
MOST_X_LORA = 16
# Hidden and intermediate widths of the decoders that decode.
DECODERS = ((64, 96), (576, 1536))
DECODED_LAYERS = 24


def looped(result: torch.Tensor, inputs: torch.Tensor, weights: Weights, decision: SharedAssignment) -> torch.Tensor:
    """Add the experts' output expert by expert: the usual way to write it."""
    tokens = inputs.reshape(-1, inputs.shape[-1])
    output = result.reshape(-1, result.shape[-1])
    for expert in range(len(weights.a)):
        token, slot = (decision.expert_index == expert).nonzero(as_tuple=True)
        if len(token):
            rows = F.linear(F.linear(tokens[token], weights.a[expert]), weights.b[expert])
            output = output.index_add(
                0, token, rows * weights.scaling * decision.expert_weight[token, slot, None].to(rows.dtype)
            )
    return output.view(result.shape)


def build_base(hidden: int, intermediate: int, layers: int = 2, use_cache: bool = False) -> LlamaForCausalLM:
    """Return a decoder."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            vocab_size=4096,
            use_cache=use_cache,
        )
    )


def build_model(config: PeftConfig, hidden: int, intermediate: int, dtype: str) -> nn.Module:
    """Return a two-layer decoder with an adapter, both in `dtype`."""
    base = build_base(hidden, intermediate).to(getattr(torch, dtype))
    return get_peft_model(base, config, autocast_adapter_dtype=False).train()


def build_x_lora(build: Callable[[PeftConfig], nn.Module], hidden: int, rank: int, experts: int) -> nn.Module:
    """Return the decoder with PEFT's X-LoRA over adapters that have been saved before, as it wants them."""
    with TemporaryDirectory() as folder:
        build(LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder)
        options = {"task_type": "CAUSAL_LM", "use_trainable_adapters": True}
        return build(MoeLoraConfig.from_system("x_lora", hidden_size=hidden, adapters=[folder] * experts, **options))


def make_step(model: nn.Module, input_ids: torch.Tensor) -> Callable[[], None]:
    """Return a whole training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def moe_lora(experts: int, rank: int) -> MoeLoraConfig:
    """Return the adapter that is measured."""
    return MoeLoraConfig(
        r=rank,
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        target_modules="all-linear",
        init_lora_weights=False,
    )


def draw_tokens(rows: int, seed: int) -> torch.Tensor:
    """Return rows of 256 tokens."""
    return torch.randint(0, 4096, (rows, 256), generator=torch.Generator().manual_seed(seed))


def in_a_loop(step: Callable[[], None]) -> None:
    """Run a step in which the layers compute their experts one after the other."""
    with patch("hf_moe.adapters.experts.lora.add_experts", looped):
        step()


def sorted_by_expert(step: Callable[[], None]) -> None:
    """Run a step in which the layers never compute all experts for every token."""
    with patch("hf_moe.adapters.low_rank.MAX_DENSE_BYTES", 0):
        step()


def measure(sizes: tuple[int, int, int, int], experts: int, dtype: str, seeds: int, repetitions: int) -> dict:
    """Return one row: the facts of the measurement and the median milliseconds of every contestant."""
    rows, hidden, intermediate, rank = sizes
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for seed in range(seeds):
        build = partial(build_model, hidden=hidden, intermediate=intermediate, dtype=dtype)
        models = [build(moe_lora(experts, rank))]
        models += [
            build(LoraConfig(r=total, target_modules="all-linear", init_lora_weights=False))
            for total in (TOP_K * rank, experts * rank)
        ]
        input_ids = draw_tokens(rows, seed)
        steps = [make_step(model, input_ids) for model in models]
        runs = dict(zip(CONTESTANTS[:-1], [*steps, partial(in_a_loop, steps[0])], strict=True))
        if experts <= MOST_X_LORA:
            runs["x_lora"] = make_step(build_x_lora(build, hidden, rank, experts), input_ids)
        for name, values in interleaved_ms(runs, repetitions).items():
            times[name].extend(values)
    facts = {"experts": experts, "rank": rank, "active_rank": TOP_K * rank, "tokens": 256 * rows, "dtype": dtype}
    return {**facts, **{f"{name}_ms": median(values) for name, values in times.items() if values}}


def measure_growth(sizes: tuple[int, int, int, int], seeds: int, repetitions: int) -> list[dict]:
    """Return the median milliseconds of the sorted experts with the fewest and the most experts, all interleaved."""
    rows, hidden, intermediate, rank = sizes
    times: dict[str, list[float]] = defaultdict(list)
    for seed in range(seeds):
        input_ids = draw_tokens(rows, seed)
        runs = {}
        for dtype in DTYPES:
            for experts in (EXPERTS[0], EXPERTS[-1]):
                model = build_model(moe_lora(experts, rank), hidden, intermediate, dtype)
                runs[f"{dtype} {experts}"] = partial(sorted_by_expert, make_step(model, input_ids))
        for name, values in interleaved_ms(runs, repetitions).items():
            times[name].extend(values)
    facts = {"fewest_experts": EXPERTS[0], "most_experts": EXPERTS[-1], "rank": rank, "tokens": 256 * rows}
    return [
        {
            "dtype": dtype,
            **facts,
            "fewest_ms": median(times[f"{dtype} {EXPERTS[0]}"]),
            "most_ms": median(times[f"{dtype} {EXPERTS[-1]}"]),
        }
        for dtype in DTYPES
    ]


@torch.no_grad()
def make_decoding(model: nn.Module, input_ids: torch.Tensor) -> Callable[[], None]:
    """Return a step that decodes a token after the prompt `input_ids`, and those of earlier steps."""
    cache = cache_of(model.eval()(input_ids=input_ids, use_cache=True))

    @torch.no_grad()
    def step() -> None:
        model(input_ids=input_ids[:, :1], past_key_values=cache)

    return step


def measure_decoding(repetitions: int) -> list[dict]:
    """Return the median milliseconds per token of a base, of adapters on it, and of adapters that are disabled."""
    input_ids = torch.randint(0, 4096, (1, 16), generator=torch.Generator().manual_seed(0))
    rows = []
    for hidden, intermediate in DECODERS:
        build = partial(build_base, hidden, intermediate, DECODED_LAYERS, use_cache=True)
        adapters = {
            "lora": LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False),
            "moe_lora": moe_lora(4, 8),
        }
        runs = {"base": make_decoding(build(), input_ids)}
        for name, config in adapters.items():
            runs[name] = make_decoding(get_peft_model(build(), config), input_ids)
            disabled = get_peft_model(build(), config)
            disabled.base_model.disable_adapter_layers()
            runs[f"{name}_disabled"] = make_decoding(disabled, input_ids)
        times = interleaved_ms(runs, repetitions)
        facts = {"layers": DECODED_LAYERS, "hidden": hidden}
        rows.append({**facts, **{f"{name}_ms": median(values) for name, values in times.items()}})
    return rows


def decoding_row(row: dict) -> dict:
    """Return a line of the printed table of decoding."""
    return {
        "one token through": f"{row['layers']} layers of {row['hidden']}",
        "base ms": row["base_ms"],
        "LoRA ms": row["lora_ms"],
        "LoRA experts ms": row["moe_lora_ms"],
        "/ LoRA": row["moe_lora_ms"] / row["lora_ms"],
        "disabled LoRA / base": row["lora_disabled_ms"] / row["base_ms"],
        "disabled LoRA experts / base": row["moe_lora_disabled_ms"] / row["base_ms"],
    }


def growth_row(row: dict) -> dict:
    """Return a line of the printed table of growth."""
    return {
        "sorted experts alone": row["dtype"],
        f"ms at {row['fewest_experts']} experts": row["fewest_ms"],
        f"ms at {row['most_experts']} experts": row["most_ms"],
        "growth": row["most_ms"] / row["fewest_ms"],
    }


def table_row(row: dict, rows: list[dict]) -> dict:
    """Return a line of the printed table: ratios of the times of one row."""
    fewest = next(other for other in rows if other["dtype"] == row["dtype"])
    return {
        "experts x rank": f"{row['experts']} x {row['rank']}",
        "dtype": row["dtype"],
        "LoRA experts ms": row["moe_lora_ms"],
        "/ LoRA of equal active rank": row["moe_lora_ms"] / row["lora_equal_active_ms"],
        "/ LoRA of equal total rank": row["moe_lora_ms"] / row["lora_equal_total_ms"],
        "/ loop": row["moe_lora_ms"] / row["loop_ms"],
        "/ X-LoRA": row["moe_lora_ms"] / row["x_lora_ms"] if "x_lora_ms" in row else "",
        f"/ itself at {fewest['experts']} experts": row["moe_lora_ms"] / fewest["moe_lora_ms"],
    }


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    keep_freed_memory()
    sizes, repetitions = (QUICK_SIZES, 3) if arguments.quick else (SIZES, 7)
    rows = [measure(sizes, experts, dtype, arguments.seeds, repetitions) for dtype in DTYPES for experts in EXPERTS]
    growth = measure_growth(sizes, arguments.seeds, repetitions)
    decoding = measure_decoding(20 if arguments.quick else 100)
    tables = [
        markdown_table([table_row(row, rows) for row in rows]),
        markdown_table(list(map(growth_row, growth))),
        markdown_table(list(map(decoding_row, decoding))),
    ]
    result = {"rows": rows, "growth": growth, "decoding": decoding}
    publish("lora_experts", arguments, result, "\n\n".join(tables))


if __name__ == "__main__":
    main()
