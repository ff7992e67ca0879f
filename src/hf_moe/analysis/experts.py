"""Whether experts differ: their similarity, what each modality uses, and what a shuffled router costs.

The shuffle test permutes the columns of every router: where experts are interchangeable, the loss does not change.
Source of the test: EvoMoE, arXiv:2505.23830.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configuration.configuration_hf_moe import MODALITIES
from ..modeling.block import Block
from ..modeling.decisions import ExpertAssignment
from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.experts.ffn import FfnExperts
from ..modeling.layer_spec import Site
from ..modeling.routing_context import RoutingContext
from .routing_statistics import RoutingStatistics


SHUFFLES = 3


@torch.no_grad()
def weight_similarity(layer: Block) -> Tensor:
    """Return the cosines between the weights of a layer's experts, (E, E) float32; they are one bank."""
    experts = _bank(layer)
    flat = torch.cat([stack.detach().float().flatten(1) for stack in experts.parameters()], dim=1)  # (E, weights)
    flat = F.normalize(flat, dim=-1)
    return (flat @ flat.T).cpu()


@torch.no_grad()
def output_similarity(layer: Block, hidden_states: Tensor) -> Tensor:
    """Return the cosines between the outputs of a layer's experts on the same tokens, averaged, (E, E) float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, d)`): what reaches the layer, whose experts are one bank.
    """
    experts = layer.spec.num_experts
    return _output_cosines(partial(_run_expert, _bank(layer), experts, True), hidden_states, experts)


