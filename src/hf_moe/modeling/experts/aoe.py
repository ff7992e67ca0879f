"""Autonomous experts: the gate projection has two factors, and the router has applied the first to choose experts.

    E_i(x) = D_i (act(B_i C_i) * (U_i x))        C_i = A_i x (r), from the router `aoe`

B_i (f, r), U_i (f, d) and D_i (d, f), and A_i (r, d) in the router. With A_i an expert has the parameters of a plain
one of width f_0 at

    f = (3 d f_0 - d r) / (r + 2 d)

Products are one per projection for any setting of the backend, on the slots alone. Experts start fresh: a copy of one
feed-forward in all of them would leave the norms nothing to choose by.

Source: Autonomy-of-Experts Models, arXiv:2501.13074.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ...configuration.checks import PositiveInt
from ..decisions import Decision, ExpertAssignment
from ..dispatch import Dispatch, run_rows
from ..layer_spec import MoELayerSpec, check_plain_gate
from ..registry import register_experts
from ..routing import Experts


@register_experts("aoe")
class AutonomousExperts(Experts):
    """Gated experts that go on from the latents of a decision.

    Args:
        d_low (`int`, *optional*, defaults to a third of d): r, as in the router.

    Raises:
        ValueError: if the host's feed-forward has no gate or has biases; in `forward`, if the decision has no latents,
            as one that a block uses again for other hidden states.
    """

    def __init__(self, config, spec: MoELayerSpec, *, d_low: PositiveInt | None = None):
        super().__init__()
        check_plain_gate(spec, "aoe")
        self.num_experts = spec.num_experts
        self.latent_size = d_low or max(1, spec.hidden_size // 3)
        inner = (spec.num_experts, spec.expert_intermediate_size)
        self.gate_out_proj = nn.Parameter(torch.empty(*inner, self.latent_size))  # B
        self.up_proj = nn.Parameter(torch.empty(*inner, spec.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(inner[0], spec.output_size or spec.hidden_size, inner[1]))
        self.act_fn = ACT2FN[spec.hidden_act]

    def initialize(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, decision: Decision) -> torch.Tensor:  # type: ignore[override]
        if not isinstance(decision, ExpertAssignment) or decision.latents is None:
            raise ValueError(
                "The experts 'aoe' go on from what the router 'aoe' has computed for the same hidden states, and this "
                "decision brings none of it: choose a block that decides anew for every run of its experts."
            )
        # Taken out, or a model would hold those of all layers until its forward ends.
        latents, decision.latents = decision.latents.flatten(0, 1), None  # (T * E, r)

        def compute(tokens: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
            own = latents.index_select(0, dispatch.token * self.num_experts + dispatch.expert).to(tokens.dtype)
            inner = self.act_fn(dispatch.linear(own, self.gate_out_proj))  # (M, f)
            inner = inner * dispatch.linear(dispatch.rows(tokens), self.up_proj)
            return dispatch.linear(inner, self.down_proj)

        dispatch = Dispatch(decision.expert_index, decision.num_experts)
        return run_rows(compute, hidden_states, dispatch, decision.expert_weight)
