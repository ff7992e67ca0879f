"""Vector-quantised mixture of experts: a code of the token names an expert, beside the router's choice.

    j = argmin_j |x - v_j|^2    i = j mod E    z = (1 - c) x + c stopgrad(v_j - x)    o_d = norm(E_i(norm(z)))
    o_c = sum_{i in S} w_i E_i(x)              S and w from the router
    y = g_c o_c + g_d o_d + shared(x)          g = softmax(W x + b) in float32

V (N, d) is a codebook over the experts that the router chooses from too, and both norms are one. With `discrete_only`
the router and g are left out, y = o_d + shared(x): a token then has one expert and no product with a gate, and
`convert_block` makes such a model of one that was trained with both. The signal `vq_loss` (T,), for the objective
`signal`, is

    mean_d (v_j - stopgrad(x))^2 + commitment_cost * mean_d (stopgrad(v_j) - x)^2

without which the codes learn nothing, for no other gradient reaches them. With `revive` unused codes move after every
optimizer step, by their moving average p_j of the share of tokens, decay 0.99, and the nearest token a_j of that step:

    v_j <- (1 - m_j) v_j + m_j a_j        m_j = exp(-10 N p_j / (1 - 0.99) - 0.001)

At inference the codes stay. No token depends on another, in training as at inference. The decisions are at the sites
`1` and `"1.codes"`, or with `discrete_only` at `1` alone; experts run once for each, since their inputs differ. The
tokens of a disabled expert have the nearest code of another. Besides its experts a token takes N d multiply-adds for
every codebook.

Source: On the effectiveness of discrete representations in sparse mixture of experts, arXiv:2411.19402.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegative, PositiveInt, Share
from ..block import Block, Parts
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, gate_logits, gates_of, looked_up
from ..layer_spec import MoELayerSpec
from ..registry import register_block
from ..routing import Router, at_least_float32
from ..routing_context import RoutingContext
from ..running_statistics import gather_rows, sum_over_ranks


USE_DECAY = 0.99
# What stands for no token among those nearest to a code; buffers hold finite numbers.
FAR = torch.finfo(torch.float32).min


class CodeRouter(Router):
    """The expert of every token by its code, with weight 1; its arguments are those of the block.

    The signal `code` (T,) counts through all codebooks.
    """

    mechanism_name = "vqmoe"
    use: torch.Tensor
    counts: torch.Tensor
    nearest: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        num_codes: int,
        distance: str,
        commitment_cost: float,
        revive: bool,
        modalities: list[str] | tuple[str, ...],
    ):
        super().__init__(spec)
        self.gate_of_modality = gates_of(modalities)
        self.num_codes = num_codes
        self.distance = distance
        self.commitment_cost = commitment_cost
        self.revive = revive
        if len(modalities) > 1:
            self.reads = frozenset({"hidden_states", "modality"})
        total = len(modalities) * num_codes
        self.codes = nn.Parameter(torch.empty(total, spec.hidden_size))  # (G * N, d)
        if revive:
            self.register_buffer("use", torch.empty(total, dtype=torch.float32))
            # Of the current step: the tokens of every code, and after minus its distance the token nearest to it.
            self.register_buffer("counts", torch.empty(total, dtype=torch.long))
            self.register_buffer("nearest", torch.empty(total, 1 + spec.hidden_size, dtype=torch.float32))

    def initialize(self, std: float) -> None:
        init.uniform_(self.codes, -1 / self.num_codes, 1 / self.num_codes)
        if self.revive:
            init.zeros_(self.use)
            init.zeros_(self.counts)
            init.constant_(self.nearest, FAR)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        tokens, experts = hidden_states.float(), self.spec.num_experts
        book = looked_up(self.gate_of_modality, context.tokens("modality_ids", tokens.device))  # (T,)
        with torch.no_grad():
            scores = self.scores(tokens)  # (T, G, N)
            if self.revive and self.training:
                self.leave_nearest(scores, tokens, book, context)
            own = scores.take_along_dim(book[:, None, None], 1).squeeze(1)  # (T, N)
            # The codes of an expert are E apart: every column holds those of one.
            table = F.pad(own, (0, -self.num_codes % experts), value=float("-inf")).unflatten(1, (-1, experts))
            best, row = table.max(1)  # (T, E) both
            index = apply_overrides(best, self.spec, context).argmax(-1, keepdim=True)  # (T, 1)
            code = (row.gather(1, index) * experts + index).squeeze(1) + book * self.num_codes  # (T,)
        codes = self.codes.float()[code]  # (T, d)
        loss = (codes - tokens.detach()).square().mean(-1)
        loss = loss + self.commitment_cost * (codes.detach() - tokens).square().mean(-1)
        weight = torch.ones_like(index, dtype=torch.float32)
        return ExpertAssignment(index, weight, experts, signals={"code": code, "vq_loss": loss})

    def scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return how near every code is to tokens (T, d), (T, G, N): up to what is equal for all codes of a token."""
        codes = self.codes.float()
        if self.distance == "cos":
            scores = gate_logits(F.normalize(tokens, dim=-1), F.normalize(codes, dim=-1))
        else:
            scores = gate_logits(tokens, codes) - codes.square().sum(-1) / 2
        return scores.unflatten(1, (-1, self.num_codes))

    def leave_nearest(
        self, scores: torch.Tensor, tokens: torch.Tensor, book: torch.Tensor, context: RoutingContext
    ) -> None:
        """Leave for the end of a training forward the token of its batch that is nearest to every code."""
        near = scores if self.distance == "cos" else scores - tokens.square().sum(-1)[:, None, None] / 2
        counts = context.tokens("token_mask", tokens.device)[:, None, None] & near.isfinite()
        counts = counts & (book[:, None, None] == torch.arange(near.shape[1], device=near.device)[:, None])
        value, token = near.masked_fill(~counts, FAR).flatten(1).max(0)  # (G * N,) both
        left = context.carry.setdefault("nearest_to_codes", {})
        left[self.spec.site] = torch.cat([value[:, None], tokens[token]], dim=-1)

    def accumulate(self, decision: Any, context: RoutingContext) -> None:
        left = context.carry.get("nearest_to_codes", {}).get(self.spec.site)
        if left is None:
            return
        code = decision.signals["code"]
        self.counts += sum_over_ranks(
            torch.zeros_like(self.counts).index_add(0, code, context.tokens("token_mask", code.device).long())
        )
        found = torch.cat([self.nearest[None], gather_rows(left).unflatten(0, (-1, len(left)))])
        best = found[..., 0].argmax(0)  # (G * N,)
        self.nearest.copy_(found[best, torch.arange(len(best), device=best.device)])

    @torch.no_grad()
    def end_step(self) -> None:
        if not self.revive:
            return
        counts = self.counts.view(-1, self.num_codes)  # (G, N)
        tokens = counts.sum(-1, keepdim=True)
        share = torch.where(tokens > 0, counts / tokens.clamp(min=1), self.use.view_as(counts)).flatten()
        self.use.lerp_(share, 1 - USE_DECAY)
        moved = torch.exp(-10 * self.num_codes * self.use / (1 - USE_DECAY) - 1e-3)
        moved = moved.masked_fill(self.nearest[:, 0] == FAR, 0.0)[:, None]
        nearest = torch.where(moved > 0, self.nearest[:, 1:], 0.0)
        self.codes.copy_(self.codes * (1 - moved) + nearest * moved)
        self.counts.zero_()
        self.nearest.fill_(FAR)


