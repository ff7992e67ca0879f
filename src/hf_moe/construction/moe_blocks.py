"""MoE blocks of hosts: how each kind is read as this library's router and experts.

A reader looks at what a block holds, never at the model's type. It says which `moe_config` describes the block and
from which of its tensors those of the MoE layer come; [`check_block`] then compares the two. A tensor that no reader
has a place for is a reason to refuse: a block is taken over whole or not at all.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..modeling.host_layers import HostFfn, expert_stacks, read_ffn, stored_in_out


GATE_NAMES = ("gate", "router")
SHARED_NAMES = ("shared_experts", "shared_expert")
BANK_NAMES = ("text_moe", "vision_moe")
# A bias that moves the choice: beside the gate's weight or the gate, or with ERNIE's statistics.
SIGMOID_BIAS, SOFTMAX_BIAS = "e_score_correction_bias", "moe_statics.e_score_correction_bias"


@dataclass(frozen=True)
class Source:
    """Where a tensor of a MoE layer comes from.

    Attributes:
        names: tensors of the host's block by their names in it, joined along their first dimension.
        in_out: whether they are stored (in, out) and must be transposed.
        part: (index, count) where it is one of `count` equal parts along the first dimension.
        flat: whether it is a vector, whatever shape the host gives it.
    """

    names: tuple[str, ...]
    in_out: bool = False
    part: tuple[int, int] | None = None
    flat: bool = False

    def take(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the tensor: a view, unless several are joined."""
        found = [tensors[name].reshape(-1) if self.flat else tensors[name] for name in self.names]
        tensor = found[0] if len(found) == 1 else torch.cat(found)
        tensor = tensor.transpose(-2, -1) if self.in_out else tensor
        return tensor if self.part is None else tensor.chunk(self.part[1])[self.part[0]]


