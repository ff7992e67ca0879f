"""The parts of a multimodal model, found by structure: its decoder, its towers, and the connectors between them.

Transformers' models name their parts as they like and keep connectors where they like: LLaVA's beside the tower,
Qwen2.5-VL's at the end of the tower. What holds for all: the model knows its decoder; what encodes another modality is
a model of its own; and the code of `get_image_features` and its kin uses what serves a modality, in order.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .block import Block
from .inputs import placeholder_ids
from .replacement import Replacement


PARTS = ("tower", "connector", "routers", "experts", "embeddings", "backbone")
ENCODED = ("image", "video", "audio")
# What the tower or connector of each place encodes.
PLACES = {"vision": ("image", "video"), "audio": ("audio",), "connector": ("image", "video")}

# What the layers of a tower are, or else a list of them is.
LAYERS = (GradientCheckpointingLayer, nn.ModuleList)


@dataclass(frozen=True)
class HostParts:
    """Where the parts of a model are: paths of submodules, from the model that was given.

    Attributes:
        decoder: what holds the decoder layers; `""` where that is the model itself.
        towers: what encodes images, videos or sounds.
        connectors: what maps the width of a tower to that of the decoder; some lie in a tower, at its end.
        embeddings: the embeddings of tokens and of positions, and the head.
        moe_layers: the MoE layers, of the decoder, towers and connectors.
        modalities: tower or connector -> those it serves, of [`ENCODED`].
    """

    decoder: str
    towers: tuple[str, ...] = ()
    connectors: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    moe_layers: tuple[str, ...] = ()
    modalities: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def holder(self, name: str) -> str | None:
        """Return the tower or the connector that a module or parameter lies in; `None` outside of them."""
        found = (path for path in (*self.connectors, *self.towers) if _inside(name, path))
        return next(found, None)


def part_of(name: str, parts: HostParts) -> str:
    """Return the part, of [`PARTS`], that a parameter belongs to.

    `routers` are the gates and the residual mixes, `experts` the routed and the shared ones, those of towers and
    connectors too, `embeddings` those of tokens and positions and the head, `backbone` everything else of the decoder.
    A parameter on its own beside the decoder, such as LLaVA-NeXT's `image_newline`, counts as `connector`.
    """
    layer = next((path for path in parts.moe_layers if _inside(name, path)), None)
    if layer is not None:
        inner = name.removeprefix(f"{layer}.").partition(".")[0]
        return "routers" if inner in ("gate", "residual_mix") else "experts"
    if "shared_routing" in name.split("."):
        return "routers"
    holder = parts.holder(name)
    if holder is not None:
        return "connector" if holder in parts.connectors else "tower"
    if any(_inside(name, path) for path in parts.embeddings):
        return "embeddings"
    if _inside(name, parts.decoder) or not (parts.towers or parts.connectors):
        return "backbone"
    return "connector"


def text_decoder(model: nn.Module) -> PreTrainedModel:
    """Return the module that holds the decoder layers of a model, with or without a head and other models."""
    decoder = _root(model)
    while (inner := _inner_decoder(decoder)) is not decoder:
        decoder = inner
    return decoder


def _inner_decoder(model: PreTrainedModel) -> PreTrainedModel:
    if (found := model.get_decoder()) is not model:
        return found
    # A model with a head may name no decoder, as Llama 4's does: its layers are those of the one model in it.
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    has_layers = any(isinstance(child, nn.ModuleList) for child in model.children())
    return model if has_layers or len(inner) != 1 else inner[0]


def host_parts(model: nn.Module) -> HostParts:
    """Return where the parts of a model are.

    A tower is a model with layers beside the decoder. The other neighbours of the decoder are connectors; of a tower
    that none of them serves, the connector is what follows its layers, if that ends at the decoder's width. Where the
    layers of the decoder and the towers lie in one module (Idefics, Phi-4 multimodal), nothing but towers, and what
    stands beside them in a module of their own, is taken out of the decoder.
    """
    root, decoder = _root(model), text_decoder(model)
    base = root.base_model
    paths = {module: name for name, module in model.named_modules()}
    inside = _towers_in_decoder(decoder) if decoder is base else _neighbours(base, decoder)
    towers = [child for child, is_tower in inside if is_tower]
    connectors = [child for child, is_tower in inside if not is_tower]
    served = {paths[child]: _modalities(base, child) for child, _ in inside}
    within = []
    for tower in towers:
        shared = {name for child in connectors for name in served[paths[child]]}
        if shared.isdisjoint(served[paths[tower]]):
            ends = _connector_in(tower, getattr(decoder.config, "hidden_size", None))
            served |= {paths[child]: served[paths[tower]] for child in ends}
            within += ends
    return HostParts(
        decoder=paths[decoder],
        towers=tuple(paths[tower] for tower in towers),
        connectors=tuple(paths[child] for child in (*connectors, *within)),
        embeddings=tuple(paths[module] for module in _embeddings(root, decoder) if module in paths),
        moe_layers=tuple(paths[layer] for layer in _moe_layers(root)),
        modalities=served,
    )


def find_part(model: Any, parts: HostParts, place: str) -> tuple[str, tuple[str, ...]]:
    """Return the path of the one tower or connector of a place, of [`PLACES`], and what it encodes.

    Raises:
        ValueError: if the model has none there, or several, or none whose tokens can be told by placeholders.
    """
    encoded = PLACES[place]
    candidates = parts.connectors if place == "connector" else parts.towers
    served = {path: tuple(name for name in encoded if name in parts.modalities[path]) for path in candidates}
    found = {path: modalities for path, modalities in served.items() if modalities}
    placeholders = sorted(set().union(*placeholder_ids(model.config).values()))
    if len(found) != 1 or not placeholders:
        raise ValueError(
            f"{place}_moe_config needs one part of the host that serves {' or '.join(encoded)}, whose features "
            f"replace placeholders. {type(model).hf_moe_host.__name__} has {' and '.join(found) or 'none'}, and the "
            f"placeholders {placeholders}: leave it out, or choose another host."
        )
    return next(iter(found.items()))


def freeze_towers_in_eval(model: nn.Module) -> None:
    """Put towers that are not trained into eval mode, except connectors and MoE layers in them: the end of `train()`.

    A frozen tower keeps its batch statistics and drops nothing.
    """
    parts = host_parts(model)
    for path in parts.towers:
        tower = model.get_submodule(path)
        ends = [model.get_submodule(item) for item in (*parts.connectors, *parts.moe_layers) if _inside(item, path)]
        connecting = {parameter for end in ends for parameter in end.parameters()}
        if any(p.requires_grad for p in tower.parameters() if p not in connecting):
            continue
        modes = [end.training for end in ends]
        tower.eval()
        for end, mode in zip(ends, modes, strict=True):
            end.train(mode)


def _root(model: nn.Module) -> PreTrainedModel:
    root = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if root is None:
        raise ValueError(f"{type(model).__name__} is no model of Transformers, whose parts are known.")
    return root


def _inside(name: str, path: str) -> bool:
    return not path or f"{name}.".startswith(f"{path}.")


def _holds(module: nn.Module, kinds: type | tuple[type, ...]) -> bool:
    return any(isinstance(item, kinds) for item in module.modules())


def _is_tower(module: nn.Module) -> bool:
    # Molmo2's connector is a `PreTrainedModel` as well, of a pooling and a projection.
    return isinstance(module, PreTrainedModel) and _holds(module, (nn.ModuleList, nn.Sequential))


def _neighbours(base: nn.Module, decoder: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return the modules beside a decoder, and whether each is a tower."""
    # What routers share is a part of none of them.
    known = (decoder, getattr(base, "shared_routing", None))
    children = [child for child in base.children() if all(module not in known for module in child.modules())]
    return [(child, _is_tower(child)) for child in children if any(True for _ in child.parameters())]


