"""Configuration of a multimodal Mixture-of-Experts model.

The classes here are plain data: they open with `AutoConfig` alone and import no mechanism. Names of mechanisms and
their options are checked when the model is built, where the classes that understand them are at hand.
"""

import copy
import difflib
import importlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import CONFIG_MAPPING
from transformers.utils import logging

from .checks import Interval, strict, unknown_name_message, within
from .composed_config import ComposedConfig
from .moe_config import MoeConfig, take_copies, unknown_fields
from .reading import check_config, check_files
from .saving import save_with_package


logger = logging.get_logger(__name__)


# Raised when a field changes its meaning; a checkpoint of a newer format is refused with a clear error.
CONFIG_FORMAT = 1

# The values of Transformers' `mm_token_type_ids`, in order.
MODALITIES = ("text", "image", "video", "audio")

# The places of MoE layers outside of the decoder -> the field with theirs.
PLACE_FIELDS = {
    "vision": "vision_moe_config",
    "audio": "audio_moe_config",
    "connector": "connector_moe_config",
}

# Fields that TRL, vLLM and others look for in a decoder's config.
CONTRACT_FIELDS = ("output_router_logits", "router_aux_loss_coef", "num_experts", "num_experts_per_tok")

AUTO_MAP = {
    "AutoConfig": "configuration_hf_moe.HfMoeConfig",
    "AutoModel": "modeling_hf_moe.HfMoeForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_hf_moe.HfMoeForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_hf_moe.HfMoeForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_hf_moe.HfMoeForConditionalGeneration",
}


