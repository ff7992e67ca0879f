"""A model of Transformers as a MoE, in place: every tensor but those of its feed-forwards stays what it is.

The MoE is made without memory, as a subclass of the host's own class, and takes over the host's tensors by their
names. Its feed-forwards follow one layer at a time: each is let go before the next layer's experts exist, so that host
and MoE are never both whole in memory.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration import HfMoeConfig
from ..modeling.block import Block
from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.initialisation import initializer_std
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.replacement import Replacement
from .adoption import hand_over_block
from .block_checks import check_block, check_expert
from .conversion import convert_router, set_objectives
from .expert_sources import ExpertSource, build_source, feed_forward_state, fill_layer
from .gate_forms import starting_options
from .generation import savable
from .host_plan import HostPlan, plan_host
from .materialisation import check_materialised, empty_model, materialise
from .moe_blocks import BlockReading
from .pretrained import load_host
from .refusals import host_class_of, host_config_class, refuse_loaded
from .step_zero import StepZero, compare_at_step_zero, condition_of_blocks, logit_difference, random_text, tolerance


def from_host(
    host: PreTrainedModel | str | Path | Mapping[str, Any],
    *,
    system: str | None = None,
    moe_config: Mapping[str, Any] | None = None,
    source: str | Mapping[str, Any] | None = None,
    seed: int = 0,
    noise: float = 0.0,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    on_check: Callable[[StepZero], None] | None = None,
    vision_moe_config: Mapping[str, Any] | None = None,
    audio_moe_config: Mapping[str, Any] | None = None,
    connector_moe_config: Mapping[str, Any] | None = None,
) -> HfMoeForConditionalGeneration:
    """Return a model of Transformers as a MoE, in evaluation mode.

    The experts of a dense host start as copies of its feed-forwards. Attention, embeddings, head and all else are the
    host's, and so are the inputs, the processor and generation. Experts of towers and connectors start as copies too.

        model = HfMoeForConditionalGeneration.from_host("Qwen/Qwen2.5-VL-3B-Instruct", system="moiie")

    Args:
        host: a loaded model with a language head, which is left as it is and whose tensors are copied; a Hub id or
            folder, of which nothing is in memory twice; or the fields of a config with `model_type`, which gives a
            fresh model.
        system: a key of `hf_moe.list_systems()`; `"top_k"` for a dense host when absent.
        moe_config: fields that override the system's.
        source: what the experts of a dense host are made of: a name of `construction/sources/`, or `{name: ...}` with
            its options. That of the system when absent, else `"copies"`.
        seed: of everything that is drawn at random.
        noise: on the experts, relative to the standard deviation of each matrix.
        dtype: of the weights of a host that is loaded here, its own when absent; routers are float32.
        revision: branch, tag or commit of a repository on the Hub.
        on_check: called with the comparison with the host's own logits, where it had weights.
        vision_moe_config, audio_moe_config, connector_moe_config: see [`HfMoeConfig`]; fields that override the
            system's, which may leave these parts as they are.

    Raises:
        ValueError: if the host cannot become a MoE, or would compute something else as one.
    """
    places = {
        "vision_moe_config": vision_moe_config,
        "audio_moe_config": audio_moe_config,
        "connector_moe_config": connector_moe_config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(host, Mapping):
            options = dict(host)
            config = host_config_class(options.pop("model_type", None))(**options)
            plan = plan_host(empty_model(host_class_of(config), config), system, moe_config, places)
            model = HfMoeForConditionalGeneration._from_config(plan.config, dtype=dtype or torch.float32).eval()
            for block in model.moe_blocks().values():
                block.gate.float()
            if plan.readings:
                _convert(model, plan, seed)
            return model
        keep = isinstance(host, PreTrainedModel)
        if not isinstance(host, PreTrainedModel):
            host = load_host(host, dtype, revision)
        elif dtype is not None:
            raise ValueError("dtype is of a host that is loaded here: convert a loaded one with host.to(dtype).")
        refuse_loaded(host)
        plan = plan_host(host, system, moe_config, places, source)
        return become_moe(host, plan, build_source(plan.source, seed, noise), keep, seed, on_check)


def become_moe(
    host: PreTrainedModel,
    plan: HostPlan,
    source: ExpertSource,
    keep: bool,
    seed: int,
    on_check: Callable[[StepZero], None] | None,
) -> Any:
    """Return a loaded host as a MoE, see [`from_host`]; its feed-forwards are taken away where `keep` is false."""
    model, inputs, reference = _around(host, plan.config, keep)
    feed_forwards = {path: host.get_submodule(path) for path in paths_of(model, Block)}
    if not keep:  # else they would stay in memory
        for path in feed_forwards:
            parent, _, name = path.rpartition(".")
            delattr(host.get_submodule(parent), name)
    # Some replacements change what a layer computes by design.
    replaced = paths_of(model, Replacement).values()
    same_layers = not any(part.is_added or part.changes_layer for part in replaced)
    if same_layers:
        _check_host(model, feed_forwards, inputs, reference)
    exact = _replace_feed_forwards(model, feed_forwards, plan, source, keep) and same_layers
    check_materialised(model)
    check = compare_at_step_zero(model, inputs, reference, exact, adopted=bool(plan.readings))
    if plan.readings:
        equal = _convert(model, plan, seed)
        check = compare_at_step_zero(model, inputs, reference, exact and equal, adopted=True)
    if on_check is not None:
        on_check(check)
    return model


def _convert(model: Any, plan: HostPlan, seed: int) -> bool:
    """Give an adopted model the routers and the objectives that were asked for, and return whether it stays equal."""
    equal, system = True, model.config.system
    if plan.router is not None:
        layers = model.moe_layers().values()
        # What the host's gate needs of the router goes before what the system would choose for a fresh one.
        needed = {name for layer in layers for name in starting_options(plan.router, layer.router, layer.spec)}
        equal = bool(needed) and needed.isdisjoint(plan.options)
        options = {name: value for name, value in plan.defaults.items() if name not in needed} | plan.options
        convert_router(model, plan.router, seed=seed, **options)
        model.config.system = system
    set_objectives(model, plan.objectives)
    return equal


def _around(
    host: PreTrainedModel, config: HfMoeConfig, keep: bool
) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """Return the MoE with a host's tensors, copied where it is to keep them, and inputs with the host's logits."""
    inputs = random_text(host)
    with torch.no_grad(), evaluation_mode(host):
        reference = host(**inputs).logits.float()
    parts = {"": host.config} | {name: getattr(host.config, name, None) for name in host.config.sub_configs}
    attention = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    model = empty_model(HfMoeForConditionalGeneration, config, host.dtype, attention)
    take_over(model, host, keep)
    for path, module in paths_of(model, Replacement).items():
        materialise(module, initializer_std(config), host.device)
        if not module.is_added:
            module.start_from(host.get_submodule(path))
    model.generation_config = savable(deepcopy(host.generation_config))
    return model.eval(), inputs, reference


@torch.no_grad()
def take_over(model: Any, host: PreTrainedModel, keep: bool) -> None:
    """Give a MoE on the meta device the host's tensors, all but those of its MoE layers, replacements and objectives.

    They are copied where the host is to `keep` them; tied ones stay tied.
    """
    taken: dict[int, torch.Tensor] = {}

    def take(tensor: Any) -> Any:
        if keep and isinstance(tensor, torch.Tensor) and id(tensor) not in taken:
            taken[id(tensor)] = deepcopy(tensor)
        return taken.get(id(tensor), tensor)

    shared = model.base_model.shared_routing
    outside = (*model.moe_blocks().values(), *paths_of(model, Replacement).values(), model.objectives, shared)
    own = {id(part) for module in outside for part in module.modules()}
    theirs = dict(host.named_modules(remove_duplicate=False))
    for path, module in model.named_modules():
        if id(module) in own:
            continue
        source = theirs.get(path, nn.Module())
        for kind in ("_parameters", "_buffers"):
            ours, given = vars(module)[kind], vars(source)[kind]
            if _shapes(ours) != _shapes(given):
                raise ValueError(
                    f"{type(host).__name__} cannot become a MoE: its {path or 'root'} holds {_shapes(given)}, and its "
                    f"class {_shapes(ours)}. Load it anew, without what was added to it."
                )
            ours |= {name: take(tensor) for name, tensor in given.items()}


def _shapes(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}


@torch.no_grad()
def _replace_feed_forwards(
    model: Any, feed_forwards: dict[str, nn.Module], plan: HostPlan, source: ExpertSource, keep: bool
) -> bool:
    """Fill the MoE layers of a model from the feed-forwards at their paths, which are let go one by one.

    Returns:
        Whether every layer computes what the feed-forward did, if its router hands over whole tokens.
    """
    std = initializer_std(model.config)
    materialise(model.objectives, std, model.device)
    materialise(model.base_model.shared_routing, std, model.device)
    exact = True
    for path, layer in paths_of(model, Block).items():
        ffn = feed_forwards.pop(path)
        if not layer.spec.place and layer.layer_idx in plan.readings:
            equal = _adopt(layer, ffn, plan.readings[layer.layer_idx], keep, std)
        else:
            check_expert(model, layer, ffn)
            materialise(layer, std, next(ffn.parameters()).device)
            equal = fill_layer(layer, [feed_forward_state(ffn)], source)
        layer.gate.float()
        exact = exact and equal
    return exact


def _adopt(layer: Block, block: nn.Module, reading: BlockReading, keep: bool, std: float) -> bool:
    """Fill a MoE layer from a host's MoE block, and return whether it computes the same: with as many slots."""
    hand_over_block(layer, block, reading, std)
    if keep:
        for parameter in layer.parameters():
            parameter.data = parameter.detach().clone()
    if layer.residual_mix is not None:
        materialise(layer.residual_mix, std)
    layer.to(next(block.parameters()).device)
    if layer.spec.num_experts_per_tok != reading.fields["num_experts_per_tok"]:
        return False
    check_block(layer, block, reading.branches)
    return layer.residual_mix is None


def _check_host(
    model: Any, feed_forwards: dict[str, nn.Module], inputs: dict[str, torch.Tensor], reference: torch.Tensor
) -> None:
    """Refuse a host that this library would change, whatever the router does: by its own feed-forwards in the MoE."""
    blocks = paths_of(model, Block)
    conditions = condition_of_blocks(model, len(inputs["input_ids"]))
    try:
        put_modules(model, feed_forwards)
        with torch.no_grad():
            difference = logit_difference(model(**inputs, condition_ids=conditions).logits, reference)
    finally:
        put_modules(model, blocks)
    if difference > tolerance(model.dtype):
        raise ValueError(
            f"{type(model).hf_moe_host.__name__} cannot become a MoE: its own logits differ by {difference:.1e} from "
            "those of its parts in this library's model."
        )


def paths_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """Return the modules of a kind by their paths: MoE layers, say, where the host has its feed-forwards."""
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the places of a model that their paths name."""
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
