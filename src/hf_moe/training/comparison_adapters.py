"""Adapters in a comparison: the LoRA experts of systems on one frozen base, as many active parameters in each.

The rank of the experts is fitted, and `lora_alpha` moves with it, so that the scaling stays that of the system. What
works on a token is counted target by target: every expert by the share of tokens that used it, routers in full.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..adapters.layer import MoeLoraLayer, tuner_layers
from ..adapters.targets import ParamWrapper
from ..analysis.experts import mean_loss
from ..analysis.routing_statistics import RoutingStatistics
from ..configuration.configuration_hf_moe import MODALITIES
from ..data import VisionLanguageCollator
from ..evaluation.vqa import batches
from ..modeling.evaluation_mode import evaluation_mode
from .adapter import AdapterJob
from .checks import named
from .comparison_run import COUNTED_ROWS, Watch, kept_of, mean_active
from .job import autocast
from .parts import refuse_strayed
from .sections import Recipe


def build_adapter(recipe: Recipe, rows: dict[str, Any], folder: Path) -> AdapterJob:
    """Return the job of a contestant with its model, as `hf-moe train` begins it."""
    set_seed(recipe.seed)
    job = AdapterJob(recipe, rows, folder)
    job.build()
    return job


def collator_of(job: AdapterJob) -> VisionLanguageCollator:
    """Return what makes batches of a job's rows."""
    return VisionLanguageCollator(job.processor, feature_cache=job.features, conditions=job.conditions)


