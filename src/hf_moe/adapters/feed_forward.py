"""Whole feed-forward experts on one frozen feed-forward, as MixLoRA has them.

    y = sum_i w_i down_i(act(gate_i(x)) * up_i(x)) + (1 - sum_i w_i) ffn(x)        gate_i = gate + s B_i A_i, ...

The frozen gate and up projections are computed once per token and shared by its experts; the down projection runs per
expert. Tokens without experts, such as padding and those a full expert dropped, keep the frozen feed-forward.

Source: MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts, arXiv:2404.15159.
"""

import warnings
from typing import Any

import torch
from torch import nn

from ..modeling.dispatch import compute_dtype
from ..modeling.subclasses import is_made_by, same_name
from .experts.lora import LoraExperts
from .hosts import swap_class
from .layer import MoeLoraLayer, tuner_layers


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def adapt_feed_forwards(model: nn.Module, adapter_name: str) -> None:
    """Give every feed-forward whose projections hold an adapter's experts a class that mixes whole experts.

    Layers that are adapted and have none, such as those with a MoE block, are warned of.
    """
    left = {item.layer_name[adapter_name] for item in tuner_layers(model) if adapter_name in item.experts}
    found = set()
    for name, module in model.named_modules():
        projections: list[Any] = [getattr(module, projection, None) for projection in PROJECTIONS]
        held = [isinstance(item, MoeLoraLayer) and adapter_name in item.experts for item in projections]
        if not any(held):
            continue
        if not all(held) or not all(isinstance(item.experts[adapter_name], LoraExperts) for item in projections):
            raise ValueError(
                f"ffn_experts=True mixes whole feed-forwards, so all of {', '.join(PROJECTIONS)} of {name!r} must be "
                "targets with the experts 'lora': name the three in target_modules, or set ffn_experts=False."
            )
        groups = {item.router_group[adapter_name] for item in projections}
        alone = any(item.router_owner[adapter_name] is None for item in projections)
        if len(groups) > 1 or alone or not hasattr(module, "act_fn"):
            raise ValueError(
                f"ffn_experts=True: the projections of {name!r} must share one router, so router_input must not be "
                "'target', and it must have an act_fn."
            )
        found |= {item.layer_name[adapter_name] for item in projections}
        if not is_made_by(module, whole_ffn_class):
            _check_formula(module, name)
            swap_class(module, whole_ffn_class(type(module)))
    if not found:
        raise ValueError(
            "ffn_experts=True mixes whole gated feed-forwards, and no target lies in one with the linear layers "
            f"{', '.join(PROJECTIONS)}: name these in target_modules. For a MoE block, whose experts are stacked "
            "weights, set ffn_experts=False and adapt these with target_parameters."
        )
    if left - found:
        warnings.warn(
            f"ffn_experts=True: {len(left - found)} of {len(left)} adapted layers have no gated feed-forward among "
            f"the targets, and get no experts of one: {', '.join(sorted(map(str, left - found)))}.",
            stacklevel=2,
        )


@torch.no_grad()
def _check_formula(module: nn.Module, name: str) -> None:
    """Refuse a feed-forward that computes something else than `down(act(gate(x)) * up(x))`."""
    gate, up, down = (getattr(module, projection).get_base_layer() for projection in PROJECTIONS)
    if gate.weight.is_meta:
        return
    probe = torch.linspace(-1, 1, gate.in_features, device=gate.weight.device)[None]  # (1, d)
    probe = probe.to(gate.weight.dtype if gate.weight.is_floating_point() else torch.float32)
    adapted = {projection: getattr(module, projection) for projection in PROJECTIONS}
    for projection, layer in adapted.items():
        setattr(module, projection, layer.get_base_layer())
    try:
        found = module(probe)
    finally:
        for projection, layer in adapted.items():
            setattr(module, projection, layer)
    if not torch.allclose(found, down(module.act_fn(gate(probe)) * up(probe)), atol=1e-4, rtol=1e-3):
        raise ValueError(
            f"ffn_experts=True: {name!r}, a {type(module).__name__}, does not compute down(act(gate(x)) * up(x)). Set "
            "ffn_experts=False, which mixes at every linear layer."
        )


@same_name
def whole_ffn_class(host_class: Any) -> dict[str, Any]:
    """Return the subclass of a feed-forward's class that mixes whole experts."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj
        active = [name for name in gate.active_adapters if name in gate.experts]
        whole = [name for name in active if gate.ffn_experts[name]]
        if gate.disable_adapters or gate.merged or not whole:
            return host_class.forward(self, hidden_states)
        if len(active) > 1:
            raise ValueError(
                f"Adapters {active} are active on one feed-forward, and {whole[0]!r} mixes whole feed-forwards, which "
                "no other adapter can be added to: activate one of them."
            )
        return mix_experts(self, whole[0], hidden_states)

    return {"forward": forward}


def mix_experts(module: nn.Module, adapter_name: str, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the mixture of an adapter's feed-forward experts, (..., d)."""
    gate, up, down = (getattr(module, projection) for projection in PROJECTIONS)
    made = gate.decision(adapter_name, hidden_states, ())
    dispatch = made.dispatch
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, d)
    base_gate, base_up = gate.base_layer(tokens), up.base_layer(tokens)  # (T, f)

    def delta(layer: MoeLoraLayer, rows: torch.Tensor) -> torch.Tensor:
        lora_a, lora_b = layer.stacks(adapter_name)
        return dispatch.linear(dispatch.linear(rows, lora_a), lora_b)

    rows = dispatch.rows(gate.prepare(adapter_name, tokens)).to(compute_dtype(tokens))  # (M, d)
    inner = module.act_fn(dispatch.rows(base_gate) + delta(gate, rows))
    inner = inner * (dispatch.rows(base_up) + delta(up, rows))  # (M, f)
    output = down.base_layer(inner)
    output = output + delta(down, down.prepare(adapter_name, inner).to(rows.dtype))  # (M, d)
    result = dispatch.combine(output, made.expert_weight)
    left = 1.0 - made.expert_weight.sum(-1)  # (T,)
    rest = (left.abs() > 1e-5).nonzero().squeeze(-1)
    dense = down.base_layer(module.act_fn(base_gate[rest]) * base_up[rest])
    result = result.index_add(0, rest, (dense * left[rest, None]).to(output.dtype))
    return result.view(hidden_states.shape).to(hidden_states.dtype)
