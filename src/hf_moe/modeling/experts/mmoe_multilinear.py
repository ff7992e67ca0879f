"""Multilinear experts: many linear maps, held by the factors of the tensor that they form.

    y = sum_n a_n W_n [x; 1]        twice, with the host's activation between, under the same gates a

W (N, I + 1, O) is never formed. With factors A, B, C of rank R, a map is

    cp:  y = C ((A^T a) * (B^T [x; 1]))        A (N, R), B (I + 1, R), C (O, R)
    tr:  y_o = tr(A(a) B([x; 1]) C_o)          A (R, N, R), B (R, I + 1, R), C (R, O, R), contracted with a and [x; 1]

The cost of a token is that of the factors, whichever experts it weighs; another expert adds R (cp) or R^2 (tr) numbers
to each map. The experts start as rescaled copies of one map. They take the gates of any router that assigns or merges
experts; a token without any gets 0.

Source: Multilinear Mixture of Experts: Scalable Expert Specialization through Factorization, arXiv:2402.12550.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN

from ...configuration.checks import PositiveInt
from ..decisions import Decision, ExpertAssignment, SlotMixture
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..routing import Experts


class MultilinearMap(nn.Module):
    """One layer of linear experts (N, I + 1, O) in factors."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, rank: int, form: str):
        super().__init__()
        self.form = form
        sizes = (num_experts, inputs + 1, outputs)
        shapes = [(size, rank) if form == "cp" else (rank, size, rank) for size in sizes]
        self.experts, self.inputs, self.outputs = (nn.Parameter(torch.empty(shape)) for shape in shapes)

    def initialize(self) -> None:
        rank = self.experts.shape[-1]
        if self.form == "cp":
            init.normal_(self.experts, mean=1.0, std=1.0)
        else:  # every expert begins with a diagonal matrix
            scales = 1.0 + torch.randn_like(self.experts)
            init.copy_(self.experts, scales * torch.eye(rank, device=scales.device, dtype=scales.dtype)[:, None])
        terms = (self.inputs.shape[-2], rank if self.form == "cp" else rank**2)
        for factor, number in zip((self.inputs, self.outputs), terms, strict=True):
            init.uniform_(factor, -(number**-0.5), number**-0.5)

    def forward(self, tokens: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        tokens = F.pad(tokens, (0, 1), value=1.0)  # (T, I + 1)
        if self.form == "cp":
            return ((gates @ self.experts) * (tokens @ self.inputs)) @ self.outputs.t()
        chosen = torch.einsum("tn,anb->tab", gates, self.experts)  # (T, R, R)
        read = torch.einsum("ti,bic->tbc", tokens, self.inputs)  # (T, R, R)
        return torch.einsum("tac,coa->to", chosen @ read, self.outputs)


@register_experts("mmoe_multilinear")
class MultilinearExperts(Experts):
    """Linear experts in factors, two layers of them in the place of a feed-forward.

    Args:
        form: `"cp"` or `"tr"`, as above.
        rank (`int`, *optional*): R of both layers; what makes them as large as one feed-forward of the experts' width
            when absent.
    """

    def __init__(
        self, config, spec: MoELayerSpec, *, form: Literal["cp", "tr"] = "cp", rank: PositiveInt | None = None
    ):
        super().__init__()
        self.num_experts = spec.num_experts
        width, outputs = spec.expert_intermediate_size, spec.output_size or spec.hidden_size
        if rank is None:
            dense = (spec.hidden_size * (2 if spec.gated else 1) + outputs) * width
            per_rank = 2 * (spec.num_experts + 1) + spec.hidden_size + 2 * width + outputs
            rank = max(1, int((dense / per_rank) ** (1.0 if form == "cp" else 0.5)))
        self.into = MultilinearMap(spec.num_experts, spec.hidden_size, width, rank, form)
        self.back = MultilinearMap(spec.num_experts, width, outputs, rank, form)
        self.act_fn = ACT2FN[spec.hidden_act]

    def parameters_per_token(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def initialize(self, std: float) -> None:
        self.into.initialize()
        self.back.initialize()

    def forward(self, hidden_states: torch.Tensor, decision: Decision) -> torch.Tensor:  # type: ignore[override]
        gates = gates_of_tokens(decision).to(hidden_states.dtype)  # (T, N)
        return self.back(self.act_fn(self.into(hidden_states, gates)), gates).to(hidden_states.dtype)


def gates_of_tokens(decision: Decision) -> torch.Tensor:
    """Return the weight of every expert for every token, (T, E).

    Raises:
        ValueError: if the decision mixes tokens.
    """
    if isinstance(decision, SlotMixture):
        raise ValueError(
            "Multilinear experts weigh all experts for each token, and this router mixes tokens in slots: choose the "
            "router 'mmoe_multilinear', or another that assigns experts."
        )
    if not isinstance(decision, ExpertAssignment):
        return decision.expert_weight[decision.group_index]
    return decision.weight_table()
