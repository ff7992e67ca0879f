"""LoRA experts in the base weights: exact for tokens that all have the same gates, approximate by name.

    W' = W + s * sum_i g_i B_i A_i

With a router that gives every token the same gates g this is what the adapter computes: PEFT's own `merge_adapter`,
`unmerge_adapter` and `merge_and_unload` do it. A router that decides by task or modality alone has such gates for each
of them (`merge_for`). Any other router can be replaced by its mean gates, another model (`merge_by_mean_routing`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F

from ..configuration.configuration_hf_moe import MODALITIES
from ..modeling.decisions import ExpertAssignment
from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.gating import check_choice
from ..modeling.routing import Router
from ..modeling.routing_context import RoutingContext
from .constant_routing import RoutingVaries, constant_gates
from .layer import MoeLoraLayer, tuner_layers
from .low_rank import SharedAssignment


@dataclass(frozen=True)
class MergeReport:
    """How far a merged model is from the one it was merged from, on the real tokens of the given batches.

    Attributes:
        tokens: how many were compared.
        kl: mean Kullback-Leibler divergence of the merged model's predictions from the adapter's, in nats.
        kl_without_adapter: the same for the base model alone; a merge that is no better than this one loses what the
            adapter has learned.
        same_prediction: share of the tokens whose most probable class stayed, 0 to 1.
        max_logit_difference: the largest difference of a logit.
        mean_gates: adapter -> number of the router -> mean gate of every expert.
    """

    tokens: int
    kl: float
    kl_without_adapter: float
    same_prediction: float
    max_logit_difference: float
    mean_gates: dict[str, dict[int, list[float]]]


# (adapter, router) -> gates (E,)
Gates = dict[tuple[str, Router], torch.Tensor]


def merge_for(model: PeftModel, *, modality: str | None = None, condition_ids: dict[str, int] | None = None) -> None:
    """Merge the active adapters as they act on one task or one modality, exactly for its tokens.

    Args:
        model: the model; `unmerge_adapter` takes the adapters out again, `unload` leaves the merged base model.
        modality: `"text"`, `"image"`, `"video"` or `"audio"`.
        condition_ids: ids of a row, such as `{"task": 1}`.

    Raises:
        ValueError: if neither is given, if the model is merged already, or if a router decides by more than that; no
            weight has changed then.
    """
    if modality is not None:
        check_choice("modality", modality, MODALITIES)
    if modality is None and not condition_ids:
        raise ValueError("merge_for needs a modality or condition_ids; merge_adapter() merges what needs neither.")
    _check_unmerged(model)
    gates: Gates = {}
    for adapter_name, _, router in _active(model):
        try:
            gates[adapter_name, router] = constant_gates(router, modality, condition_ids)
        except RoutingVaries as error:
            raise ValueError(
                f"Adapter {adapter_name!r} cannot be merged for modality={modality!r}, condition_ids={condition_ids}: "
                f"{error}."
            ) from error
    _merge(model, gates)


def merge_by_mean_routing(
    model: PeftModel, batches: Iterable[dict[str, Any]], *, measure_on: Iterable[dict[str, Any]] | None = None
) -> MergeReport:
    """Merge the active adapters with every router replaced by its mean gates, and say what that costs.

    Args:
        batches: keyword arguments of the model; the means are those over their real tokens.
        measure_on: batches to compare the models on; `batches` when absent.

    Raises:
        ValueError: if there is no batch, if a router saw no token, or if the model is merged already.
    """
    _check_unmerged(model)
    batches = list(batches)
    compared = batches if measure_on is None else list(measure_on)
    if not batches or not compared:
        raise ValueError("merge_by_mean_routing needs at least one batch to read, and one to compare the models on.")
    with evaluation_mode(model):
        gates = _mean_gates(model, batches)
        routed = _predictions(model, compared)  # (N, classes)
        with model.disable_adapter():
            base = _predictions(model, compared)
        _merge(model, gates)
        merged = _predictions(model, compared)
    mean_gates: dict[str, dict[int, list[float]]] = {}
    for (adapter_name, router), mean in gates.items():
        mean_gates.setdefault(adapter_name, {})[router.spec.layer_idx] = mean.tolist()
    return MergeReport(
        tokens=len(routed),
        kl=_divergence(routed, merged),
        kl_without_adapter=_divergence(routed, base),
        same_prediction=(routed.argmax(-1) == merged.argmax(-1)).float().mean().item(),
        max_logit_difference=(routed - merged).abs().max().item(),
        mean_gates=mean_gates,
    )


def _active(model: PeftModel) -> Iterator[tuple[str, MoeLoraLayer, Router]]:
    """Yield every active adapter of every target, and the router that decides there."""
    for layer in tuner_layers(model):
        for adapter_name in layer.active_adapters:
            if adapter_name in layer.experts:
                yield adapter_name, layer, layer.deciding_router(adapter_name)


def _merge(model: PeftModel, gates: Gates) -> None:
    try:
        for adapter_name, layer, router in list(_active(model)):
            layer.merge(adapter_names=[adapter_name], gates={adapter_name: gates[adapter_name, router]})
    except ValueError:
        model.unmerge_adapter()  # of the targets before the one that cannot be merged
        raise


def _check_unmerged(model: PeftModel) -> None:
    if any(layer.merged for layer in tuner_layers(model)):
        raise ValueError("The model is merged already: unmerge_adapter() first.")


def _mean_gates(model: PeftModel, batches: list[dict[str, Any]]) -> Gates:
    """Run the batches and return the mean gates of every router over the real tokens it saw."""
    sums: Gates = {}
    counts: dict[tuple[str, Router], int] = {}

    def record(key: tuple[str, Router], args: tuple[torch.Tensor, RoutingContext], decision: ExpertAssignment) -> None:
        if not isinstance(decision, ExpertAssignment):
            raise ValueError(f"{type(key[1]).__name__} mixes the tokens of a sequence, and has no mean gates.")
        gates = SharedAssignment.of(decision).gates.float()  # (T, E)
        real = gates[args[1].tokens("token_mask", gates.device)]
        sums[key] = sums.get(key, 0) + real.sum(0)
        counts[key] = counts.get(key, 0) + len(real)

    keys = {(adapter_name, router) for adapter_name, _, router in _active(model)}
    handles = [
        key[1].register_forward_hook(lambda router, args, decision, key=key: record(key, args, decision))
        for key in keys
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [adapter_name for adapter_name, router in keys if not counts.get((adapter_name, router))]
    if unseen:
        raise ValueError(f"A router of adapter {unseen[0]!r} saw no token of the batches: give more.")
    return {key: total / counts[key] for key, total in sums.items()}


@torch.no_grad()
def _predictions(model: PeftModel, batches: list[dict[str, Any]]) -> torch.Tensor:
    """Return the logits of all real tokens, or of all rows of a classifier: (N, classes) float32."""
    logits = []
    for batch in batches:
        found = model(**batch).logits.float()
        mask = batch.get("attention_mask")
        logits.append(
            found[mask.bool()] if mask is not None and mask.shape == found.shape[:-1] else found.flatten(0, -2)
        )
    return torch.cat(logits)


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of `found` from `expected`, in nats."""
    return F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean").item()