@strict
class HfMoeConfig(PreTrainedConfig):
    r"""
    A host's config, and the MoE layers of its parts. Every field of the host keeps its name and its place.

    The class of a config is made at run time: this one before the host's own. Without a `host_type` the host is put
    together, and the fields are those of [`ComposedConfig`].

    Args:
        host_type (`str`, *optional*):
            The host's `model_type` in Transformers, such as `"qwen2_5_vl"`; `None` for a host that is put together.
        host_class (`str`, *optional*):
            The host's class with a language head, by its name in Transformers. Derived from the type when absent.
        moe_config (`dict` or `MoeConfig`, *optional*):
            See [`MoeConfig`].
        vision_moe_config (`dict` or `MoeConfig`, *optional*):
            The MoE layers of the tower that encodes images and videos; none when absent. Objectives are those of
            `moe_config`.
        audio_moe_config (`dict` or `MoeConfig`, *optional*):
            The same of the tower that encodes sounds.
        connector_moe_config (`dict` or `MoeConfig`, *optional*):
            The MoE layer in the place of the connector's two linear layers; it is layer 0.
        output_router_logits (`bool`, defaults to `False`):
            Return the router logits of every MoE layer, where all layers have one width.
        config_format (`int`, defaults to 1):
            Format of the config; written by the library.
        system (`str`, *optional*):
            The catalogue key that `from_system` took the `moe_config` from.
        hf_moe_version (`str`, *optional*):
            The version of the library that wrote the checkpoint and its code; `transformers_version` is beside it.
        kwargs: the fields of the host's config.

    Raises:
        ValueError: if Transformers knows no such host, or a field is unknown or out of its range.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, LlamaConfig
    >>> from hf_moe import HfMoeConfig

    >>> config = HfMoeConfig.from_system(
    ...     "moiie", text_config=LlamaConfig(), vision_config=CLIPVisionConfig(), image_token_id=31999
    ... )
    ```
    """

    model_type = "hf_moe"
    sub_configs_defaults = {
        "moe_config": MoeConfig,
        **{name: SubConfigSpec(config_class=MoeConfig, optional=True) for name in PLACE_FIELDS.values()},
    }

    host_type: str | None = None
    host_class: str | None = None
    moe_config: dict | PreTrainedConfig | None = None
    vision_moe_config: dict | PreTrainedConfig | None = None
    audio_moe_config: dict | PreTrainedConfig | None = None
    connector_moe_config: dict | PreTrainedConfig | None = None
    output_router_logits: bool = False
    config_format: int = within(Interval(1), default=CONFIG_FORMAT)
    system: str | None = None
    hf_moe_version: str | None = None

    def __new__(cls, *args: Any, host_type: str | None = None, **kwargs: Any) -> Any:
        return object.__new__(hosted_config_class(cls, host_type))

    def __post_init__(self, **kwargs):
        if self.config_format > CONFIG_FORMAT:
            raise ValueError(
                f"This checkpoint has the config format {self.config_format}; this code reads formats up to "
                f"{CONFIG_FORMAT}. Upgrade with: pip install -U hf-moe (or load with trust_remote_code=True, which "
                "runs the code that the checkpoint carries)."
            )
        if self.host_type is None and self.host_class is not None:
            raise ValueError(
                f"host_class={self.host_class!r} is of a host of Transformers: give its host_type too, such as "
                "'qwen2_5_vl', or leave both out."
            )
        kwargs = take_copies(self, kwargs)
        for name in PLACE_FIELDS.values():
            if isinstance(given := getattr(self, name), dict):
                try:
                    setattr(self, name, MoeConfig(**given))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        self._check_names(kwargs)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        self._derive_from_host()
        self._write_contract_fields()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new_hosted_config, (type(self).hf_moe_base, self.host_type), self.__dict__

    def _check_names(self, kwargs: dict[str, Any]) -> None:
        """Refuse arguments that are no fields, with the field that was meant.

        Configs of Transformers take any, and so does a host of its own, but for what is nearly a field of ours.
        """
        known = [item.name for item in fields(self) if not hasattr(PreTrainedConfig, item.name)]
        for name in unknown_fields(kwargs):
            near = difflib.get_close_matches(name, HfMoeConfig.__annotations__, n=1, cutoff=0.85)
            if self.host_type is not None and not near and name not in MoeConfig.__annotations__:
                continue
            message = misplaced(name) or unknown_name_message("field of HfMoeConfig", name, known)
            if self.transformers_version is None:
                raise ValueError(message)
            # Tools write fields of their own into the configs of the models they train, and those must open again.
            if self.host_type is None or name not in CONTRACT_FIELDS:
                logger.warning(f"{message} It is kept as it was found in the saved config.")

    def _derive_from_host(self) -> None:
        """Fill what the host decides. A host that is a MoE itself names its experts; see ecosystem conventions."""
        host, moe = self.get_text_config(decoder=True), self.moe_config
        experts = _first_attribute(host, ("num_experts", "num_local_experts", "n_routed_experts")) or 8
        moe.fill_numbers(experts, _first_attribute(host, ("num_experts_per_tok",)) or 2)
        moe.check_layers(host.num_hidden_layers)
        for name in PLACE_FIELDS.values():
            tower = getattr(self, name)
            if tower is None:
                continue
            if tower.objectives or tower.token_balanced_loss:
                raise ValueError(
                    f"{name} holds objectives, and those of all MoE layers are in moe_config.objectives: move them."
                )
            if tower.attention_blocks is not None:
                raise ValueError(
                    f"{name}.attention_blocks={tower.attention_blocks!r} is of the decoder, whose attention is "
                    "causal: set moe_config.attention_blocks."
                )
            # How many layers a tower has is known when it is built: its config need not tell.
            tower.fill_numbers(8, 2)

    def _write_contract_fields(self) -> None:
        """Write the fields that TRL, vLLM and others look for, where the host has none of that name.

        On a host that is a MoE the same names decide what the host builds, so they are left alone. A model
        without a MoE layer counts no experts.
        """
        host = self.get_text_config(decoder=True)
        for name, value in {"output_router_logits": self.output_router_logits, "router_aux_loss_coef": 0.0}.items():
            if not hasattr(host, name):
                setattr(host, name, value)
        own = {*(item.name for item in fields(host)), *host.attribute_map}
        for name in ("num_experts", "num_experts_per_tok"):
            value = getattr(self.moe_config, name)
            if name not in own and self.moe_layers() and isinstance(value, int):
                setattr(host, name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config of a file; `kwargs` override its fields, those of a part where a part is given as a dict.

        Raises:
            ValueError: if the file holds no object, or an override is a field of `moe_config`, or nearly the name of a
                field.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"config.json must hold an object of fields, got a {type(config_dict).__name__}.")
        hosted = hosted_config_class(cls, config_dict.get("host_type"))
        known = [item.name for item in fields(hosted)]
        for name in set(kwargs) - set(config_dict) - set(known):
            message = misplaced(name)
            if message is None and difflib.get_close_matches(name, known, n=1, cutoff=0.85):
                message = unknown_name_message("field of HfMoeConfig", name, known)
            if message is not None:
                raise ValueError(message)
        # Merged before anything is derived from them.
        config_dict = copy.deepcopy(config_dict)
        for name in hosted.sub_configs_defaults:
            if isinstance(kwargs.get(name), dict) and isinstance(config_dict.get(name), dict):
                config_dict[name] |= kwargs.pop(name)
        return super().from_dict(config_dict, **kwargs)

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """What `Trainer` leaves out of predictions: `compute_metrics` gets the logits alone."""
        # Transformers names the fields, which depend on its version and on the host.
        outputs = importlib.import_module("transformers.modeling_outputs")
        base = getattr(outputs, "MultimodalMoeCausalLMOutputWithPast", outputs.MoeCausalLMOutputWithPast)
        host = getattr(importlib.import_module("transformers"), self.host_class or "", None)
        hosted = [] if host is None else get_args(get_type_hints(host.forward).get("return"))
        theirs = {item.name for output in (base, *filter(is_dataclass, hosted)) for item in fields(output)}
        return sorted(theirs - {"loss", "logits"} | {"image_hidden_states", "objective_values", "routing"})

    @classmethod
    def on_host(cls, host: PreTrainedConfig, host_class: str | None = None, **kwargs: Any) -> "HfMoeConfig":
        """Return the config of a host with MoE layers.

        Args:
            host: the host's own config, which is copied.
            host_class: the host's class with a language head; what the config or Transformers name when absent.
            kwargs: `moe_config`, `system` and the other fields of this class.
        """
        given = host.to_dict()
        given |= {name: copy.deepcopy(getattr(host, name)) for name in host.sub_configs if getattr(host, name, None)}
        for name in ("model_type", "architectures", "transformers_version", "auto_map"):
            given.pop(name, None)
        if isinstance(host, ComposedConfig):
            return cls(**{**given, **kwargs})
        named = host_class or next(iter(host.architectures or ()), None)
        return cls(host_type=host.model_type, host_class=named, **{**given, **kwargs})

    @classmethod
    def from_system(cls, key: str, *, variant: str | None = None, **kwargs: Any) -> "HfMoeConfig":
        """Build a config whose `moe_config` comes from the record of a system.

        Args:
            key (`str`):
                A key of `hf_moe.list_systems("model")`, for example `"moiie"`.
            variant (`str`, *optional*):
                Which of the system's variants; the first one when absent.
            kwargs:
                Further fields of the config. Entries of `moe_config` are merged with those of the record, see
                [`merge_fields`]; of a `MoeConfig`, the fields that differ from their defaults.

        Raises:
            ValueError: if no record has that key, or it is no model's.
        """
        try:
            systems = importlib.import_module("hf_moe.configuration.systems")
        except ImportError as error:
            raise ImportError("The records live in the package, not in a checkpoint: pip install hf-moe") from error
        record = systems.load_system(key)
        overrides = kwargs.pop("moe_config", None) or {}
        if getattr(overrides, "model_type", None) == MoeConfig.model_type:
            default = MoeConfig()
            fields = {name: getattr(overrides, name) for name in MoeConfig.__annotations__}
            overrides = {name: value for name, value in fields.items() if value != getattr(default, name)}
        if not isinstance(overrides, dict):
            raise ValueError(f"moe_config={overrides!r} must be a dict of fields, or a MoeConfig.")
        moe_config = record.fields("model", variant, overrides)
        kwargs |= record.place_fields({name: kwargs.get(name) for name in PLACE_FIELDS.values()})
        return cls(**{"system": record.key, **record.config, **kwargs}, moe_config=moe_config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "HfMoeConfig":
        check_files(pretrained_model_name_or_path, ())
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_config(folder / "config.json")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, KeyError, TypeError, StrictDataclassFieldValidationError) as error:
            raise ValueError(f"The config.json of {pretrained_model_name_or_path} cannot be read: {error}") from error

    def moe_layers(self) -> list[int]:
        """Return the indices of the MoE layers."""
        return self.moe_config.moe_layers(self.get_text_config(decoder=True).num_hidden_layers)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        return save_with_package(self, super().save_pretrained, save_directory, push_to_hub, kwargs)


