"""The MoE layer: a router, experts, and an optional branch that every token uses."""

from dataclasses import replace

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration.layer_maps import at_layer
from .clamped_unit import ClampedUnit
from .decisions import Decision, ExpertAssignment, refuse_mixture
from .expert_banks import ExpertBanks, run_assignment
from .layer_spec import MoELayerSpec
from .mechanisms import get_mechanism
from .registry import build
from .routing import Experts, Router
from .routing_context import ACTIVE_CONTEXT, RoutingContext


class SharedExperts(nn.Module):
    """The experts that every token uses, kept as one feed-forward of their total width.

    With a gate the output is multiplied by `sigmoid(w . x)` per token, computed in float32. Where the
    experts' gated unit is clamped, they hand over that of this branch as `unit`.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        intermediate_size: int,
        gate: bool,
        unit: ClampedUnit | None = None,
    ):
        super().__init__()
        if spec.gated:
            self.gate_proj = nn.Linear(spec.hidden_size, intermediate_size, bias=spec.bias)
        self.up_proj = nn.Linear(spec.hidden_size, intermediate_size, bias=spec.bias)
        self.down_proj = nn.Linear(intermediate_size, spec.hidden_size, bias=spec.bias)
        self.shared_expert_gate = nn.Linear(spec.hidden_size, 1, bias=False) if gate else None
        self.act_fn = ACT2FN[spec.hidden_act]
        self.gated = spec.gated
        self.unit = unit

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the branch before its gate."""
        up = self.up_proj(hidden_states)
        if not self.gated:
            return self.down_proj(self.act_fn(up))
        gate = self.gate_proj(hidden_states)
        return self.down_proj(self.act_fn(gate) * up if self.unit is None else self.unit(self.act_fn, gate, up))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.feed_forward(hidden_states)
        if self.shared_expert_gate is not None:
            output = output * torch.sigmoid(self.shared_expert_gate(hidden_states).float()).to(output.dtype)
        return output

    def tp_plan(self) -> dict[str, str]:
        """Return how Transformers splits the branch by its width."""
        plan = {"up_proj": "colwise", "down_proj": "rowwise"}
        return plan | {"gate_proj": "colwise"} if self.gated else plan


class MoELayer(nn.Module):
    """Takes the place of a decoder layer's feed-forward: `forward(hidden (B, S, d)) -> (B, S, d)`.

    Where the host's layer unpacks what its own block returns, it is `(output, None)`.

    The routing context is not an argument, since hosts pass none to their feed-forward: it is read from the context
    variable that the decoder layer sets for the duration of its forward (see `host.py`). The modules are named `gate`,
    `experts` and `shared_expert`, the names other tools look for.

    With a residual mix the output is `c_0 routed(x) + c_1 shared(x)`, c = softmax(W x + b) in float32 (DeepSpeed-MoE,
    arXiv:2201.05596), else `routed(x) + shared(x)`.

    Args:
        config: the outer `HfMoeConfig`.
        spec: facts of this layer.

    Raises:
        ValueError: for a residual mix without a shared branch.
    """

    def __init__(self, config, spec: MoELayerSpec):
        super().__init__()
        self.layer_idx = spec.layer_idx
        self.spec = spec
        moe = config.moe_config
        router, options = _name_and_options(moe.router, spec.layer_idx)
        self.gate = build("router", get_mechanism("router", router), options, spec)
        if torch.finfo(torch.get_default_dtype()).bits < 32:
            # A model of low precision has float32 routers when it is loaded, so it has when it is built.
            self.gate.float()
        self.experts = _build_experts(config, spec)
        num_shared = at_layer(moe.num_shared_experts, spec.layer_idx)
        # In the singular: conversion rules of MoE hosts would take `shared_experts.down_proj` for a stack of theirs.
        self.shared_expert = None
        if num_shared > 0:
            width = (
                at_layer(moe.shared_intermediate_size, spec.layer_idx) or num_shared * spec.expert_intermediate_size
            )
            gated = at_layer(moe.shared_expert_gate, spec.layer_idx)
            self.shared_expert = SharedExperts(spec, width, gated, self.experts.shared_unit)
        self.residual_mix = None
        if at_layer(moe.residual_mix, spec.layer_idx):
            if self.shared_expert is None:
                raise ValueError(
                    f"Layer {spec.layer_idx}: moe_config.residual_mix weighs the routed experts against the shared "
                    "branch, and there is none: set num_shared_experts."
                )
            self.residual_mix = nn.Linear(spec.hidden_size, 2)

    @property
    def router(self) -> Router:
        """The router itself, also where PEFT has wrapped `gate` to adapt its parameters."""
        return self.gate.get_base_layer() if hasattr(self.gate, "get_base_layer") else self.gate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        output = self._mix(hidden_states)
        return (output, None) if self.spec.returns_tuple else output

    def _mix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        context = ACTIVE_CONTEXT.get()
        if context is None:
            context = RoutingContext.all_text(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, d)
        decision = self.gate(tokens, context)
        if isinstance(decision, ExpertAssignment):
            # Padding is computed by nobody: its slots are empty, and empty slots cost nothing.
            decision = decision.drop(~context.tokens("token_mask", tokens.device))
        context.decisions[self.spec.site] = decision
        output = self._run_experts(tokens, decision).view_as(hidden_states)
        if context.keep_outputs:
            context.outputs[self.spec.site] = output
        if self.shared_expert is None:
            return output
        shared = self.shared_expert(hidden_states)
        if self.residual_mix is None:
            return output + shared
        mix = self.residual_mix(hidden_states).float().softmax(-1).to(output.dtype)  # (B, S, 2)
        return output * mix[..., :1] + shared * mix[..., 1:]

    def _run_experts(self, tokens: torch.Tensor, decision: Decision) -> torch.Tensor:
        if not isinstance(decision, ExpertAssignment):
            if getattr(self.experts, "num_experts", decision.num_experts) != decision.num_experts:
                raise refuse_mixture(decision)
            return self.experts(tokens, decision)
        if decision.input_scale is not None:
            tokens = tokens * decision.input_scale[:, None].to(tokens.dtype)
        output = run_assignment(self.experts, tokens, decision)
        if decision.identity_weight is not None:
            output = output + tokens * decision.identity_weight[:, None].to(tokens.dtype)
        return output


def _name_and_options(value: dict | str, layer_idx: int) -> tuple[str, dict]:
    at = at_layer(value, layer_idx)
    options = {"name": at} if isinstance(at, str) else dict(at)
    return options.pop("name"), options


def _build_experts(config, spec: MoELayerSpec) -> Experts:
    name, options = _name_and_options(config.moe_config.experts, spec.layer_idx)
    cls = get_mechanism("experts", name)
    if not spec.banks:
        return build("experts", cls, options, config, spec)
    banks = {}
    for bank, num_experts, width in spec.banks:
        bank_spec = replace(spec, num_experts=num_experts, expert_intermediate_size=width, banks=())
        banks[bank] = build("experts", cls, options, config, bank_spec)
    return ExpertBanks(banks, [num_experts for _, num_experts, _ in spec.banks])