@register_block("vqmoe")
class VectorQuantisedMoE(Block):
    """A router and a codebook over one set of experts, and the shared branch if the config has one.

    Args:
        spec: facts of the layer; its `num_experts_per_tok` is the router's.
        num_codes (`int`, *optional*, defaults to 512): N, at least E.
        contrib_rate (`float`, *optional*, defaults to 0.1): c; 0 leaves the token as it is.
        commitment_cost (`float`, *optional*, defaults to 0.25): of the side of the token in `vq_loss`.
        distance: `"l2"` as above, or `"cos"` for the code of the largest cosine.
        discrete_only (`bool`, *optional*, defaults to `False`): leave the router out.
        revive (`bool`, *optional*, defaults to `False`): move unused codes.
        modalities (`list[str]`, *optional*, defaults to `["text"]`): those with a codebook of their own, text first.
            Video shares that of images unless it is named, and any other modality without one shares that of text.

    Raises:
        ValueError: if an expert would have no code, the layer's output is of another width, or `modalities` does not
            begin with text.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        *,
        num_codes: PositiveInt = 512,
        contrib_rate: Share = 0.1,
        commitment_cost: NonNegative = 0.25,
        distance: Literal["l2", "cos"] = "l2",
        discrete_only: bool = False,
        revive: bool = False,
        modalities: list[str] | tuple[str, ...] = ("text",),
    ):
        super().__init__(spec, parts)
        if num_codes < spec.num_experts or spec.output_size not in (None, spec.hidden_size):
            raise ValueError(
                f"The block 'vqmoe' of layer {spec.layer_idx} needs a code for each of its experts, and an output "
                f"of the width of its input: got num_codes={num_codes} for {spec.num_experts} experts, and the widths "
                f"{spec.hidden_size} and {spec.output_size or spec.hidden_size}."
            )
        self.contrib_rate = contrib_rate
        own = replace(spec, num_experts_per_tok=1, part=spec.part if discrete_only else "codes")
        codes = CodeRouter(own, num_codes, distance, commitment_cost, revive, modalities)
        self.gate = nn.ModuleDict({} if discrete_only else {"router": parts.router(spec)})
        self.gate["codes"] = at_least_float32(codes)
        self.mixing = None if discrete_only else nn.Linear(spec.hidden_size, 2)
        self.norm = nn.LayerNorm(spec.hidden_size)
        self.experts = parts.experts(spec)
        self.shared_expert = parts.shared_expert(spec, self.experts)
        self.residual_mix = parts.residual_mix(spec)

    def initialize(self, std: float) -> None:
        init.ones_(self.norm.weight)
        init.zeros_(self.norm.bias)

    def initialized_parts(self) -> list[nn.Module]:
        return [self, self.norm]

    def put_routers(self, routers: list[Router]) -> None:
        # The codes stay: they are no gate that another router could take the place of.
        super().put_routers([*routers[:-1], self.gate["codes"]])

    def mix(self, tokens: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        if self.mixing is None:
            output, _ = self.route(self.gate["codes"], self.experts, tokens, context)
            return self.add_shared(output, tokens)
        chosen, _ = self.route(self.gate["router"], self.experts, tokens, context)
        named, decision = self.route(self.gate["codes"], self.experts, tokens, context)
        share = self.mixing(tokens).float().softmax(-1)  # (T, 2), of the router first
        decision.signals["discrete_share"] = share[:, 1].detach()
        share = share.to(chosen.dtype)
        return self.add_shared(chosen * share[:, :1] + named * share[:, 1:], tokens)

    def combine(self, experts: nn.Module, tokens: torch.Tensor, assignment: ExpertAssignment) -> torch.Tensor:
        code = assignment.signals.get("code")
        if code is None:
            return super().combine(experts, tokens, assignment)
        ahead = self.gate["codes"].codes[code].to(tokens.dtype) - tokens  # (T, d)
        mixed = (1 - self.contrib_rate) * tokens + self.contrib_rate * ahead.detach()
        return self.norm(super().combine(experts, self.norm(mixed), assignment))