_HOSTED: dict[tuple[type, str | None], type] = {}
_HOOKS: list[Callable[[type], None]] = []


def hosted_config_class(cls: Any, host_type: str | None) -> Any:
    """Return the subclass of an `HfMoeConfig` that is a config of the host as well.

    Raises:
        ValueError: if Transformers has no such type of model.
    """
    if hasattr(cls, "hf_moe_base"):
        return cls
    if (cls, host_type) not in _HOSTED:
        _HOSTED[cls, host_type] = _make_hosted_config_class(cls, host_type)
    return _HOSTED[cls, host_type]


def _make_hosted_config_class(cls: Any, host_type: str | None) -> Any:
    if host_type is None:
        host: Any = ComposedConfig
    elif host_type in CONFIG_MAPPING:
        host = CONFIG_MAPPING[host_type]
    else:
        raise ValueError(unknown_name_message("host_type", host_type, list(CONFIG_MAPPING)))
    body = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "hf_moe_base": cls,
        "sub_configs_defaults": {**host.sub_configs_defaults, **cls.sub_configs_defaults},
    }
    hosted: Any = strict(type(cls.__name__, (cls, host), body))
    for hook in _HOOKS:
        hook(hosted)
    return hosted


def on_config_class(hook: Callable[[type], None]) -> None:
    """Call `hook` with every class of configs that was or will be made for a host.

    The Auto classes find a class that is registered itself, and not by its base.
    """
    _HOOKS.append(hook)
    for hosted in _HOSTED.values():
        hook(hosted)


def _new_hosted_config(cls: type, host_type: str | None) -> Any:
    return object.__new__(hosted_config_class(cls, host_type))


def misplaced(name: str) -> str | None:
    """Return the text of an error about a field of the `moe_config` that was given beside it, if it is one."""
    if name not in MoeConfig.__annotations__:
        return None
    return f"{name!r} is a field of moe_config: set moe_config.{name}, with moe_config={{{name!r}: ...}}."


def _first_attribute(config: PreTrainedConfig, names: tuple[str, ...]) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


__all__ = ["ComposedConfig", "HfMoeConfig", "MoeConfig"]