@torch.no_grad()
def expert_similarity(model: Any, batch: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return [`weight_similarity`] and [`output_similarity`] of every MoE layer, as `weights` and `outputs`.

    Args:
        batch (`dict[str, torch.Tensor]`): keyword arguments of a forward pass; its real tokens are the ones compared
            on.
    """
    inputs, layers = layer_inputs(model, batch), model.moe_layers()
    return {
        index: {"weights": weight_similarity(layers[index]), "outputs": output_similarity(layers[index], tokens)}
        for index, tokens in inputs.items()
    }


@torch.no_grad()
def layer_inputs(model: Any, batch: Mapping[str, Any]) -> dict[int, Tensor]:
    """Return the real tokens (T, d) of a batch, keyword arguments of a forward pass, that reach every MoE layer."""
    seen: dict[int, Tensor] = {}

    def keep(layer: Block, args: tuple[Tensor, ...]) -> None:
        seen[layer.layer_idx] = args[0].flatten(0, 1)

    with evaluation_mode(model), ExitStack() as hooks:
        for layer in model.moe_layers().values():
            hooks.enter_context(layer.register_forward_pre_hook(keep))
        routing = model(**batch, output_routing=True).routing
    return {index: tokens[routing.tokens("token_mask", tokens.device)] for index, tokens in seen.items()}


@torch.no_grad()
def expert_redundancy(model: Any, batch: dict[str, Tensor], tokens: Tensor) -> dict[int, float]:
    """Return, by layer, the mean cosine between the outputs of two experts on the same tokens.

    1 where all experts do the same, so that all but one are spare. What adapters add to the experts counts as well, as
    it does for these tokens in the forward pass. It works on the models of this library and on those of Transformers.

    Source: Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities, arXiv:2503.22517.

    Args:
        batch (`dict[str, torch.Tensor]`): keyword arguments of a forward pass.
        tokens (`torch.Tensor` of shape `(B, S)`, bool): the tokens compared on, such as those of one modality.

    Raises:
        ValueError: if `tokens` names none, or the model has no experts.
    """
    if not tokens.any():
        raise ValueError("tokens names none to compare the experts on: give a mask (B, S) with some that are True.")
    found: dict[int, float] = {}

    def measure(number: int, num_experts: int) -> Any:
        # Within the forward pass, where the routers of adapters know the modality of the tokens.
        def hook(experts: Any, args: tuple, output: Tensor) -> None:
            run = partial(_run_expert, experts, num_experts, len(args) == 2)
            found[number] = mean_similarity(_output_cosines(run, args[0], num_experts, tokens.flatten()))

        return hook

    with evaluation_mode(model), ExitStack() as hooks:
        for number, (experts, count) in _banks(model).items():
            hooks.enter_context(experts.register_forward_hook(measure(number, count)))
        model(**batch)
    return found


def _banks(model: Any) -> dict[int, tuple[nn.Module, int]]:
    """Return the experts of every MoE layer, with all adapters around them, and their number."""
    if hasattr(model, "moe_layers"):
        return {layer.layer_idx: (layer.experts, layer.spec.num_experts) for layer in model.moe_layers().values()}
    banks = {}
    for name, module in model.named_modules():
        # The attributes by which Transformers' own backends know a stack of experts.
        if all(hasattr(module, item) for item in ("has_gate", "is_transposed", "down_proj")):
            outermost = model.get_submodule(name.partition(".base_layer")[0])
            layer_idx = int(re.findall(r"\.(\d+)\.", name)[-1])
            banks[layer_idx] = outermost, len(module.down_proj)
    if not banks:
        raise ValueError(f"{type(model).__name__} has no layers with experts to compare.")
    return banks


def mean_similarity(matrix: Tensor) -> float:
    """Return the mean of a similarity matrix off its diagonal."""
    experts = len(matrix)
    return ((matrix.sum() - matrix.diagonal().sum()) / max(experts * (experts - 1), 1)).item()


def modality_divergence(statistics: RoutingStatistics) -> dict[Site, float]:
    """Return, by site, the Jensen-Shannon divergence in bits of the expert shares of the modalities that were seen.

    0 where all use the experts alike; for two modalities 1 where they share none. Modalities count alike.
    """
    result = {}
    for site in statistics.tables:
        filled = statistics.tables[site][:, :-1].sum(-1) > 0
        shares = statistics.shares(site)[filled].double()
        entropies = torch.special.entr(shares).sum(-1)
        mixture = torch.special.entr(shares.mean(0)).sum()
        result[site] = ((mixture - entropies.mean()) / torch.log(torch.tensor(2.0))).clamp(min=0).item()
    return result


def visual_specialisation(statistics: RoutingStatistics) -> dict[Site, Tensor]:
    """Return, by site, how many times as often images and videos use an expert as text does, (E,) float64.

    It is the expert's share of the visual runs over its share of the runs of text: 1 where a router does not tell them
    apart, and for experts that neither uses. An expert without text counts as if it had half a run of it. Sites that
    have not seen both are left out.

    Source: Aria: An Open Multimodal Native Mixture-of-Experts Model, arXiv:2410.05993.
    """
    result = {}
    for site in statistics.tokens:
        runs = statistics.runs(site)
        text = runs[MODALITIES.index("text")]
        visual = runs[MODALITIES.index("image")] + runs[MODALITIES.index("video")]
        if text.sum() > 0 and visual.sum() > 0:
            ratio = (visual / visual.sum()) / (text.clamp(min=0.5) / text.sum())
            result[site] = ratio.masked_fill((text == 0) & (visual == 0), 1.0)
    return result


@torch.no_grad()
def shuffle_test(model: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Return the mean language loss with the routers as they are, and with their columns permuted.

    The shuffled loss is the mean over `SHUFFLES` fixed permutations, none of which leaves an expert in its place.

    Args:
        batches (`Iterable[dict[str, torch.Tensor]]`): keyword arguments of forward passes, with labels.

    Returns:
        `loss`, `shuffled_loss` and `change`, their relative difference.
    """
    batches = list(batches)
    loss = mean_loss(model, batches)
    generator = torch.Generator().manual_seed(0)
    shuffled = 0.0
    for _ in range(SHUFFLES):
        with ExitStack() as hooks:
            for layer in model.moe_layers().values():
                experts = layer.spec.num_experts
                # A cycle through a random order moves every expert.
                order = torch.randperm(experts, generator=generator)
                target = torch.empty(experts + 1, dtype=torch.long)
                target[order], target[experts] = order.roll(1), experts
                hooks.enter_context(layer.gate.register_forward_hook(_exchange(target)))
            shuffled += mean_loss(model, batches) / SHUFFLES
    return {"loss": loss, "shuffled_loss": shuffled, "change": shuffled / loss - 1.0}


def _exchange(target: Tensor) -> Any:
    def hook(gate: Any, args: tuple[Tensor, RoutingContext], decision: Any) -> Any:
        if not isinstance(decision, ExpertAssignment):
            raise ValueError(f"The shuffle test needs a router that assigns experts, not {type(decision).__name__}.")
        decision.expert_index = target.to(decision.expert_index.device)[decision.expert_index]
        return decision

    return hook


@torch.no_grad()
def mean_loss(model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Return the mean language loss of a labelled token.

    Args:
        batches (`Iterable[dict[str, torch.Tensor]]`): keyword arguments of forward passes, with labels.
    """
    total, labelled = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += model(**batch).loss.item() * count
            labelled += count
    return total / max(labelled, 1)


def _run_expert(experts: Any, num_experts: int, takes_assignment: bool, hidden_states: Tensor, expert: int) -> Tensor:
    """Return what one expert makes of all tokens; Transformers' take index and weight in place of a decision."""
    index = torch.full((len(hidden_states), 1), expert, device=hidden_states.device)
    weight = torch.ones_like(index, dtype=hidden_states.dtype)
    if takes_assignment:
        return experts.forward(hidden_states, ExpertAssignment(index, weight, num_experts))
    return experts.forward(hidden_states, index, weight)


def _output_cosines(
    run: Callable[[Tensor, int], Tensor], hidden_states: Tensor, num_experts: int, kept: Tensor | None = None
) -> Tensor:
    """Return the cosines (E, E) between the outputs of experts, averaged over the tokens `kept` of (T, d)."""
    outputs = []
    for expert in range(num_experts):
        output = run(hidden_states, expert)
        output = output if kept is None else output[kept.to(output.device)]
        outputs.append(F.normalize(output.float(), dim=-1))
    stacked = torch.stack(outputs)  # (E, T, d)
    return (torch.einsum("etd,ftd->ef", stacked, stacked) / stacked.shape[1]).cpu()


def _bank(layer: Block) -> FfnExperts:
    if not isinstance(layer.experts, FfnExperts):
        found = type(layer.experts).__name__
        raise ValueError(f"Layer {layer.layer_idx}: one bank of feed-forwards is compared, not {found}.")
    return layer.experts
