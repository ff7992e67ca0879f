# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 778dc25f6fb5d870e908a416b0937af2bcba1bc34b99f0573abd152cd450f611
"""Configuration of a multimodal Mixture-of-Experts model.

The two classes here are plain data: they open with `AutoConfig` alone and import no mechanism. Names of mechanisms and
their options are checked when the model is built, where the classes that understand them are at hand.
"""

import difflib
import importlib
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import AutoConfig

from .reading import check_config, check_files
from .saving import save_with_hooks


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


def at_layer(value: Any, layer_idx: int) -> Any:
    """Resolve `value` for one layer.

    Every option may be a map from layer to value: `{"default": 8, "3": 16}`. A mapping counts as such a map when each
    of its keys is a layer index or `"default"`; maps are resolved at any depth of an option.

    Raises:
        ValueError: if the map has no entry for the layer and no default.
    """
    if isinstance(value, dict):
        if value and all(str(key) == "default" or str(key).isdigit() for key in value):
            by_name = {str(key): item for key, item in value.items()}
            if str(layer_idx) not in by_name and "default" not in by_name:
                raise ValueError(
                    f"The map {value} has no value for layer {layer_idx}: add the key '{layer_idx}' or 'default'."
                )
            return at_layer(by_name.get(str(layer_idx), by_name.get("default")), layer_idx)
        return {key: at_layer(item, layer_idx) for key, item in value.items()}
    return value


