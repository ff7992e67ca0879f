"""Latent experts: the experts of a group share the projections into a latent space, which a token takes once.

    E_i(x) = D_i (act(A^g_i B^g x) * (A^u_i B^u x))        B (m, d) of the group, A_i (f, m) and D_i (d, f) its own

With m = f, an expert stores 2 f^2 + f d instead of 3 f d. To start as feed-forwards W_i, a group takes their best
approximation: the rows of B are the m leading right singular vectors V of the stacked W_i, and A_i = W_i V. Where
inputs x are known, it is W_i X^(1/2) with X = E[x x^T] that is approximated: the outputs of the projections, not their
weights.

Source: Beyond Standard MoE: Mixture of Latent Experts for Resource-Efficient Language Models, arXiv:2503.23100.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ...configuration.checks import PositiveInt
from ..dispatch import Dispatch
from ..layer_spec import MoELayerSpec, check_plain_gate
from ..registry import register_experts
from ..routing import Experts


@register_experts("mole_latent")
class LatentExperts(Experts):
    """Gated experts on latent inputs.

    Args:
        latent_dim (`int`, *optional*, defaults to the experts' width): m, at most d.
        latent_group_size (`int`, *optional*, defaults to all experts): how many experts share a latent space; they
            are neighbours.

    Raises:
        ValueError: if the host's feed-forward has no gate or has biases, m > d, or the groups do not divide E.
    """

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        latent_dim: PositiveInt | None = None,
        latent_group_size: PositiveInt | None = None,
    ):
        super().__init__()
        check_plain_gate(spec, "mole_latent")
        latent = latent_dim or min(spec.expert_intermediate_size, spec.hidden_size)
        self.group_size = latent_group_size or spec.num_experts
        if latent > spec.hidden_size:
            raise ValueError(f"latent_dim={latent} must be at most hidden_size={spec.hidden_size}.")
        if spec.num_experts % self.group_size:
            raise ValueError(f"latent_group_size={self.group_size} must divide num_experts={spec.num_experts}.")
        self.num_experts = spec.num_experts
        self.intermediate_dim = spec.expert_intermediate_size
        groups, shape = spec.num_experts // self.group_size, (spec.num_experts, spec.expert_intermediate_size, latent)
        self.latent_proj = nn.Parameter(torch.empty(groups, 2 * latent, spec.hidden_size))  # B, of the gate first
        self.gate_proj = nn.Parameter(torch.empty(shape))
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], spec.output_size or spec.hidden_size, shape[1]))
        self.act_fn = ACT2FN[spec.hidden_act]

    def initialize(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def compute(self, tokens: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        latent = torch.einsum("td,gmd->tgm", tokens, self.latent_proj.to(tokens.dtype))  # (T, G, 2m)
        group = dispatch.expert // self.group_size  # (M,)
        gate, up = (half[dispatch.token, group] for half in latent.chunk(2, dim=-1))  # (M, m) each
        inner = self.act_fn(dispatch.linear(gate, self.gate_proj)) * dispatch.linear(up, self.up_proj)  # (M, f)
        return dispatch.linear(inner, self.down_proj)

    def parameters_per_token(self) -> int:
        return self.latent_proj.numel()

    @property
    def widths(self) -> list[int]:
        return [self.intermediate_dim] * self.num_experts

    @torch.no_grad()
    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        moment = None if inputs is None else inputs.double().T @ inputs.double() / len(inputs)  # (d, d)
        states = iter(states)
        for group, basis in enumerate(self.latent_proj):
            held = list(islice(states, self.group_size))
            experts = slice(group * self.group_size, (group + 1) * self.group_size)
            self.down_proj[experts] = torch.stack([state["down_proj"] for state in held]).to(self.down_proj)
            halves = [
                torch.stack(half) for half in zip(*(state["gate_up_proj"].chunk(2) for state in held), strict=True)
            ]
            targets = zip(halves, basis.chunk(2), (self.gate_proj, self.up_proj), strict=True)
            for weights, shared, own in targets:  # (k, f, d), (m, d), (E, f, m)
                into, back = _factors(weights.flatten(0, 1), len(shared), moment)
                shared.copy_(into)
                own[experts] = (weights.float() @ back).to(own)
        return self.gate_proj.shape[-1] == self.latent_proj.shape[-1]


def _factors(weights: torch.Tensor, rank: int, moment: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (m, d) and B' (d, m), such that `weights @ B' @ B` is the best approximation (n, d) of rank m."""
    gram = weights.double().T @ weights.double()  # (d, d)
    root = inverse = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if moment is not None:
        value, vector = torch.linalg.eigh(moment.to(gram.device))
        # Directions that the inputs never take cost nothing, but must be invertible.
        scale = value.clamp(min=1e-6 * value.max()).sqrt()
        root, inverse = (vector * scale) @ vector.T, (vector / scale) @ vector.T
    basis = torch.linalg.eigh(root @ gram @ root).eigenvectors[:, -rank:]  # (d, m)
    return (basis.T @ inverse).float(), (root @ basis).float()
