"""The block: what takes the place of a feed-forward, and how routers, experts and a shared branch are wired in it.

The plain wiring is that of the block `moe`: one router, one set of experts, a branch that every token uses. Others run
their experts several times, in series, or on pieces of a token. A block gets its parts from `Parts`, which reads the
config, so it names no mechanism.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from .decisions import Decision, ExpertAssignment, refuse_mixture
from .expert_banks import run_assignment
from .layer_spec import MoELayerSpec
from .routing import Experts, Router
from .routing_context import RoutingContext, active_context


class Parts(Protocol):
    """Makes the parts of a block, of the kinds and with the options that the config names."""

    def router(self, spec: MoELayerSpec) -> Router: ...

    def experts(self, spec: MoELayerSpec) -> Experts: ...

    def shared_expert(self, spec: MoELayerSpec, experts: Experts) -> nn.Module | None: ...

    def residual_mix(self, spec: MoELayerSpec) -> nn.Module | None: ...


class Block(nn.Module):
    """Base of the blocks: `mix(tokens (T, d), context) -> (T, d)`, in `forward(hidden (B, S, d)) -> (B, S, d)`.

    Where the host's layer unpacks what its own feed-forward returns, `forward` gives `(output, None)`. The routing
    context is not an argument, since hosts pass none to their feed-forward: it is read from the context variable that
    the layer around it sets for the duration of its forward (see `host.py`).

    A block keeps its router under `gate`, its experts under `experts` and the branch of all tokens under
    `shared_expert`, the names that other tools look for; several routers are a list or a dict under `gate`.

    Args:
        spec: facts of the layer.
        parts: makes routers, experts and the shared branch.
    """

    gate: nn.Module
    experts: nn.Module
    # How often a token passes the experts of one decision, and the shared branch.
    runs_per_decision = 1
    shared_runs = 1

    def __init__(self, spec: MoELayerSpec, parts: Parts):
        super().__init__()
        self.spec = spec
        self.layer_idx = spec.layer_idx
        # What the experts are built from, which may be narrower or more than the layer's facts say.
        self.expert_spec = spec
        # In the singular: conversion rules of MoE hosts would take `shared_experts.down_proj` for a stack of theirs.
        self.shared_expert: nn.Module | None = None
        self.residual_mix: nn.Module | None = None

    def initialize(self, std: float) -> None:
        """Initialise the block's own parameters; those of its parts are initialised by themselves."""

    def initialized_parts(self) -> list[nn.Module]:
        """Return what `initialize` gives its first values: the block, and layers of its own."""
        return [self]

    @property
    def routers(self) -> list[Router]:
        """The routers, without what PEFT has wrapped around them."""
        gates = self.gate.children() if isinstance(self.gate, nn.ModuleList | nn.ModuleDict) else [self.gate]
        return [unwrapped(gate) for gate in gates]

    @property
    def router(self) -> Router:
        """The first of the routers."""
        return self.routers[0]

    def experts_of(self, router: int) -> nn.Module:
        """Return the experts that the router of this number chooses from."""
        return self.experts

    def put_routers(self, routers: list[Router]) -> None:
        """Put others in the places of the routers."""
        if isinstance(self.gate, nn.ModuleDict):
            self.gate.update(zip(self.gate.keys(), routers, strict=True))
        else:
            self.gate = nn.ModuleList(routers) if isinstance(self.gate, nn.ModuleList) else routers[0]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        context = active_context(hidden_states)
        rows = context.in_rows(hidden_states)  # (B, S, d)
        output = self.mix(rows.reshape(-1, rows.shape[-1]), context)  # (T, d)
        output = context.out_of_rows(output.view(*rows.shape[:-1], -1), hidden_states)
        return (output, None) if self.spec.returns_tuple else output

    def mix(self, tokens: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define mix(tokens, context).")

    def route(
        self, gate: nn.Module, experts: nn.Module, tokens: torch.Tensor, context: RoutingContext
    ) -> tuple[torch.Tensor, Decision]:
        """Return the experts' output for the tokens (T, d), and the gate's decision, which the context records."""
        decision = context.drop_padding(gate(tokens, context))
        site = unwrapped(gate).spec.site
        context.decisions[site] = decision
        output = run_experts(experts, tokens, decision, self.combine)
        if "outputs" in context.wanted:
            # What follows is computed from the view that is kept, so that the view's gradient is the output's.
            context.outputs[site] = output.view(*context.token_mask.shape, -1)
            output = context.outputs[site].flatten(0, 1)
        return output, decision

    def combine(self, experts: nn.Module, tokens: torch.Tensor, assignment: ExpertAssignment) -> torch.Tensor:
        """Return the outputs of the assigned experts for the tokens (T, d), joined by their weights."""
        return run_assignment(experts, tokens, assignment)

    def add_shared(self, output: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the routed experts' `output` with the shared branch's for the same tokens, both (T, d).

        With a residual mix it is `c_0 routed(x) + c_1 shared(x)`, c = softmax(W x + b) in float32 (DeepSpeed-MoE,
        arXiv:2201.05596), else `routed(x) + shared(x)`.
        """
        if self.shared_expert is None:
            return output
        shared = self.shared_expert(tokens)
        if self.residual_mix is None:
            return output + shared
        share = self.residual_mix(tokens).float().softmax(-1).to(output.dtype)  # (T, 2)
        return output * share[:, :1] + shared * share[:, 1:]


def check_latents(router: Router, experts: nn.Module) -> None:
    """Refuse experts that do not go on from what the router has begun, or that begin nowhere.

    Raises:
        ValueError: with both widths.
    """
    wanted = experts.latent_size if isinstance(experts, Experts) else None
    if router.latent_size != wanted:
        raise ValueError(
            f"Layer {router.spec.layer_idx}: the router {router.mechanism_name!r} hands latents of width "
            f"{router.latent_size} to experts that go on from width {wanted}. The router 'aoe' and the experts 'aoe' "
            "go together, with one d_low and without expert_banks."
        )


def unwrapped(gate: Any) -> Router:
    """Return the router itself where PEFT has wrapped it."""
    return gate.get_base_layer() if hasattr(gate, "get_base_layer") else gate


def run_experts(
    experts: nn.Module,
    tokens: torch.Tensor,
    decision: Decision,
    combine: Callable[[nn.Module, torch.Tensor, ExpertAssignment], torch.Tensor] = run_assignment,
) -> torch.Tensor:
    """Return what the experts make of the tokens (T, d).

    Args:
        combine (`Callable`, *optional*): runs the experts of an assignment and joins their outputs.
    """
    if not isinstance(decision, ExpertAssignment):
        if getattr(experts, "num_experts", decision.num_experts) != decision.num_experts:
            raise refuse_mixture(decision)
        return experts(tokens, decision)
    if decision.input_scale is not None:
        tokens = tokens * decision.input_scale[:, None].to(tokens.dtype)
    output = combine(experts, tokens, decision)
    if decision.identity_weight is not None:
        output = output + tokens * decision.identity_weight[:, None].to(tokens.dtype)
    return output
