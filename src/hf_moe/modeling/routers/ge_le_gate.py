"""A gate between a global expert, the frozen model, and a local one: a hard choice for a whole sequence.

    x_t = mean over the counted tokens s <= t of h_s / rms(h_s)        z = W x + b
    u_e = [sigmoid(z_e) > threshold]        y = GE(h) + sum_e u_e LE_e(h)

The experts are the local ones, one for each user, and the model beside them is the global one: the weight of an expert
is 1 or its slot is empty, so that a sequence with u = 0 has the outputs of the model alone, to the bit. Of more open
gates than slots those of the largest z are taken.

With `end_token_id` the gate has read the instruction up to its end, and decides for what follows; the tokens before
are left to the global expert. Without it a causal layer decides for every token by the tokens up to it, and an encoder
by the whole sequence.

While training every gate is open, for the local expert learns on the data of its user. `W` and `b` are buffers, which
no task's loss moves: they are fitted afterwards, with both experts frozen, see `hf_moe.adapters.fit_gate`. Until then
the gate is open at inference too.

Source: A Mixture of Expert Approach for Low-Cost Customization of Deep Neural Networks, arXiv:1811.00056. The pooling,
the linear form and the threshold are this library's.
"""

import torch
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt, Share
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, check_slots, from_mask, gate_logits
from ..layer_spec import MoELayerSpec
from ..pooling import PooledRouter
from ..registry import register_router
from ..routing_context import RoutingContext


# The logit of a gate that has not been fitted: its sigmoid is 0.99995.
OPEN = 10.0


@register_router("ge_le_gate")
class GeLeGateRouter(PooledRouter):
    """A binary gate `weight` (E, d), `bias` (E,) for every local expert.

    Args:
        threshold (`float`, *optional*, defaults to 0.5): probability above which a gate is open.
        modalities, end_token_id, end: what is pooled, see [`PooledRouter`].

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        threshold: Share = 0.5,
        modalities: list[str] | tuple[str, ...] | None = None,
        end_token_id: NonNegativeInt | None = None,
        end: str = "last",
    ):
        super().__init__(spec, modalities, end_token_id, end)
        check_slots(spec, spec.num_experts, "ge_le_gate")
        self.threshold = threshold
        self.register_buffer("weight", torch.empty(spec.num_experts, spec.hidden_size, dtype=torch.float32))
        self.register_buffer("bias", torch.empty(spec.num_experts, dtype=torch.float32))

    def initialize(self, std: float) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, OPEN)

    def gate_rows(self) -> None:
        """Return `None`: a binary gate has nothing in common with one that chooses among experts."""
        return None

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        directions = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:])  # (T, d)
        # The gate is linear: the mean of its logits is that of the mean, and is less to remember.
        pooled, known = self.pool(gate_logits(directions, self.weight), context)  # (T, E), (T,)
        logits = apply_overrides(pooled + self.bias, self.spec, context)
        probs = logits.sigmoid()
        opened = logits.isfinite() if self.training else probs > self.threshold
        opened = opened & self._decided(known, context)[:, None]
        index, _ = from_mask(opened, probs, self.spec.num_experts_per_tok)  # (T, K)
        weight = (index < self.spec.num_experts).float()
        return ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits)

    def read(self, hidden_states: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the last decision of every row is made of, x (B, d), and which rows have one, (B,) bool."""
        directions = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:])
        pooled, known = self.pool(directions, context)
        mask = context.token_mask.to(known.device)  # (B, S)
        decided = self._decided(known, context).view_as(mask) & mask
        last = torch.arange(mask.shape[1], device=mask.device).masked_fill(~decided, 0).amax(1)  # (B,)
        rows = torch.arange(len(mask), device=mask.device)
        return pooled.view(*mask.shape, -1)[rows, last], decided.any(1)

    def _decided(self, known: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Return which tokens a gate decides for, (T,) bool: those after an end, where there is to be one."""
        if self.end_token_id is None or not self.spec.causal:
            return known
        ended = self.spans(context, known.device).ended[:, -context.token_mask.shape[1] :]
        return known & ended.flatten()