def _towers_in_decoder(decoder: PreTrainedModel) -> list[tuple[nn.Module, bool]]:
    """Return the towers among a decoder's own modules, with what stands beside each, and whether it is a tower."""

    def encodes(module: nn.Module) -> bool:
        # Idefics' tower is a plain module with a config of its own.
        own = getattr(module, "config", decoder.config)
        return _is_tower(module) or (type(own) is not type(decoder.config) and _holds(module, nn.ModuleList))

    def walk(module: nn.Module, beside: bool) -> Iterator[tuple[nn.Module, bool]]:
        for child in module.children():
            if encodes(child):
                yield child, True
            elif any(encodes(item) for item in child.modules()):
                yield from walk(child, True)
            elif beside and any(True for _ in child.parameters()):
                yield child, False

    return list(walk(decoder, False))


def _modalities(base: PreTrainedModel, child: nn.Module) -> tuple[str, ...]:
    """Return what a child of the base model encodes, by the code of the base or by what the child declares."""
    name = next((name for name, item in base.named_children() if item is child), None)
    declared = getattr(child, "input_modalities", base.input_modalities)
    by_code = [modality for modality in ENCODED if name in _attributes(type(base), f"get_{modality}_features")]
    return tuple(by_code) or tuple(modality for modality in ENCODED if modality in declared)


