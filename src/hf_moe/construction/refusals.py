"""Models that cannot become a MoE in place: why, and what to take instead."""

import difflib
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from ..configuration import HfMoeConfig
from ..modeling.modeling_hf_moe import HEADS, host_model_class
from .refused_hosts import REFUSED


def host_config_class(model_type: Any) -> Any:
    """Return the config class of a type of model.

    Raises:
        ValueError: if it is this library's, or Transformers knows no such type, with the nearest.
    """
    if model_type == HfMoeConfig.model_type:
        raise ValueError(
            "This model is a MoE of this library already: load it with HfMoeForConditionalGeneration.from_pretrained, "
            "and give it another router with hf_moe.construction.conversion.convert_router."
        )
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), [kind for names in HEADS for kind in names], n=3)
        raise ValueError(
            f"model_type={model_type!r} is no type of model that Transformers has"
            f"{', and ' + ', '.join(near) + ' are near' if near else ''}: its own code is what becomes a MoE."
        )
    return CONFIG_MAPPING[model_type]


def host_class_of(config: PreTrainedConfig) -> Any:
    """Return the class with a language head that a checkpoint's config leads to.

    Raises:
        ValueError: if the model cannot become a MoE, with what can.
    """
    refuse_host(config)
    named = next(iter(config.architectures or ()), None)
    if named is None and not any(config.model_type in names for names in HEADS):
        raise ValueError(
            f"{config.model_type} has no language head in Transformers. Take a model that writes text, or name the "
            "class of its head in the config: architectures=['...ForCausalLM']."
        )
    return host_model_class(SimpleNamespace(host_type=config.model_type, host_class=named))


def refuse_host(config: PreTrainedConfig) -> None:
    """Refuse a model whose config, not that of its decoder, tells that it cannot become a MoE.

    Raises:
        ValueError: with the reason and what to take instead.
    """
    kind = config.model_type
    host_config_class(kind)
    if kind in REFUSED:
        raise ValueError(REFUSED[kind].message(kind))
    if "thinker_config" in config.sub_configs:
        thinker = f"{type(config).__name__.removesuffix('Config')}ThinkerForConditionalGeneration"
        raise ValueError(
            f"A whole {kind} answers in speech with a second decoder, and has no single one to become a MoE. Take the "
            f"part that hears, sees and writes: from_host({thinker}.from_pretrained(...))."
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"{kind} is an encoder-decoder, and the MoE layers are those of a decoder that reads text and features in "
            "one sequence. Take a model of that kind, such as Qwen2.5-VL or Gemma 3."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The weights of this model are quantised, and experts are copied from plain ones. Take the checkpoint in "
            "bfloat16, or load this one with dequantize=True where its method has that option."
        )


def refuse_loaded(host: PreTrainedModel) -> None:
    """Refuse a loaded model that cannot become a MoE as it stands.

    Raises:
        ValueError: with the reason and what to take instead.
    """
    refuse_host(host.config)
    name, known = type(host).__name__, None
    if host.can_generate():
        known = host_model_class(SimpleNamespace(host_type=host.config.model_type, host_class=name))
    if known is None:
        raise ValueError(f"{name} has no language head: load the model with the class of its kind that has one.")
    if known is not type(host):
        raise ValueError(f"{name} is not the class of that name in Transformers, whose code the MoE would run.")
    elsewhere = [key for key, tensor in host.named_parameters() if tensor.is_meta]
    if elsewhere or len(set((getattr(host, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(f"The weights of this {name} are spread over devices or disk: load it on one device.")
