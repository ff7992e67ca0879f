"""Mixture of depths: a layer runs on a share of the tokens, and the others pass it by.

    r = w x        chosen: the C = ceil(capacity n) of the n tokens of a sequence with the largest r
    y = x + r (f(x) - x)    for chosen tokens, f the layer among these alone        y = x    else

The product with r gives the router its gradient. A chosen token is worth its full cost, and any other none: attention
and feed-forward run on gathered tokens, see `gathered_tokens.py`. In training their number is known beforehand. Where
a row is several documents, each is a sequence; padding is never chosen.

**Inference.** The choice sees later tokens, so it is made in training alone. With `inference="aux_loss"` a token is
chosen if r > 0, for which a binary cross-entropy teaches r whether its token is among the chosen; with `"predictor"`
if p(x) > 0, where p(x) = v silu(U x), U of shape (d / 2, d), learns the same from an x without a gradient, so that it
changes nothing in the model. Both losses are the signal `choice_loss`, for the objective `signal`. A step of decoding
in which no row chooses its token does nothing but count it in the cache. Where one row does, all are computed: there
the saving is that of a batch of one.

A model that is made from a trained host computes something else than the host: it has to learn what to skip.

Source: Mixture-of-Depths: Dynamically allocating compute in transformer-based language models, arXiv:2404.02258.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache

from ...configuration.checks import Interval, PositiveInt
from ...configuration.configuration_hf_moe import MODALITIES
from ..admission import group_sizes, room, take_best
from ..block import Parts, unwrapped
from ..decisions import ExpertAssignment
from ..gathered_tokens import GatheredCache, GatheredContext, GatheredTokens, count_skipped, seen_keys
from ..gating import apply_overrides, check_choice, gate_logits, looked_up
from ..layer_spec import MoELayerSpec, Site
from ..registry import register_layer
from ..replacement import Replacement, UnsuitedLayer
from ..routing import Router, at_least_float32
from ..routing_context import ACTIVE_CONTEXT, RoutingContext, active_context
from ..subclasses import same_name


Capacity = Annotated[float, Interval(0, 1, open_minimum=True)]


@register_layer("mixture_of_depths")
class MixtureOfDepths:
    """Lets a layer run on some of its tokens.

    Args:
        spec, parts, layer: see `replacement.py`.
        every (`int`, *optional*, defaults to 2): of as many layers the last lets tokens pass by; the others stay as
            they are.
        capacity (`float`, *optional*, defaults to 0.125): the share of a sequence's tokens that is chosen in training.
        inference (`str`, *optional*, defaults to `"aux_loss"`): the rule afterwards, `"aux_loss"` or `"predictor"`.
        per_modality_capacity (`dict[str, float]`, *optional*): the capacity of each of these modalities, whose tokens
            compete among themselves: `{"image": 0.5}`.

    Raises:
        ValueError: if the layer is one of a tower, whose tokens see each other, or a modality is unknown.
        UnsuitedLayer: if the layer is a recurrence, of a hybrid.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        layer: nn.Module,
        *,
        every: PositiveInt = 2,
        capacity: Capacity = 0.125,
        inference: Literal["aux_loss", "predictor"] = "aux_loss",
        per_modality_capacity: dict[str, Capacity] | None = None,
    ):
        if not spec.causal:
            raise ValueError(
                f"Layer {spec.layer_idx} of the {spec.place} tower cannot skip tokens: mixture_of_depths is for "
                "decoders, in moe_config."
            )
        for name in per_modality_capacity or {}:
            check_choice("per_modality_capacity", name, MODALITIES)
        if (spec.layer_idx + 1) % every:
            return
        if any(isinstance(module, nn.Conv1d) for module in layer.modules()):
            raise UnsuitedLayer(
                f"Layer {spec.layer_idx} ({type(layer).__name__}) keeps a state of all tokens, as a Mamba does, and "
                "mixture_of_depths skips layers of attention: choose a host that has some."
            )
        spec = replace(spec, num_experts=1, num_experts_per_tok=1)
        router = DepthRouter(spec, capacity, inference, per_modality_capacity or {})
        configs = [module.config for module in layer.modules() if hasattr(module, "config")]
        layer.depth = DepthGate(router, configs)
        layer.__class__ = skipping_class(type(layer))