@dataclass(frozen=True)
class BlockReading:
    """A host's MoE block in the terms of this library.

    Attributes:
        fields: of the `moe_config`, for the block's layer.
        sources: where the tensors of the MoE layer come from, by their names in it. Statistics, and a bias where the
            host has none, are not among them: they keep their first values.
        returns_tuple: see [`MoELayerSpec`].
        branches: paths of the parts that compute alone, in the block and in the MoE layer: its stacks of experts and
            its shared branch.
    """

    fields: dict[str, Any]
    sources: dict[str, Source]
    returns_tuple: bool = False
    branches: dict[str, str] = field(default_factory=dict)

    def state(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of the MoE layer from those of the block, such as its `state_dict()`.

        They are views, but for a gate that the host keeps in several pieces.
        """
        return {name: source.take(tensors) for name, source in self.sources.items()}


def read_block(block: nn.Module, config: Any) -> BlockReading | None:
    """Return what a host's MoE block is; `None` for a dense feed-forward.

    Works on the meta device too: nothing is computed.

    Args:
        block: the feed-forward of one layer of a host.
        config: of the host's decoder.

    Raises:
        ValueError: if it is a MoE block that this library has no router or experts for, with the reason.
    """
    host = read_ffn(block)
    if host.layout is not None:
        return None
    reading = (
        _read_banks(block, host) if all(hasattr(block, name) for name in BANK_NAMES) else _read_one(block, config)
    )
    shared_fields, shared_sources, branches = _read_shared(block, host)
    reading = BlockReading(
        fields={**reading.fields, **shared_fields},
        sources={**reading.sources, **shared_sources},
        returns_tuple=host.returns_tuple,
        branches={**reading.branches, **branches},
    )
    _add_clamps(reading, block)
    taken = {name for source in reading.sources.values() for name in source.names}
    left = sorted(name for name, tensor in block.state_dict().items() if name not in taken and tensor.numel())
    if left:
        raise _refusal(
            block, f"it holds {left} besides a gate, a bias on its choice, gated experts and a shared branch"
        )
    return reading


def _refusal(block: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(block).__name__} cannot be adopted: {reason}. Choose a host whose MoE block is a gate and experts, or "
        "a dense one of the family."
    )


def _first(names: tuple[str, ...], *owners: Any, default: Any = None) -> Any:
    """Return the first of the attributes that one of the owners has."""
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in found if value is not None), default)


def _stacks(module: nn.Module, path: str, target: str) -> dict[str, Source]:
    """Return the sources of a stack of experts, which stands at `path` in the block and at `target` in the layer."""
    in_out = bool(stored_in_out(module))
    return {
        f"{target}.{name}": Source((f"{path}.{name}",), in_out=in_out and not name.endswith("_bias"))
        for name, _ in module.named_parameters(recurse=False)
        if name.removesuffix("_bias") in ("gate_up_proj", "down_proj")
    }


def _read_one(block: nn.Module, config: Any) -> BlockReading:
    """Read a block of one gate and one stack of experts."""
    stacks = expert_stacks(block)
    gates = [name for name in GATE_NAMES if getattr(getattr(block, name, None), "weight", None) is not None]
    if len(stacks) != 1 or not gates:
        raise _refusal(
            block, f"its gate is none of {GATE_NAMES} with a weight (E, d) that scores one stack of experts"
        )
    (path, experts), gate_name = next(iter(stacks.items())), gates[0]
    gate: Any = getattr(block, gate_name)
    activation = getattr(experts, "act_fn", None)
    if isinstance(activation, nn.Module) and len(inspect.signature(activation.forward).parameters) != 1:
        raise _refusal(
            block, f"its experts join the gate and the up projection by {type(activation).__name__}, not by a product"
        )
    slots = _first(("top_k", "num_experts_per_tok"), gate, block)
    if slots is None:
        raise _refusal(block, f"its gate {type(gate).__name__} does not say how many experts a token uses (top_k)")
    held = block.state_dict()
    biases = (f"{owner}{name}" for owner in (f"{gate_name}.", "") for name in (SIGMOID_BIAS, SOFTMAX_BIAS))
    bias = next((name for name in biases if name in held), None)
    sources = {"gate.weight": Source((f"{gate_name}.weight",)), **_stacks(experts, path, "experts")}
    if bias is not None:
        sources["gate.e_score_correction_bias"] = Source((bias,), flat=True)
    # Experts that are told neither who goes where nor with what weight are each handed rows of their own.
    if len(inspect.signature(experts.forward).parameters) == 1:
        if slots != 1 or bias is not None:
            raise _refusal(
                block,
                f"its gate weighs what experts see, and only one expert per token without a bias can; it has {slots}",
            )
        router = {"name": "llama4"}
    else:
        router = _scored_router(block, gate, config, slots, bias)
    fields = {
        "num_experts": gate.weight.shape[0],
        "num_experts_per_tok": slots,
        "router": router,
        "experts": {"name": "ffn"},
    }
    return BlockReading(fields, sources, branches={} if router["name"] == "llama4" else {path: "experts"})


def _scored_router(block: nn.Module, gate: Any, config: Any, slots: int, bias: str | None) -> dict[str, Any]:
    """Return the router of a gate whose scores weigh the experts' outputs."""
    groups = _first(("num_group", "n_group"), gate, default=1)
    # A gate that is told how to choose (DeepSeek-V2's form) leaves the weights as they are unless it says otherwise.
    method = getattr(gate, "topk_method", None)
    groups = 1 if method == "greedy" else groups
    # A gate that does not say so scores by sigmoids if it has a bias, and ERNIE's by a softmax.
    silent = "softmax" if bias is None or bias.endswith(SOFTMAX_BIAS) else "sigmoid"
    score = _first(("scoring_func",), gate, config, default=silent)
    if score not in ("sigmoid", "softmax"):
        raise _refusal(block, f"its gate scores by {score!r}, and a router here by 'sigmoid' or 'softmax'")
    options: dict[str, Any] = {
        "name": "top_k",
        "score_function": score,
        "norm_topk_prob": bool(_first(("norm_topk_prob",), gate, block, default=method is None)),
        "routed_scaling_factor": float(_first(("routed_scaling_factor",), gate, block, default=1.0)),
    }
    if bias is not None:
        options["bias_update_rate"] = 0.0
    elif options["norm_topk_prob"] and slots == 1:
        raise _refusal(
            block,
            "with one slot per token it renormalises its weight to 1, which leaves the gate without a gradient; "
            "the router 'top_k' keeps the probability",
        )
    if groups > 1:
        options |= {"n_group": groups, "topk_group": int(gate.topk_group)}
        options["group_score"] = "best" if method == "group_limited_greedy" else "best_two"
    return options


def _read_banks(block: nn.Module, host: HostFfn) -> BlockReading:
    """Read ERNIE-4.5-VL's block: text and vision tokens have a gate and a stack of their own."""
    banks: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    branches = {}
    for path in BANK_NAMES:
        bank: Any = getattr(block, path)
        name = path.removesuffix("_moe")
        banks[name] = {
            "num_experts": bank.gate.weight.shape[0],
            "intermediate_size": bank.experts.down_proj.shape[1 if stored_in_out(bank.experts) else 2],
        }
        sources |= _stacks(bank.experts, f"{path}.experts", f"experts.{name}")
        branches[f"{path}.experts"] = f"experts.{name}"
    gates = [getattr(block, path).gate for path in BANK_NAMES]
    slots, least = {gate.top_k for gate in gates}, {gate.norm_min for gate in gates}
    if len(slots) > 1 or len(least) > 1:
        raise _refusal(block, f"its banks differ in their slots {sorted(slots)} or least divisors {sorted(least)}")
    sources["gate.weight"] = Source(tuple(f"{path}.gate.weight" for path in BANK_NAMES))
    sources["gate.e_score_correction_bias"] = Source(
        tuple(f"{path}.gate.{SOFTMAX_BIAS}" for path in BANK_NAMES), flat=True
    )
    fields = {
        "num_experts": sum(bank["num_experts"] for bank in banks.values()),
        "expert_banks": banks,
        "num_experts_per_tok": slots.pop(),
        "router": {"name": "ernie45_vl", "norm_min": least.pop(), "bias_update_rate": 0.0},
        "experts": {"name": "ffn"},
    }
    return BlockReading(fields, sources, branches=branches)


def _add_clamps(reading: BlockReading, block: nn.Module) -> None:
    """Say by which bounds the gated unit of the experts, or that of their shared branch, is clamped."""
    clamps: dict[str, dict[str, Any]] = {}
    for path, own in reading.branches.items():
        part = block.get_submodule(path)
        before = _first(("swiglu_limit",), part)
        limit = _first(("limit",), part, default=math.inf) if before is None else before
        order = "after" if before is None and limit < math.inf else "before"
        clamps[own] = {"limit": limit, "order": order, "alpha": _first(("swiglu_alpha",), part)}
    limits = {own: None if clamp["limit"] == math.inf else float(clamp["limit"]) for own, clamp in clamps.items()}
    if not any(limits.values()):
        return
    clamped = [clamps[own] for own, limit in limits.items() if limit is not None]
    if len({(clamp["order"], clamp["alpha"]) for clamp in clamped}) > 1 or "experts" not in limits:
        raise _refusal(block, f"its parts clamp in ways of their own: {clamps}")
    reading.fields["experts"] = {
        "name": "ffn",
        "limit": limits["experts"],
        "shared_limit": limits.get("shared_expert"),
        "order": clamped[0]["order"],
        "alpha": clamped[0]["alpha"],
    }


def _read_shared(block: nn.Module, host: HostFfn) -> tuple[dict[str, Any], dict[str, Source], dict[str, str]]:
    """Read the branch that every token uses, and its gate."""
    path = next((name for name in SHARED_NAMES if isinstance(getattr(block, name, None), nn.Module)), None)
    if path is None:
        return {}, {}, {}
    try:
        shared = read_ffn(getattr(block, path))
    except ValueError as error:
        raise _refusal(block, f"its {path} are no feed-forward of this library ({error})") from error
    if shared.layout is None or shared.gated != host.gated or shared.bias != host.bias:
        raise _refusal(block, f"its {path} differ from its experts in gate or bias, and both are of one kind here")
    layout = shared.layout
    rows: dict[str, tuple[str, tuple[int, int] | None]] = {"down_proj": (layout.down, None)}
    if layout.fused:
        rows |= {"gate_proj": (layout.up, (0, 2)), "up_proj": (layout.up, (1, 2))}
    else:
        rows |= {"gate_proj": (str(layout.gate), None), "up_proj": (layout.up, None)}
    sources = {
        f"shared_expert.{target}.{kind}": Source(
            (f"{path}.{name}.{kind}",), in_out=layout.transposed and kind == "weight", part=part
        )
        for target, (name, part) in rows.items()
        for kind in (("weight", "bias") if shared.bias else ("weight",))
    }
    fields: dict[str, Any] = {"num_shared_experts": 1, "shared_intermediate_size": shared.intermediate_size}
    if isinstance(getattr(block, "shared_expert_gate", None), nn.Module):
        fields["shared_expert_gate"] = True
        sources["shared_expert.shared_expert_gate.weight"] = Source(("shared_expert_gate.weight",))
    return fields, sources, {path: "shared_expert"}
