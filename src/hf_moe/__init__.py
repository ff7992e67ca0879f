"""Multimodal Mixture-of-Experts models: any decoder, any vision tower, any routing idea, one config field.

Importing the package stays light; the model classes load on first use.
"""

import importlib
from typing import Any

from .configuration import HfMoeConfig, MoeConfig
from .configuration.saving import PACKAGE as _PACKAGE
from .hub import install as _install_bundle
from .version import __version__


_LAZY = {
    "Block": "modeling.block",
    "Connector": "modeling.routing",
    "ExpertAssignment": "modeling.decisions",
    "Experts": "modeling.routing",
    "HfMoeForConditionalGeneration": "modeling.modeling_hf_moe",
    "HfMoeProcessor": "modeling.processing_hf_moe",
    "MoELayerSpec": "modeling.layer_spec",
    "MoeLoraConfig": "adapters",
    "Objective": "modeling.routing",
    "ParameterMixture": "modeling.decisions",
    "Router": "modeling.routing",
    "RoutingContext": "modeling.routing_context",
    "RoutingOverrides": "modeling.overrides",
    "SharedPart": "modeling.routing",
    "SlotMixture": "modeling.decisions",
    "list_systems": "configuration.systems",
    "register": "hub.registration",
    "register_attention": "modeling.registry",
    "register_block": "modeling.registry",
    "register_connector": "modeling.registry",
    "register_experts": "modeling.registry",
    "register_layer": "modeling.registry",
    "register_objective": "modeling.registry",
    "register_router": "modeling.registry",
}

__all__ = ["HfMoeConfig", "MoeConfig", "__version__", "from_system", "list_mechanisms", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_moe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_moe.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def list_mechanisms(kind: str) -> list[str]:
    """Return the names of all mechanisms of a kind, one of `hf_moe.modeling.registry.KINDS`."""
    from .modeling.mechanisms import mechanism_names

    return mechanism_names(kind)


def from_system(key: str, *, host: Any = None, variant: str | None = None, **options: Any) -> Any:
    """Return what a published system builds.

        hf_moe.from_system("moiie", text_config=LlamaConfig(), moe_config={"num_experts": 8})   # an HfMoeConfig
        hf_moe.from_system("moiie", host="Qwen/Qwen2.5-VL-3B-Instruct")                         # that model as a MoE
        hf_moe.from_system("mixlora", r=16)                                                     # a MoeLoraConfig
        hf_moe.from_system("mixlora", host=model)                                               # a PeftModel

    Args:
        key (`str`): a key of `hf-moe list systems`, or an alias.
        host (`PreTrainedModel`, `str`, `Path` or `dict`, *optional*): the model that the system is built on; a system
            of adapters takes a loaded one. Its config when absent.
        variant (`str`, *optional*): which of the system's variants; the first one when absent.
        options: further arguments of [`from_host`], [`HfMoeConfig`] or [`MoeLoraConfig`].

    Raises:
        ValueError: if no record has that key, or the system is neither a model nor an adapter.
    """
    from .configuration.systems import load_system

    record = load_system(key)
    if record.adapter is not None:
        from peft import get_peft_model

        from .adapters import MoeLoraConfig

        config = MoeLoraConfig.from_system(key, variant=variant, **options)
        return config if host is None else get_peft_model(host, config)
    if host is None:
        return HfMoeConfig.from_system(key, variant=variant, **options)
    from .construction.in_place import from_host

    if variant is not None:
        options["moe_config"] = record.fields("model", variant, options.get("moe_config"))
    return from_host(host, system=key, **options)


def _from_host(host: Any, **options: Any) -> Any:
    from .construction.in_place import from_host

    return from_host(host, **options)


_install_bundle()
_PACKAGE.from_host = _from_host