class DepthRouter(Router):
    """Decides which tokens go through a layer: its one expert. See [`MixtureOfDepths`] for the arguments."""

    mechanism_name = "mixture_of_depths"
    reads = frozenset({"hidden_states", "sequence"})

    def __init__(self, spec: MoELayerSpec, capacity: float, inference: str, per_modality_capacity: dict[str, float]):
        super().__init__(spec)
        self.capacities = [per_modality_capacity.get(name, capacity) for name in MODALITIES]
        # The contest of a modality; those without a capacity of their own share one.
        own = [name for name in MODALITIES if name in per_modality_capacity]
        self.contests = [own.index(name) + 1 if name in own else 0 for name in MODALITIES]
        if per_modality_capacity:
            self.reads = self.reads | {"modality"}
        self.weight = nn.Parameter(torch.empty(1, spec.hidden_size))
        self.predicts = inference == "predictor"
        if self.predicts:
            inner = max(1, spec.hidden_size // 2)
            self.choice_in = nn.Parameter(torch.empty(inner, spec.hidden_size))
            self.choice_out = nn.Parameter(torch.empty(1, inner))

    def initialize(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(hidden_states, self.weight)  # (T, 1)
        foretold = self.foretell(hidden_states.detach()) if self.predicts else logits  # (T, 1)
        real = context.tokens("token_mask", logits.device)[:, None]
        learns = self.training or context.labelled is not None
        best = self.best(logits, context)[:, None] if learns else None
        chosen = best if self.training else (apply_overrides(foretold, self.spec, context) > 0.0) & real
        # The layer multiplies by the logits, and a decision's weights are never negative.
        weight = logits.clamp(min=0.0).masked_fill(~chosen, 0.0)
        decision = ExpertAssignment((~chosen).long(), weight, 1, router_logits=logits)
        if best is not None:
            loss = F.binary_cross_entropy_with_logits(foretold, best.float(), reduction="none")
            decision.signals["choice_loss"] = loss.squeeze(-1)
        return decision

    def foretell(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the predictor's logits, (T, 1)."""
        return gate_logits(F.silu(gate_logits(hidden_states, self.choice_in)), self.choice_out)

    def best(self, logits: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Return which tokens the capacity has room for, (T,) bool."""
        device = logits.device
        rows, length = context.token_mask.shape
        group = torch.arange(rows, device=device)[:, None].expand(rows, length) * length
        if context.documents is not None:
            group = group + context.documents.to(device)
        group, share = group.flatten(), self.capacities[0]
        if any(self.contests):
            modality = context.tokens("modality_ids", device)
            group = group * len(MODALITIES) + looked_up(self.contests, modality)
            share = looked_up(self.capacities, modality.float())
        real = context.tokens("token_mask", device)
        group = group.masked_fill(~real, -1)
        return take_best(logits.squeeze(-1), group, room(group_sizes(group), share).masked_fill(~real, 0.0))

    def most(self, chosen: torch.Tensor, context: RoutingContext) -> int:
        """Return how many places a row needs for its chosen tokens (B, S)."""
        length = chosen.shape[1]
        if self.training and not any(self.contests) and context.documents is None:
            return math.ceil(self.capacities[0] * length)
        # The number of chosen tokens would break a graph.
        return length if torch.compiler.is_compiling() else int(chosen.sum(-1).max())


class DepthGate(Replacement):
    """Runs a layer on the tokens that its router chooses.

    Args:
        gate: the router.
        configs: those by which the layer's modules choose their kernel of attention.
    """

    is_added = True

    def __init__(self, gate: DepthRouter, configs: list[PreTrainedConfig]):
        super().__init__()
        self.gate = at_least_float32(gate)
        self.configs = configs
        # What the layer's keys and values look like, without a token in them.
        self.states: tuple[torch.Tensor, ...] | None = None

    @property
    def routers(self) -> list[Router]:
        return [unwrapped(self.gate)]

    def layer_share(self, modality: int, experts: Callable[[Site], float]) -> float:
        return experts(self.routers[0].spec.site)

    def forward(self, run: Callable[..., Any], hidden_states: torch.Tensor, given: dict[str, Any]) -> Any:
        """Return what the layer makes of the tokens (B, S, d).

        Args:
            run: the layer's own forward.
            given: its arguments besides the hidden states, by name.
        """
        self._check_mask(given.get("attention_mask"))
        context = active_context(hidden_states)
        router: Any = self.routers[0]
        site, layer_idx = router.spec.site, router.spec.layer_idx
        decision = context.decisions[site] = self.gate(hidden_states.flatten(0, 1), context)
        chosen = (decision.expert_index == 0).view(hidden_states.shape[:-1])  # (B, S)
        most = router.most(chosen, context)
        name, cache = next((item for item in given.items() if isinstance(item[1], Cache)), ("", None))
        seen = chosen if cache is None else context.remember(site, chosen)  # (B, n + S)
        is_first = seen.shape == chosen.shape
        if most == 0 and not is_first and self.states is not None:
            count_skipped(cache, layer_idx, self.states, *chosen.shape)
            return hidden_states
        tokens = GatheredTokens(chosen, max(most, 1))
        own = tokens.arguments(given)
        if is_first:
            own["attention_mask"] = tokens.own_mask(given.get("attention_mask"))
        else:
            keys = seen_keys(seen, cache, layer_idx, chosen.shape[1])
            own["attention_mask"] = tokens.mask_of_cached(given.get("attention_mask"), keys)
        if cache is not None:
            own[name] = GatheredCache(cache, tokens, is_first)
        inside = context.parts[f"depth_{site}"] = GatheredContext(context, tokens)
        token = ACTIVE_CONTEXT.set(inside)
        try:
            rows = tokens.take(hidden_states, 1)  # (B, C, d)
            output = run(rows, **own)
        finally:
            ACTIVE_CONTEXT.reset(token)
        if cache is not None:
            self.states = own[name].states
        result, *others = output if isinstance(output, tuple) else (output,)
        weight = tokens.take(decision.router_logits.view(chosen.shape))[..., None]  # (B, C, 1)
        result = tokens.put(rows + weight.to(rows.dtype) * (result - rows), hidden_states)
        return (result, *others) if isinstance(output, tuple) else result

    def _check_mask(self, mask: Any) -> None:
        kernels = {config._attn_implementation for config in self.configs} - {"sdpa", "eager", None}
        if kernels or (mask is not None and mask.dim() != 4):
            raise ValueError(
                "mixture_of_depths hides keys in a mask of queries and keys, and this layer has "
                f"{' and '.join(kernels) or 'a mask of tokens'}: choose a host with attention in every layer, and "
                "attn_implementation='sdpa' or 'eager'."
            )


@same_name
def skipping_class(host_class: Any) -> dict[str, Any]:
    """Return the subclass of a layer's class that runs on the tokens which its `depth` chooses."""
    first, *names = list(inspect.signature(host_class.forward).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip((first, *names), args, strict=False)), **kwargs}
        return self.depth(partial(host_class.forward, self), given.pop(first), given)

    return {"forward": forward}