def unknown_name_message(kind: str, name: str, known: list[str]) -> str:
    """Return the text of an error about an unknown name, with the nearest valid ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(item) for item in near)}?" if near else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(known))}."


class MoeConfig(PreTrainedConfig):
    r"""
    Which layers are Mixture-of-Experts layers, what their experts are and how tokens find them.

    Every field may be a map from layer to value, see [`at_layer`].

    Args:
        layers (`str` or `list[int]`, defaults to `"all"`):
            Decoder layers whose feed-forward becomes a MoE: `"all"`, `"every_N"` (the last of each N layers: `every_2`
            gives 1, 3, 5, ...), `"sparse"` (0, 2, 4, ..., as MoE-LLaVA counts), `"first_half"`, `"second_half"`,
            `"from_N"` (all from layer N on: the first N stay dense) or a list of layer indices.
        num_experts (`int`, *optional*):
            Routed experts E of a layer. Derived when absent: the sum over `expert_banks`, else the host's own number
            if the host is a MoE, else 8.
        num_experts_per_tok (`int`, *optional*):
            Slots K of a token. Derived when absent: the host's own number if the host is a MoE, else 2.
        num_shared_experts (`int`, defaults to 0):
            Experts that every token uses, kept as one feed-forward of `num_shared_experts` times the width.
        granularity (`int`, defaults to 1):
            Divides the derived expert width: fine-grained experts of 1/granularity of the dense feed-forward.
        expert_intermediate_size (`int`, *optional*):
            Inner width of one routed expert. Derived from the host's feed-forward when absent.
        shared_intermediate_size (`int`, *optional*):
            Inner width of the shared branch. `num_shared_experts` times the expert width when absent.
        shared_expert_gate (`bool`, defaults to `False`):
            Multiply the shared branch by `sigmoid(w . x)`, as Qwen2-MoE does.
        expert_banks (`dict[str, dict]`, *optional*):
            Isolated banks of different width, in order of their expert indices:
            `{"text": {"num_experts": 4, "intermediate_size": 256}, "vision": {...}}`.
        router (`dict`, defaults to `{"name": "top_k"}`):
            The router's name and its options.
        experts (`dict`, defaults to `{"name": "ffn"}`):
            The kind of expert and its options.
        objectives (`dict[str, float | dict]`, defaults to `{}`):
            Auxiliary losses: a coefficient, or `{"coef": 0.01, ...options}`.
        residual_mix (`bool`, defaults to `False`):
            Weigh the routed experts and the shared branch by a learned softmax of two, as residual MoE does
            (arXiv:2201.05596); needs `num_shared_experts`.
        token_balanced_loss (`bool`, defaults to `False`):
            Divide the language loss of a sample by all of its tokens, those of images included, as ERNIE 4.5 VL does.
            Only the model's own loss: trainers that compute theirs outside of the model have no use for it.
    """

    model_type = "hf_moe_layers"
    base_config_key = "moe_config"

    layers: str | list[int] = "all"
    num_experts: int | dict | None = None
    num_experts_per_tok: int | dict | None = None
    num_shared_experts: int | dict = 0
    granularity: int | dict = 1
    expert_intermediate_size: int | dict | None = None
    shared_intermediate_size: int | dict | None = None
    shared_expert_gate: bool | dict = False
    expert_banks: dict | None = None
    router: dict | str = field(default_factory=lambda: {"name": "top_k"})
    experts: dict | str = field(default_factory=lambda: {"name": "ffn"})
    objectives: dict = field(default_factory=dict)
    residual_mix: bool | dict = False
    token_balanced_loss: bool = False

    def __post_init__(self, **kwargs):
        for name in kwargs:
            if not name.startswith("_") and not hasattr(PreTrainedConfig, name):
                raise ValueError(unknown_name_message("option of moe_config", name, list(MoeConfig.__annotations__)))
        super().__post_init__(**kwargs)
        self.router = {"name": self.router} if isinstance(self.router, str) else self.router
        self.experts = {"name": self.experts} if isinstance(self.experts, str) else self.experts
        for kind in ("router", "experts"):
            for value in _layer_values(getattr(self, kind)):
                if not isinstance(value, dict) or not isinstance(value.get("name"), str):
                    raise ValueError(
                        f"moe_config.{kind} needs a 'name', for example {{'name': 'top_k'}}; got {value!r}."
                    )
        if self.expert_banks is not None:
            sizes = [bank["num_experts"] for bank in self.expert_banks.values()]
            if self.num_experts is None:
                self.num_experts = sum(sizes)
            elif self.num_experts != sum(sizes):
                raise ValueError(
                    f"moe_config.num_experts={self.num_experts} contradicts expert_banks, which hold {sum(sizes)} "
                    "experts: leave num_experts out."
                )

    def moe_layers(self, num_hidden_layers: int) -> list[int]:
        """Return the indices of the MoE layers of a decoder of `num_hidden_layers` layers.

        Raises:
            ValueError: if `layers` is not one of the documented forms, or names a layer the decoder does not have.
        """
        if isinstance(self.layers, str):
            form, _, number = self.layers.partition("_")
            modes = {
                "all": slice(None),
                "first_half": slice(num_hidden_layers // 2),
                "second_half": slice(num_hidden_layers // 2, None),
                "sparse": slice(None, None, 2),
            }
            if self.layers in modes:
                return list(range(num_hidden_layers)[modes[self.layers]])
            if form in ("every", "from") and number.isdigit() and int(number) > 0:
                step = int(number)
                return list(
                    range(step - 1, num_hidden_layers, step) if form == "every" else range(step, num_hidden_layers)
                )
            raise ValueError(
                f"moe_config.layers={self.layers!r}: allowed are 'all', 'every_N', 'sparse', 'first_half', "
                "'second_half', 'from_N' or a list of indices."
            )
        outside = [index for index in self.layers if not 0 <= index < num_hidden_layers]
        if outside:
            raise ValueError(
                f"moe_config.layers names {outside}, but the decoder has the layers 0 to {num_hidden_layers - 1}."
            )
        return sorted(set(self.layers))


def _layer_values(value: Any) -> list[Any]:
    """Return the values of a layer map, or the value itself as the only one."""
    if isinstance(value, dict) and value and all(str(key) == "default" or str(key).isdigit() for key in value):
        return list(value.values())
    return [value]


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
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    image_seq_length: int | None = None
    vision_feature_layer: int | None = None
    vision_feature_size: int | None = None
    vision_prefix_tokens: int | None = None
    image_size: int | None = None
    initializer_range: float = 0.02
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    config_format: int = CONFIG_FORMAT
    system: str | None = None
    hf_moe_version: str | None = None

    def __post_init__(self, **kwargs):
        if self.config_format > CONFIG_FORMAT:
            raise ValueError(
                f"This checkpoint has the config format {self.config_format}; this code reads formats up to "
                f"{CONFIG_FORMAT}. Upgrade with: pip install -U hf-moe (or load with trust_remote_code=True, which "
                "runs the code that the checkpoint carries)."
            )
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        self.connector = {"name": self.connector} if isinstance(self.connector, str) else self.connector
        self.tie_word_embeddings = bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)
        if self.image_size is None and self.vision_config is not None:
            size = getattr(self.vision_config, "image_size", None)
            self.image_size = size[0] if isinstance(size, list | tuple) else size
        self._derive_from_host()
        self._write_contract_fields()

    def _derive_from_host(self) -> None:
        """Fill what the host decides. A host that is a MoE itself names its experts; see ecosystem conventions."""
        host, moe = self.text_config, self.moe_config
        if moe.num_experts is None:
            moe.num_experts = _first_attribute(host, ("num_experts", "num_local_experts", "n_routed_experts")) or 8
        if moe.num_experts_per_tok is None:
            moe.num_experts_per_tok = _first_attribute(host, ("num_experts_per_tok",)) or 2
        for layer in self.moe_layers():
            experts, slots = at_layer(moe.num_experts, layer), at_layer(moe.num_experts_per_tok, layer)
            if experts < 1 or slots < 1:
                raise ValueError(
                    f"Layer {layer}: num_experts={experts} and num_experts_per_tok={slots} must be positive."
                )

    def _write_contract_fields(self) -> None:
        """Write the fields that TRL, vLLM and others look for, where the host has none of that name.

        On a host that is a MoE the same names decide what the host builds, so they are left alone. A model
        without a MoE layer counts no experts.
        """
        fields = {"output_router_logits": self.output_router_logits, "router_aux_loss_coef": 0.0}
        if self.moe_layers():
            fields["num_experts"] = self.moe_config.num_experts
            fields["num_experts_per_tok"] = self.moe_config.num_experts_per_tok
        for name, value in fields.items():
            if isinstance(value, int | float) and not hasattr(self.text_config, name):
                setattr(self.text_config, name, value)

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """What `Trainer` leaves out of predictions: `compute_metrics` gets the logits alone."""
        # Transformers names the fields, its cache under a name that depends on the version.
        outputs = importlib.import_module("transformers.modeling_outputs")
        theirs = {item.name for item in fields(outputs.MoeCausalLMOutputWithPast)}
        return sorted(theirs - {"loss", "logits"} | {"image_hidden_states", "objective_values", "routing"})

    @classmethod
    def from_system(cls, key: str, **kwargs: Any) -> "HfMoeConfig":
        """Build a config whose `moe_config` comes from the preset of a catalogue key.

        Args:
            key (`str`): a key of `hf_moe.list_systems()`, for example `"moiie"`.
            kwargs: further fields of the config. Entries of `moe_config` override those of the preset.

        Raises:
            ValueError: if no preset has that key.
        """
        try:
            systems = importlib.import_module("hf_moe.configuration.systems")
        except ImportError as error:
            raise ImportError("The presets live in the package, not in a checkpoint: pip install hf-moe") from error
        preset = systems.load_preset(key)
        overrides = kwargs.pop("moe_config", None) or {}
        return cls(moe_config={**preset["moe_config"], **overrides}, system=key, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "HfMoeConfig":
        check_files(pretrained_model_name_or_path, ())
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_config(folder / "config.json")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"The config.json of {pretrained_model_name_or_path} cannot be read: {error}") from error

    def moe_layers(self) -> list[int]:
        """Return the indices of the MoE layers."""
        return self.moe_config.moe_layers(self.text_config.num_hidden_layers)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        return save_with_hooks(self, super().save_pretrained, save_directory, push_to_hub, kwargs)


def _first_attribute(config: PreTrainedConfig, names: tuple[str, ...]) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


__all__ = ["HfMoeConfig", "MoeConfig"]


HfMoeConfig.register_for_auto_class()