def _attributes(cls: type, method: str, known: frozenset[str] = frozenset()) -> list[str]:
    """Return the names that a method's code uses, in the order in which it first does.

    Those of the class's own properties and methods stand in front of their names: Qwen3-Omni's `merger_list` is used
    as `deepstack_merger_list`.
    """
    own = None if hasattr(PreTrainedModel, method) and method != "forward" else getattr(cls, method, None)
    code = getattr(inspect.unwrap(own.fget if isinstance(own, property) else own), "__code__", None)
    if code is None or method in known:
        return []
    found: list[str] = []
    for name in _names(code):
        if name != "forward":
            found += _attributes(cls, name, known | {method})
        found.append(name)
    return list(dict.fromkeys(found))


def _names(code: CodeType) -> list[str]:
    return [*code.co_names, *(name for item in code.co_consts if isinstance(item, CodeType) for name in _names(item))]


def _connector_in(tower: nn.Module, width: int | None) -> list[nn.Module]:
    """Return the children of a tower that project what its layers return to the decoder's width, in their order.

    The order of use is that of the code: modules may be listed in any (Qwen3-Omni lists its mergers first).
    """
    children = dict(tower.named_children())
    used = [name for name in _attributes(type(tower), "forward") if name in children]
    layers = next((name for kind in LAYERS for name, child in children.items() if _holds(child, kind)), None)
    # Where the forward is a call of the parent class's and more, what it names comes after the layers.
    after = used[used.index(layers) + 1 :] if layers in used else used
    widths = {name: _projected(children[name]) for name in after}
    if not any(width in reached for reached in widths.values()):
        return []
    return [children[name] for name, reached in widths.items() if reached]


def _projected(module: nn.Module) -> set[int]:
    """Return the widths to which the linear layers and convolutions of a module project."""
    widths = (getattr(item, name, None) for item in module.modules() for name in ("out_features", "out_channels"))
    return {width for width in widths if isinstance(width, int)}


def _embeddings(root: PreTrainedModel, decoder: PreTrainedModel) -> list[nn.Module]:
    try:
        tokens = decoder.get_input_embeddings()
    except NotImplementedError:  # as in encoders of sounds
        tokens = None
    # Those of positions, and of further kinds; hosts may wrap that of the tokens in a module of theirs.
    others = [child for child in decoder.children() if isinstance(child, nn.Embedding)]
    found = [tokens, *others, root.get_output_embeddings()]
    return list(dict.fromkeys(module for module in found if module is not None))


def _moe_layers(root: nn.Module) -> list[nn.Module]:
    # Asked of the model where it can tell: its code may be the copy in a checkpoint, whose classes are not those here.
    holder = next((module for module in root.modules() if hasattr(module, "moe_layers")), None)
    if holder is None:
        return [module for module in root.modules() if isinstance(module, Block)]
    # Code of before towers had MoE layers knows those of the decoder.
    blocks = getattr(holder, "moe_blocks", holder.moe_layers)().values()
    replacements = [part for part in root.modules() if isinstance(part, Replacement)]
    return [*blocks, *(part for part in replacements if part.holds_experts or part.routers)]
