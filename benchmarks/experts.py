"""Every registered kind of experts: its time with empty slots and with unequal widths, and its dispatches.

    OMP_NUM_THREADS=1 python benchmarks/experts.py            # two minutes
    OMP_NUM_THREADS=1 python benchmarks/experts.py --quick    # small sizes

All kinds run on the same tokens, forward and backward, each with its own defaults and the router of its record, in
turn within one process. Times are CPU times of the process, medians of repetitions whose order is drawn anew each
time; a ratio is that of one repetition. The slots that are emptied are drawn at random from all. Unequal widths are
those of `hmoe_heterogeneous`, 9 to 23 parts, beside equal ones of the same mean. A dispatch sorts the slots of a layer
by expert. FLOPs are those that torch's counter sees.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from common import interleaved_ms, keep_freed_memory, make_parser, markdown_table, median, publish
from routers import ONEDNN
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, list_mechanisms
from hf_moe.modeling.block import Block, run_experts
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.dispatch import Dispatch
from hf_moe.modeling.routing_context import RoutingContext
from hf_moe.modeling.stacked_experts import StackedExperts


REFERENCE = "ffn"
EMPTY = 0.4
# The router of a kind that takes no other.
ROUTERS = {"aoe": "aoe"}
# Of Transformers, for the reference; its `batched_mm` copies the weights of every slot, 6 GB here.
BACKENDS = ("eager", "grouped_mm")
PARTS = (9, 11, 13, 15, 17, 19, 21, 23)


@dataclass(frozen=True)
class Size:
    """How many tokens, of which width, use how many of how many experts of which inner width."""

    tokens: int = 2048
    hidden: int = 256
    width: int = 512
    experts: int = 16
    slots: int = 2


QUICK = Size(64, 32, 64, 8, 2)


def build_block(size: Size, backend: str = "ragged", **moe: Any) -> Block:
    """Return the MoE layer of a decoder of one layer."""
    fields = {
        "layers": "all",
        "num_experts": size.experts,
        "num_experts_per_tok": size.slots,
        "expert_intermediate_size": size.width,
        "objectives": {},
        **moe,
    }
    text = LlamaConfig(hidden_size=size.hidden, intermediate_size=size.width, num_hidden_layers=1, vocab_size=32)
    config = HfMoeConfig(text_config=text, moe_config=fields, initializer_range=0.05)
    model = HfMoeForConditionalGeneration._from_config(config, experts_implementation=backend)
    return model.moe_layers()[0].train()


class Subject:
    """The experts of a block on tokens that its router has decided about, with slots emptied."""

    def __init__(self, block: Block, tokens: torch.Tensor, empty: float = 0.0):
        self.experts = block.experts
        self.tokens = tokens
        context = RoutingContext.all_text(tokens[None])
        with torch.no_grad():
            decision = block.router(tokens, context)
        assert isinstance(decision, ExpertAssignment)
        gone = torch.rand(decision.expert_index.shape, generator=torch.Generator().manual_seed(2)) < empty
        self.decision = replace(
            decision,
            expert_index=decision.expert_index.masked_fill(gone, decision.num_experts),
            expert_weight=decision.expert_weight.masked_fill(gone, 0.0),
        )
        self.upstream = torch.rand_like(tokens)

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        # A copy, since experts may take away what a decision brings.
        return run_experts(self.experts, tokens, replace(self.decision))

    def both(self) -> None:
        """Run the experts forward and backward."""
        tokens = self.tokens.detach().requires_grad_()
        self.run(tokens).backward(self.upstream)
        self.experts.zero_grad()

    def flops(self) -> int:
        with FlopCounterMode(display=False, custom_mapping=ONEDNN) as counter:
            self.both()
        return counter.get_total_flops()

    def dispatches(self) -> int:
        """Return how often a forward pass sorts the slots."""
        made: list[int] = []
        create = Dispatch.__init__

        def counted(dispatch: Dispatch, *args: Any, **options: Any) -> None:
            made.append(1)
            create(dispatch, *args, **options)

        with patch.object(Dispatch, "__init__", counted), torch.no_grad():
            self.run(self.tokens)
        return len(made)


def subjects_of(size: Size) -> dict[tuple[str, str], dict[str, Subject]]:
    """Return (kind, backend) -> the subjects `full` and `emptied`."""
    torch.manual_seed(0)
    tokens = torch.randn(size.tokens, size.hidden)
    found = {}
    for kind in list_mechanisms("experts"):
        moe = {"experts": kind, "router": ROUTERS.get(kind, "top_k")}
        block = build_block(size, **moe)
        found[kind, "ragged" if isinstance(block.experts, StackedExperts) else "own"] = block
        if kind == REFERENCE:
            found |= {(kind, backend): build_block(size, backend, **moe) for backend in BACKENDS}
    return {
        key: {"full": Subject(block, tokens), "emptied": Subject(block, tokens, EMPTY)} for key, block in found.items()
    }


def measure(size: Size, repetitions: int) -> list[dict[str, Any]]:
    """Return a row per kind and backend."""
    subjects = subjects_of(size)
    runs: dict[str, Callable[[], None]] = {}
    for (kind, backend), pair in subjects.items():
        runs |= {f"{kind} {backend} {state}": subject.both for state, subject in pair.items()}
    times = interleaved_ms(runs, repetitions, time.process_time)
    rows = []
    for (kind, backend), pair in subjects.items():
        own = {state: times[f"{kind} {backend} {state}"] for state in pair}
        rows.append(
            {
                "kind": kind,
                "backend": backend,
                "full_ms": median(own["full"]),
                "over_reference": ratio(own["full"], times[f"{REFERENCE} ragged full"]),
                "emptied_over_full": ratio(own["emptied"], own["full"]),
                # The counter does not know the grouped product.
                "flops": (flops := pair["full"].flops()) or None,
                "emptied_flops_over_full": pair["emptied"].flops() / flops if flops else None,
                "dispatches": pair["full"].dispatches(),
            }
        )
    return rows


def measure_widths(size: Size, repetitions: int) -> dict[str, float]:
    """Return the time of experts of unequal widths over that of equal ones of the same mean."""
    torch.manual_seed(0)
    tokens = torch.randn(size.tokens, size.hidden)
    unit = size.width // 16
    number = len(PARTS)
    banks = {f"e{part}": {"num_experts": 1, "intermediate_size": part * unit} for part in PARTS}
    even = {f"e{part}": {"num_experts": 1, "intermediate_size": 16 * unit} for part in PARTS}
    fields = {
        "unequal": {"expert_banks": banks, "num_experts": None, "expert_intermediate_size": None},
        "equal_banks": {"expert_banks": even, "num_experts": None, "expert_intermediate_size": None},
        "equal": {"num_experts": number, "expert_intermediate_size": 16 * unit},
    }
    subjects = {name: Subject(build_block(size, **moe), tokens) for name, moe in fields.items()}
    # One routing for all, in which every expert has as many tokens.
    index = torch.stack([torch.randperm(number)[: size.slots] for _ in range(size.tokens)])
    weight = torch.full(index.shape, 1 / size.slots)
    for subject in subjects.values():
        subject.decision = ExpertAssignment(index, weight, number)
    times = interleaved_ms({name: item.both for name, item in subjects.items()}, repetitions, time.process_time)
    return {
        "unequal_over_equal": ratio(times["unequal"], times["equal"]),
        "unequal_over_equal_banks": ratio(times["unequal"], times["equal_banks"]),
        "flops_unequal_over_equal": subjects["unequal"].flops() / subjects["equal"].flops(),
    }


def ratio(own: list[float], other: list[float]) -> float:
    return median(one / two for one, two in zip(own, other, strict=True))


def table(rows: list[dict[str, Any]], widths: dict[str, float]) -> str:
    """Return the rows as a table, and a sentence on widths."""
    lines = [
        {
            "kind": row["kind"],
            "backend": row["backend"],
            "ms": row["full_ms"],
            f"/ {REFERENCE}": row["over_reference"],
            f"{EMPTY:.0%} empty / full": row["emptied_over_full"],
            "FLOPs, empty / full": row["emptied_flops_over_full"] if row["flops"] else "–",
            "MFLOPs": f"{row['flops'] / 1e6:,.0f}" if row["flops"] else "–",
            "dispatches": row["dispatches"],
        }
        for row in rows
    ]
    return (
        f"{markdown_table(lines)}\n\nEight experts of 9 to 23 parts take {widths['unequal_over_equal']:.2f} of the "
        f"time of equal ones in one stack, {widths['unequal_over_equal_banks']:.2f} of equal ones in banks, at "
        f"{widths['flops_unequal_over_equal']:.2f} of the FLOPs."
    )


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    keep_freed_memory()
    size, repetitions = (QUICK, 2) if arguments.quick else (Size(), 5)
    rows, widths = measure(size, repetitions), measure_widths(size, repetitions)
    publish("experts", arguments, {"size": vars(size), "rows": rows, "widths": widths}, table(rows, widths))


if __name__ == "__main__":
    main()
