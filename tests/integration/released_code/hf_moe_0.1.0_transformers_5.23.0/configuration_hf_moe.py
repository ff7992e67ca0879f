# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 0c87989b7e063e8ac15fd00febb57079724ffa3127fc85a28cada36c6d45f492
"""Configuration of a multimodal Mixture-of-Experts model.

The two classes here are plain data: they open with `AutoConfig` alone and import no mechanism. Names of mechanisms and
their options are checked when the model is built, where the classes that understand them are at hand.
"""

import copy
import difflib
import importlib
import inspect
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import AutoConfig
from transformers.utils import logging

from .checks import Interval, strict, unknown_name_message, within
from .layer_maps import is_layer_map, layers_named
from .moe_config import MoeConfig, take_copies, unknown_fields
from .reading import check_config, check_files
from .saving import save_with_hooks


logger = logging.get_logger(__name__)


# Raised when a field changes its meaning; a checkpoint of a newer format is refused with a clear error.
CONFIG_FORMAT = 1

# The values of Transformers' `mm_token_type_ids`, in order.
MODALITIES = ("text", "image", "video", "audio")

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
    A multimodal MoE: a Transformers decoder, a vision tower, a connector, and the MoE layers of the decoder.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any decoder that `AutoModel` knows. A small Llama when absent.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Any vision tower that `AutoModel` knows, timm included. `None` builds a text-only MoE.
        moe_config (`dict` or `MoeConfig`, *optional*):
            See [`MoeConfig`].
        connector (`dict`, defaults to `{"name": "mlp"}`):
            The module between tower and decoder, with its options.
        image_token_id (`int`, *optional*):
            Id of the placeholder that is replaced by image features; needed when there is a vision tower.
        video_token_id, audio_token_id (`int`, *optional*):
            Placeholders of further modalities; only used to tell their tokens apart.
        image_seq_length (`int`, *optional*):
            Placeholders per image. Derived from the tower and the connector when absent.
        vision_feature_layer (`int`, *optional*):
            Index into the tower's hidden states; `None` takes its last hidden state.
        vision_feature_size (`int`, *optional*):
            Width of a feature of the tower. Derived when absent: a tower's type does not always tell.
        vision_prefix_tokens (`int`, *optional*):
            Leading tokens of the tower's output that are no patches (class and register tokens), dropped. Derived
            when absent.
        image_size (`int`, *optional*):
            Side of the square input image in pixels. Derived from the tower's config when absent.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights of connector, routers and experts.
        output_router_logits (`bool`, defaults to `False`):
            Return the router logits of every MoE layer, where all layers have one width.
        tie_word_embeddings (`bool`, defaults to `False`):
            Share the weights of the token embeddings and the head. `True` whenever the decoder's own config says so.
        config_format (`int`, defaults to 1):
            Format of the config; written by the library.
        system (`str`, *optional*):
            The catalogue key that `from_system` took the `moe_config` from.
        hf_moe_version (`str`, *optional*):
            The version of the library that wrote the checkpoint and its code; `transformers_version` is beside it.

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
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="llama",
            init_kwargs={
                "hidden_size": 192,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 6,
            },
        ),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "moe_config": MoeConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    moe_config: dict | PreTrainedConfig | None = None
    connector: dict | str = field(default_factory=lambda: {"name": "mlp"})
    image_token_id: int | None = within(Interval(0))
    video_token_id: int | None = within(Interval(0))
    audio_token_id: int | None = within(Interval(0))
    image_seq_length: int | None = within(Interval(1))
    vision_feature_layer: int | None = None
    vision_feature_size: int | None = within(Interval(1))
    vision_prefix_tokens: int | None = within(Interval(0))
    image_size: int | None = within(Interval(1))
    initializer_range: float | int = within(Interval(0), default=0.02)
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    config_format: int = within(Interval(1), default=CONFIG_FORMAT)
    system: str | None = None
    hf_moe_version: str | None = None

    def __post_init__(self, **kwargs):
        if self.config_format > CONFIG_FORMAT:
            raise ValueError(
                f"This checkpoint has the config format {self.config_format}; this code reads formats up to "
                f"{CONFIG_FORMAT}. Upgrade with: pip install -U hf-moe (or load with trust_remote_code=True, which "
                "runs the code that the checkpoint carries)."
            )
        kwargs = take_copies(self, kwargs)
        self._check_names(kwargs)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        self.connector = {"name": self.connector} if isinstance(self.connector, str) else self.connector
        if not isinstance(self.connector.get("name"), str):
            raise ValueError(f"connector needs a 'name', for example {{'name': 'mlp'}}; got {self.connector!r}.")
        self.tie_word_embeddings = bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)
        if self.image_size is None and self.vision_config is not None:
            size = getattr(self.vision_config, "image_size", None)
            self.image_size = size[0] if isinstance(size, list | tuple) else size
        self._check_placeholders()
        self._derive_from_host()
        self._write_contract_fields()

    def _check_names(self, kwargs: dict[str, Any]) -> None:
        """Refuse arguments that are no fields, with the field that was meant."""
        for name in unknown_fields(kwargs):
            message = misplaced(name) or unknown_name_message(
                "field of HfMoeConfig", name, list(HfMoeConfig.__annotations__)
            )
            if self.transformers_version is None:
                raise ValueError(message)
            # Tools write fields of their own into the configs of the models they train, and those must open again.
            logger.warning(f"{message} It is kept as it was found in the saved config.")

    def _check_placeholders(self) -> None:
        """Refuse a tower without a placeholder, and one placeholder for two modalities."""
        if self.vision_config is not None and self.image_token_id is None:
            raise ValueError(
                "A model with a vision tower needs image_token_id, the id of the placeholder that image features "
                "replace: set it, or leave vision_config out."
            )
        ids = {name: getattr(self, name) for name in ("image_token_id", "video_token_id", "audio_token_id")}
        given = {name: value for name, value in ids.items() if value is not None}
        if len(set(given.values())) < len(given):
            raise ValueError(f"Every modality needs a placeholder of its own, got {given}.")

    def _derive_from_host(self) -> None:
        """Fill what the host decides. A host that is a MoE itself names its experts; see ecosystem conventions."""
        host, moe = self.text_config, self.moe_config
        experts = _first_attribute(host, ("num_experts", "num_local_experts", "n_routed_experts")) or 8
        if moe.num_experts is None:
            moe.num_experts = experts
        elif moe.expert_banks is not None and is_layer_map(moe.num_experts):
            # Layers without banks of their own.
            moe.num_experts = {"default": experts, **moe.num_experts}
        if moe.num_experts_per_tok is None:
            moe.num_experts_per_tok = _first_attribute(host, ("num_experts_per_tok",)) or 2
        # The numbers of experts are derived from the banks.
        for name in ("expert_banks", *MoeConfig.__annotations__):
            outside = {key for key in layers_named(getattr(moe, name)) if key != "default"}
            outside -= {str(index) for index in range(host.num_hidden_layers)}
            if outside:
                raise ValueError(
                    f"moe_config.{name} names the layers {sorted(outside, key=int)}, but the decoder has the layers 0 "
                    f"to {host.num_hidden_layers - 1}."
                )
        for layer in self.moe_layers():
            moe.check_layer(layer)

    def _write_contract_fields(self) -> None:
        """Write the fields that TRL, vLLM and others look for, where the host has none of that name.

        On a host that is a MoE the same names decide what the host builds, so they are left alone. A model
        without a MoE layer counts no experts.
        """
        host = self.text_config
        fields = {"output_router_logits": self.output_router_logits, "router_aux_loss_coef": 0.0}
        for name, value in fields.items():
            if not hasattr(host, name):
                setattr(host, name, value)
        own = {*inspect.signature(type(host)).parameters, *host.attribute_map}
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
        for name in set(kwargs) - set(config_dict):
            near = difflib.get_close_matches(name, cls.__annotations__, n=1, cutoff=0.85)
            message = misplaced(name)
            if message is None and near and name not in cls.__annotations__:
                message = unknown_name_message("field of HfMoeConfig", name, list(cls.__annotations__))
            if message is not None:
                raise ValueError(message)
        # Merged before anything is derived from them.
        config_dict = copy.deepcopy(config_dict)
        for name in cls.sub_configs_defaults:
            if isinstance(kwargs.get(name), dict) and isinstance(config_dict.get(name), dict):
                config_dict[name] |= kwargs.pop(name)
        return super().from_dict(config_dict, **kwargs)

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """What `Trainer` leaves out of predictions: `compute_metrics` gets the logits alone."""
        # Transformers names the fields, which depend on its version; `modeling/outputs.py` has the same base.
        outputs = importlib.import_module("transformers.modeling_outputs")
        base = getattr(outputs, "MultimodalMoeCausalLMOutputWithPast", outputs.MoeCausalLMOutputWithPast)
        theirs = {item.name for item in fields(base)}
        return sorted(theirs - {"loss", "logits"} | {"image_hidden_states", "objective_values", "routing"})

    @classmethod
    def from_system(cls, key: str, **kwargs: Any) -> "HfMoeConfig":
        """Build a config whose `moe_config` comes from the preset of a catalogue key.

        Args:
            key (`str`): a key of `hf_moe.list_systems()`, for example `"moiie"`.
            kwargs: further fields of the config. Entries of `moe_config` override those of the preset; of a
                `MoeConfig`, the fields that differ from their defaults.

        Raises:
            ValueError: if no preset has that key.
        """
        try:
            systems = importlib.import_module("hf_moe.configuration.systems")
        except ImportError as error:
            raise ImportError("The presets live in the package, not in a checkpoint: pip install hf-moe") from error
        preset = systems.load_preset(key)
        overrides = kwargs.pop("moe_config", None) or {}
        if getattr(overrides, "model_type", None) == MoeConfig.model_type:
            default = MoeConfig()
            fields = {name: getattr(overrides, name) for name in MoeConfig.__annotations__}
            overrides = {name: value for name, value in fields.items() if value != getattr(default, name)}
        if not isinstance(overrides, dict):
            raise ValueError(f"moe_config={overrides!r} must be a dict of fields, or a MoeConfig.")
        return cls(moe_config={**preset["moe_config"], **overrides}, system=key, **kwargs)

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
        return self.moe_config.moe_layers(self.text_config.num_hidden_layers)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        return save_with_hooks(self, super().save_pretrained, save_directory, push_to_hub, kwargs)


def misplaced(name: str) -> str | None:
    """Return the text of an error about a field of the `moe_config` that was given beside it, if it is one."""
    if name not in MoeConfig.__annotations__:
        return None
    return f"{name!r} is a field of moe_config: set moe_config.{name}, with moe_config={{{name!r}: ...}}."


def _first_attribute(config: PreTrainedConfig, names: tuple[str, ...]) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


__all__ = ["HfMoeConfig", "MoeConfig"]


HfMoeConfig.register_for_auto_class()
