"""Omni-SMoLA: soft mixtures of experts in three branches, for text, for images and for all tokens.

    L = X Phi (S, N)     N = E_b * p slots of a branch b, X the tokens that it sees
    D = softmax of L over these tokens        C = softmax of L over the slots
    y_t = sum over the branches that see t of C_t [expert_e(D_e^T X)]_e

Branch T sees text tokens alone, V those of images and videos, MM all of them; a branch adds nothing to a token that it
does not see. The first experts are those of T, then come those of V, and the rest is MM's. The paper puts low-rank
experts beside the frozen linear maps of a model: take this router for LoRA experts, with `router_input="target"`.

A slot mixes later tokens too, so there are three scopes:

- `"token"`: no slots, y_t = sum_e C_te expert_e(x_t) with p = 1. A token sees itself alone, everywhere.
- `"prefix"`: the slots are those of the prompt, up to the first `end_token_id` of the row, and only its tokens get
  something back. A row without that token has no prefix. The prompt must reach the model in one call: nothing is added
  to tokens that come after cached ones.
- `"sequence"`: the paper's equation over the whole row, for layers whose attention sees everything.

Source: Omni-SMoLA: Boosting Generalist Multimodal Models with Soft Mixture of Low-rank Experts, arXiv:2312.00968. The
first two scopes are this library's.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt, PositiveInt
from ..decisions import ExpertAssignment, SlotMixture
from ..gating import apply_overrides, from_mask, gate_logits
from ..layer_spec import MoELayerSpec
from ..pooling import instruction_ends
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext, is_one_of
from ..soft_slots import refuse_documents, slot_combine, slot_dispatch


# The modalities that the branches T, V and MM see; all of them where there is `None`.
SEEN = ((0,), (1, 2), None)


@register_router("omni_smola")
class OmniSmolaRouter(Router):
    """Soft mixing in a branch for text, one for images and one for all tokens.

    Args:
        spec (`MoELayerSpec`): facts of the layer; K does not matter.
        scope (`str`, *optional*, defaults to `"token"`): `"token"`, `"prefix"` or `"sequence"`, as above.
        num_text_experts (`int`, *optional*): experts of T, a third of all when absent; 0 for no such branch.
        num_vision_experts (`int`, *optional*): experts of V, a third of all when absent; 0 for no such branch.
        slots_per_expert (`int`, *optional*, defaults to 1): p; 1 where the scope is `"token"`.
        end_token_id (`int`, *optional*): the last token of a prefix; for that scope, which needs it.

    Raises:
        ValueError: if there are fewer experts than T and V have, or an option does not fit the scope.
    """

    mixes_slots: bool
    looks_ahead: bool

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        scope: Literal["token", "prefix", "sequence"] = "token",
        num_text_experts: NonNegativeInt | None = None,
        num_vision_experts: NonNegativeInt | None = None,
        slots_per_expert: PositiveInt = 1,
        end_token_id: NonNegativeInt | None = None,
    ):
        super().__init__(spec)
        third = spec.num_experts // 3
        text = third if num_text_experts is None else num_text_experts
        vision = third if num_vision_experts is None else num_vision_experts
        if text + vision > spec.num_experts:
            raise ValueError(
                f"Router 'omni_smola' of layer {spec.layer_idx}: num_text_experts={text} and num_vision_experts="
                f"{vision} must be at most num_experts={spec.num_experts} together; the rest is of all modalities."
            )
        if scope == "token" and slots_per_expert > 1:
            raise ValueError(
                f"slots_per_expert={slots_per_expert}: with scope='token' there are no slots; leave it out, or choose "
                "scope='prefix' or 'sequence'."
            )
        if (scope == "prefix") != (end_token_id is not None):
            raise ValueError(
                f"scope={scope!r} with end_token_id={end_token_id}: the id of the token that ends a prompt, such as "
                "<|im_end|>, belongs to scope='prefix', which needs it."
            )
        self.scope = scope
        self.end_token_id = end_token_id
        self.sizes = (text, vision, spec.num_experts - text - vision)
        self.slots_per_expert = slots_per_expert
        self.mixes_slots = scope != "token"
        self.looks_ahead = scope == "sequence"
        self.reads = frozenset({"hidden_states", "modality", *(["sequence"] if self.mixes_slots else [])})
        self.weight = nn.Parameter(torch.empty(spec.num_experts * slots_per_expert, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.xavier_normal_(self.weight)

    def most_experts_per_tok(self) -> int:
        text, vision, others = self.sizes
        return max(text, vision) + others

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment | SlotMixture:
        mask = self._counted(context, hidden_states.device)  # (B, S)
        logits = gate_logits(hidden_states, self.weight)  # (T, N)
        if self.scope == "token":
            logits = apply_overrides(logits, self.spec, context)
        rows = logits.view(*mask.shape, -1)  # (B, S, N)
        branches = rows.split([size * self.slots_per_expert for size in self.sizes], dim=-1)
        seen = [self._seen(branch, mask, context) for branch in range(len(SEEN))]
        pairs = list(zip(branches, seen, strict=True))
        combine = torch.cat([slot_combine(part, tokens) for part, tokens in pairs], dim=-1)  # (B, S, N)
        if self.scope == "token":
            weight = combine.flatten(0, 1)  # (T, E)
            index, weight = from_mask(weight > 0, weight)
            return ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits)
        refuse_documents(context, "omni_smola")
        dispatch = torch.cat([slot_dispatch(part, tokens) for part, tokens in pairs], dim=-1)
        return SlotMixture(dispatch, combine, self.spec.num_experts, router_logits=rows)

    def _counted(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return the tokens that the branches together act on, (B, S) bool."""
        mask = context.token_mask.to(device)
        if self.end_token_id is None:
            return mask
        if context.memory.cached_tokens:
            return torch.zeros_like(mask)
        ends = instruction_ends(context, self.end_token_id, device)
        before = ends.cumsum(1) - ends.long()  # how many ends come before a token
        return mask & (before == 0) & ends.any(1, keepdim=True)

    def _seen(self, branch: int, mask: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Return the tokens among those of `mask` that a branch sees, (B, S) bool."""
        modalities = SEEN[branch]
        # A branch without experts asks nothing: towers do not tell the modality of their tokens.
        if modalities is None or self.sizes[branch] == 0:
            return mask
        return mask & is_one_of(context.modality_ids.to(mask.device), modalities)
