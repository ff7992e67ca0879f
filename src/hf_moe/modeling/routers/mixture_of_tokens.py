"""Mixture of tokens: in training every expert sees mixtures of tokens of several examples at one position.

    c_{t,e} = softmax over the tokens of a group of (W x_t)_e / tau        m_e = sum_t c_{t,e} x_t
    y_t = sum_e c_{t,e} F_e(m_e) g / G

A group is G tokens of G rows at one position, or fewer, g, where the rows are used up. The factor g / G is this
library's: without it the weights of a token add up to E / g on average, and small groups would have large outputs.
Experts run E times for a group, which is once for a token where G = E and groups are full: where tokens of a position
are of one modality, rows of equal lengths, and B a multiple of G.

tau falls from `temperature` to `final_temperature`, geometrically with the progress of training, so that c becomes a
hard choice in the end: of a token by every expert. No position sees another, so nothing leaks from the future, but
rows of a batch see each other.

**Inference.** Nothing is mixed: a token takes the K best experts by the same gate, as with `top_k` (weights are plain
probabilities for K = 1). So do training batches of one row, and all with `mixing="off"`: the way to a sparse model is
to lower tau and to train a little longer with that. On eight clusters with a map each, the loss without mixing is four
times that with it where tau stays 1, no larger where it falls to 0.02, and a third of it after 100 more steps.

Source: Mixture of Tokens: Efficient LLMs through Cross-Example Aggregation, arXiv:2310.15961.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import Positive, PositiveInt
from ..decisions import Decision, SlotMixture
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import NUM_MODALITIES, RoutingContext


@register_router("mixture_of_tokens")
class MixtureOfTokensRouter(Router):
    """Mixtures of tokens in training, top-k at inference.

    Args:
        spec (`MoELayerSpec`): facts of the layer.
        group_size (`int`, *optional*): G; E when `None`.
        temperature (`float`, *optional*, defaults to 1.0): tau at the beginning of training.
        final_temperature (`float`, *optional*): tau at its end; it stays the same when `None`.
        mixing (`str`, *optional*, defaults to `"train"`): `"train"`, or `"off"` for the sparse model.
        group_by_modality (`bool`, *optional*, defaults to `True`): leave tokens of different modalities in groups of
            their own.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    reads = frozenset({"hidden_states", "modality", "sequence"})
    mixes_slots = True

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        group_size: PositiveInt | None = None,
        temperature: Positive = 1.0,
        final_temperature: Positive | None = None,
        mixing: Literal["train", "off"] = "train",
        group_by_modality: bool = True,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "mixture_of_tokens")
        self.group_size = group_size or spec.num_experts
        self.temperature = temperature
        self.final_temperature = final_temperature or temperature
        self.mixing = mixing
        self.group_by_modality = group_by_modality
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> Decision:
        logits = gate_logits(hidden_states, self.weight)  # (T, E)
        if not self.training or self.mixing == "off" or len(context.token_mask) == 1:
            return assign(logits, self.spec, context, norm=self.spec.num_experts_per_tok > 1, masked=False)
        tau = self.temperature ** (1.0 - context.progress) * self.final_temperature**context.progress
        order = self.groups(context, logits.device)
        scores = F.pad(logits / tau, (0, 0, 0, 1), value=float("-inf")).index_select(0, order)
        share = scores.view(-1, self.group_size, self.spec.num_experts).softmax(1)  # (groups, G, E)
        size = (order < len(logits)).view(-1, self.group_size, 1).sum(1, keepdim=True)  # (groups, 1, 1)
        return SlotMixture(
            share, share * (size / self.group_size), self.spec.num_experts, order=order, router_logits=logits
        )

    def groups(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return the token in every place of the groups, (groups * G,), T where there is none."""
        mask = context.token_mask.to(device)  # (B, S)
        key = torch.arange(mask.shape[1], device=device).expand_as(mask)
        if self.group_by_modality:
            key = key * NUM_MODALITIES + context.modality_ids.to(device)
        key = key.masked_fill(~mask, NUM_MODALITIES * mask.shape[1]).flatten()
        ordered, token = key.sort(stable=True)  # (T,) both: by position and modality, then by row; padding comes last
        rank = torch.arange(len(key), device=device) - torch.searchsorted(ordered, ordered)
        real = mask.flatten()[token]
        group = ((rank % self.group_size == 0) & real).cumsum(0) - 1  # (T,)
        places = int(group[-1] + 1) * self.group_size
        place = torch.where(real, group * self.group_size + rank % self.group_size, places)
        return torch.full((places + 1,), len(key), device=device).scatter(0, place, token)[:-1]