@contextmanager
def watched_routing(model: Any) -> Iterator[RoutingStatistics]:
    """Collect what the routers of the active adapter do in every forward pass of the context."""
    statistics = RoutingStatistics()

    def note(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        statistics.update(kwargs["moe_lora_context"].of(model.active_adapter))

    hook = model.get_base_model().register_forward_hook(note, with_kwargs=True)
    try:
        yield statistics
    finally:
        hook.remove()


@torch.no_grad()
def collect_adapter_routing(job: AdapterJob, rows: Any) -> RoutingStatistics:
    """Return what the routers do on rows, answers included."""
    size = job.recipe.evaluation.get("batch_size", 64)
    with evaluation_mode(job.model), watched_routing(job.model) as statistics:
        with autocast(job.model, job.recipe.evaluation):
            for batch in map(collator_of(job), batches(rows, size)):
                job.model(**{name: value for name, value in batch.items() if name != "labels"})
    return statistics


def active_adapter_parameters(model: Any, statistics: RoutingStatistics) -> dict[str, int]:
    """Return the parameters of the active adapter that work on an average token of each modality that was seen.

    Raises:
        ValueError: if it has experts whose use is not known.
    """
    total = torch.zeros(len(MODALITIES), dtype=torch.float64)
    for layer in tuner_layers(model):
        total += _active_in(layer, model.active_adapter, statistics)
    seen = statistics.seen.tolist()
    return {name: round(float(total[row])) for row, name in enumerate(MODALITIES) if seen[row] > 0}


def _active_in(layer: MoeLoraLayer, adapter: str, statistics: RoutingStatistics) -> torch.Tensor:
    """Return the parameters at work in one target, (NUM_MODALITIES,)."""
    router, kind = layer.deciding_router(adapter), layer.experts[adapter]
    site = router.spec.site
    if isinstance(layer, ParamWrapper) or site not in statistics.tokens:
        raise ValueError(
            f"it has experts on {layer.key[adapter]}, whose use by a token is not counted: choose linear layers of "
            "the decoder in target_modules."
        )
    tensors = {name: getattr(layer, f"moe_lora_{name}")(adapter) for name in layer.containers[adapter]}
    parts = [kind.target.split(name, tensor) for name, tensor in tensors.items()]
    if kind.own_parameters:
        sizes = [float(sum(part.numel() for part in expert)) for expert in zip(*parts, strict=True)]
        runs = statistics.runs(site) / statistics.tokens[site].clamp(min=1)[:, None]  # (NUM_MODALITIES, E)
        total = runs @ torch.tensor(sizes, dtype=torch.float64)
    else:
        total = torch.full((len(MODALITIES),), float(sum(tensor.numel() for tensor in tensors.values())))
    for shared in (layer.moe_lora_shared_A, layer.moe_lora_shared_B):
        total = total + (shared(adapter).numel() if adapter in shared else 0)
    if adapter in layer.moe_lora_router:
        own = layer.moe_lora_router[adapter]
        total = total + sum(parameter.numel() for parameter in own.parameters()) - own.idle_parameters()
    return total


def experts_per_router(statistics: RoutingStatistics, names: Iterable[str]) -> dict[str, float]:
    """Return, by modality, how many experts a router gives a mean token, as a mean over the routers."""
    found = {}
    for name in names:
        row = MODALITIES.index(name)
        values = [float(statistics.active_experts(site)[row]) for site, n in statistics.tokens.items() if n[row] > 0]
        found[name] = sum(values) / len(values)
    return found


def fit_adapter(
    recipe: Recipe, rows: dict[str, Any], folder: Path, target: float | None, tolerance: float, fixed: bool
) -> dict[str, Any]:
    """Return the facts of a contestant, with the rank at which `target` parameters are active on a mean token.

    Args:
        target: of the first system; `None` for that itself.
        fixed: keep the rank that there is.

    Raises:
        ValueError: if the active parameters cannot be counted, or not be brought near enough.
    """
    with named("its adapter on this recipe"):
        job = build_adapter(recipe, rows, folder)
    with named("its routing on this recipe"):
        statistics = collect_adapter_routing(job, rows["eval"].take(COUNTED_ROWS))
    config = job.model.peft_config[job.model.active_adapter]
    rank, sizes = config.r, {}
    active = active_adapter_parameters(job.model, statistics)
    if not fixed and target is not None:
        if not isinstance(rank, int) or config.rank_pattern or config.target_overrides:
            raise ValueError("its experts are not of one rank, which could be fitted to the first system's.")

        def at(rank: int) -> dict[str, int]:
            nonlocal job, sizes
            sizes = {"adapter": {"r": rank, "lora_alpha": config.lora_alpha * rank / config.r}}
            with named(f"its adapter with experts of rank {rank}"):
                job = build_adapter(with_rank(recipe, sizes), rows, folder)
            return active_adapter_parameters(job.model, statistics)

        here = mean_active(active, statistics)
        slope = (mean_active(at(2 * rank), statistics) - here) / rank
        if slope <= 0:
            raise ValueError("its experts have no rank, which could be fitted to the first system's.")
        rank = max(1, round(rank + (target - here) / slope))
        active = at(rank)
        reached = mean_active(active, statistics) / target
        if abs(reached - 1) > tolerance:
            raise ValueError(
                f"with experts of rank {rank} its active parameters are {reached:.3f} times {target:,.0f}, those of "
                "the first system: allow it by --tolerance, or choose its sizes by --set-for."
            )
    layers = [layer.layer_name[job.model.active_adapter] for layer in tuner_layers(job.model)]
    return {
        "layers": sorted({int(name.rpartition(".")[2]) for name in layers if name is not None}),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok or config.num_experts,
        "width": rank,
        "sizes": sizes,
        "active": active,
        "mean_active": mean_active(active, statistics),
    }


def with_rank(recipe: Recipe, sizes: dict[str, Any]) -> Recipe:
    """Return a recipe whose adapter has the fields of `sizes`."""
    return replace(recipe, adapter={**(recipe.adapter or {}), **sizes.get("adapter", {})})


def initial_adapter(recipe: Recipe, rows: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Return the trained parameters from which the adapters of a seed start, see [`take_adapter`]."""
    model = build_adapter(recipe, rows, folder).model
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def take_adapter(model: Any, start: dict[str, torch.Tensor]) -> dict[str, dict[str, int]]:
    """Give an adapter the values that it shares with the first system's, and return how many of each part do.

    Returns:
        `base`, `experts` and `routers` -> `equal` and `own`, numbers of parameters; the base is one and frozen.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = "routers" if "moe_lora_router" in name else "experts" if parameter.requires_grad else "base"
        known = start.get(name)
        equal = part == "base" or (part == "experts" and known is not None and known.shape == parameter.shape)
        if equal and known is not None:
            parameter.copy_(known)
        counts.setdefault(part, {"equal": 0, "own": 0})["equal" if equal else "own"] += parameter.numel()
    return counts


def train_adapter(
    recipe: Recipe, rows: dict[str, Any], folder: Path, start: dict[str, torch.Tensor], progress: Any
) -> dict[str, Any]:
    """Train an adapter from a given start, score it, and return what is kept of the run."""
    job = build_adapter(recipe, rows, folder)
    shared = take_adapter(job.model, start)
    watch = Watch(progress, recipe.training.get("gradient_accumulation_steps", 1))
    with watch.of(job.model):
        record = job.train(resume=False)
    refuse_strayed(record["strayed"])
    report = job.score(rows["eval"])
    statistics = collect_adapter_routing(job, rows["eval"])
    with autocast(job.model, recipe.evaluation):
        size = recipe.evaluation.get("batch_size", 64)
        loss = mean_loss(job.model, map(collator_of(job), batches(rows["eval"], size)))
    active = active_adapter_parameters(job.model, statistics)
    return {
        **kept_of(report, record, watch, statistics),
        "base_accuracy": report["base_accuracy"],
        "loss": loss,
        "active": active,
        "mean_active": mean_active(active, statistics),
        "experts_per_token": experts_per_router(statistics, active),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad),
        "start": shared,
    }
