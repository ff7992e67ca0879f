"""What a host has under another name than a list of targets gives it.

Transformers stores the feed-forwards of a MoE host as stacks, whose `gate_up_proj` holds what lists of targets, and
PEFT's LoRA, call `gate_proj` and `up_proj`; some decoders fuse linear layers. A published system is only itself with
all of its targets: what a host lacks of them is refused.
"""

import re
import warnings
from collections.abc import Iterable
from copy import copy

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .config import MoeLoraConfig
from .hosts import input_name, is_expert_stack
from .layer import tuner_layers


ALL_LINEAR = "all-linear"
# Stacked weight -> what lists of targets call its parts.
STACKED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",), ("w1",)),
    "down_proj": (("down_proj",), ("w2",)),
}
# Linear layer -> what it fuses.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# In decoders with norms before and after each part, the norm whose output the feed-forward reads.
BEFORE_FEED_FORWARD, USUAL_NAME = "pre_feedforward_layernorm", "post_attention_layernorm"


def stacked_targets(model: nn.Module, config: MoeLoraConfig) -> list[str]:
    """Return the names of the stacked weights that `target_modules` means."""
    if not config.target_modules or config.ffn_experts:
        return []
    if config.target_modules == ALL_LINEAR:
        config = copy(config)
        config.target_modules = ".*"
    found = []
    for name, module in model.named_modules():
        if not is_expert_stack(module):
            continue
        place = name.replace(".base_layer", "")
        if config.target_modules == ".*" and not check_target_module_exists(config, place):
            continue  # it is excluded
        for weight in (input_name(module), "down_proj"):
            if check_target_module_exists(config, f"{place}.{weight}") or _all_are_targets(config, place, weight):
                found.append(f"{place}.{weight}")
    return found


def _all_are_targets(config: MoeLoraConfig, place: str, weight: str) -> bool:
    for parts in STACKED[weight]:
        targets = [part for part in parts if check_target_module_exists(config, f"{place}.{part}")]
        if targets and len(targets) < len(parts):
            raise ValueError(
                f"{place}.{weight} holds {' and '.join(parts)} of every expert in one weight, and of these only "
                f"{targets[0]} is a target: name all of them, or leave the experts out with "
                f"exclude_modules={[f'experts.{part}' for part in targets]}."
            )
        if targets:
            return True
    return False


def is_fused_target(model: nn.Module, config: MoeLoraConfig, key: str) -> bool:
    """Whether a module of a published system's host is what the system calls by other names."""
    place, _, name = key.rpartition(".")
    if name == BEFORE_FEED_FORWARD:
        return bool(check_target_module_exists(config, f"{place}.{USUAL_NAME}"))
    if name not in FUSED:
        return False
    module = model.get_submodule(key)
    if not isinstance(getattr(module, "get_base_layer", lambda: module)(), nn.Linear):
        return False
    return all(check_target_module_exists(config, f"{place}.{part}") for part in FUSED[name])


def is_other_norm(model: nn.Module, key: str) -> bool:
    """Whether a module has the name of the norm before the feed-forward, where another one is that."""
    place, _, name = key.rpartition(".")
    return name == USUAL_NAME and hasattr(model.get_submodule(place), BEFORE_FEED_FORWARD)


def check_all_found(model: nn.Module, adapter_name: str, config: MoeLoraConfig, names: Iterable[str]) -> None:
    """Refuse a published system that found some of its targets alone; warn of a list of targets that did."""
    keys = [layer.key[adapter_name] for layer in tuner_layers(model) if adapter_name in layer.experts]
    if config.system is not None:
        names = (*names, *(config.target_parameters or ()))
    missing = [name for name in sorted(names) if not any(_answers(key, name) for key in keys)]
    if not missing:
        return
    if config.system is None:
        warnings.warn(
            f"target_modules: the model has nothing of the name {', '.join(missing)} that is adapted; adapted are "
            f"{', '.join(sorted({key.rpartition('.')[2] for key in keys}))}.",
            stacklevel=3,
        )
        return
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    layers = {
        re.sub(r"\.\d+(?=\.|$)", ".*", name.removesuffix(".base_layer")) for name in linear if "moe_lora_" not in name
    }
    fused = (
        f" alone: {name} holds {', '.join(parts)} in one, and takes the same experts for all"
        for name, parts in FUSED.items()
        if any(key.endswith(f".{name}") for key in layers) and set(parts) & set(missing)
    )
    raise ValueError(
        f"The system {config.system!r} adapts {', '.join(missing)}, and the model has nothing of that name"
        f"{next(fused, '')}. Its linear layers are {', '.join(sorted(layers))}. Name those that are "
        "meant in target_modules, and system=None if it is to be without the others."
    )


def _answers(key: str, name: str) -> bool:
    """Whether a target of this key is what is called `name`."""
    place, _, leaf = key.rpartition(".")
    others = [*FUSED.get(leaf, ()), *(part for parts in STACKED.get(leaf, ()) for part in parts)]
    others += [USUAL_NAME] if leaf == BEFORE_FEED_FORWARD else []
    return any(f".{place}.{other}".endswith(f".{name}") for other in (leaf, *others))
