"""Which layers are mixtures of experts, and what they are made of: the `moe_config`."""

import copy
import re
from dataclasses import field, fields
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from .checks import Interval, NonNegative, PositiveInt, checked, strict, unknown_name_message
from .layer_maps import at_layer, is_layer_map, layer_values, layers_named, map_layers, per_layer, spell_out
from .names import without_alias


# What configs hold of any model besides their fields, as Transformers and its trainers write it.
COMMON_FIELDS = frozenset(vars(GenerationConfig())) | {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "is_decoder",
    "per_layer_config",
    "quantization_config",
    "task_specific_params",
    "tokenizer_class",
}
# The fields that name a mechanism; a layer may be without those that are optional.
OPTIONAL_MECHANISMS = ("attention", "layer")
MECHANISM_FIELDS = ("router", "experts", "block", *OPTIONAL_MECHANISMS)
BANK_FIELDS = {"num_experts": PositiveInt, "intermediate_size": PositiveInt | None}


@strict
class MoeConfig(PreTrainedConfig):
    r"""
    Which layers are Mixture-of-Experts layers, what their experts are and how tokens find them.

    Every field may be a map from layer to value, see [`at_layer`].

    Args:
        layers (`str` or `list[int]`, defaults to `"all"`):
            Decoder layers whose feed-forward becomes a MoE: `"all"`, `"every_N"` (the last of each N layers: `every_2`
            gives 1, 3, 5, ...), `"sparse"` (0, 2, 4, ..., as MoE-LLaVA counts), `"first_half"`, `"second_half"`,
            `"from_N"` (all from layer N on: the first N stay dense), `"last_N"` (the last N), `"except_last_N"` (the
            last N stay dense, in decoders of more than N layers; the first is a MoE in any) or a list of layer
            indices.
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
        block (`dict`, defaults to `{"name": "moe"}`):
            How routers and experts are wired in the place of a feed-forward, and its options.
        attention (`dict`, *optional*):
            What mixes experts within the attention of a layer, and its options.
        layer (`dict`, *optional*):
            What surrounds or changes a whole layer, and its options.
        objectives (`dict[str, float | dict]`, defaults to `{}`):
            Auxiliary losses by label: a coefficient, or `{"name": "load_balance", "coef": 0.01, ...options}`. The
            label is the name where that is absent; two losses of one kind need labels of their own, under which they
            are logged. Each may say which `places` and `modalities` it counts, and its `layer_reduction`, see
            `modeling/auxiliary.py`.
        residual_mix (`bool`, defaults to `False`):
            Weigh the routed experts and the shared branch by a learned softmax of two, as residual MoE does
            (arXiv:2201.05596); needs `num_shared_experts`.
        attention_blocks (`str`, *optional*):
            Whose runs of tokens see each other in both directions: those of a modality, such as `"image"`, or of each
            id from 1 on of a condition of tokens, see `modeling/attention_blocks.py`. Of the whole decoder.
        token_balanced_loss (`bool`, defaults to `False`):
            Divide the language loss of a sample by all of its tokens, those of images included, as ERNIE 4.5 VL does.
            Only the model's own loss: trainers that compute theirs outside of the model have no use for it.
    """

    model_type = "hf_moe_layers"
    base_config_key = "moe_config"

    layers: str | list[int] | tuple[int, ...] = "all"
    num_experts: int | dict[str | int, int] | None = per_layer(Interval(1))
    num_experts_per_tok: int | dict[str | int, int] | None = per_layer(Interval(1))
    num_shared_experts: int | dict[str | int, int] = per_layer(Interval(0), default=0)
    granularity: int | dict[str | int, int] = per_layer(Interval(1), default=1)
    expert_intermediate_size: int | dict[str | int, int | None] | None = per_layer(Interval(1))
    shared_intermediate_size: int | dict[str | int, int | None] | None = per_layer(Interval(1))
    shared_expert_gate: bool | dict[str | int, bool] = per_layer(default=False)
    expert_banks: dict[str | int, dict | None] | None = None
    router: dict | str = field(default_factory=lambda: {"name": "top_k"})
    experts: dict | str = field(default_factory=lambda: {"name": "ffn"})
    block: dict | str = field(default_factory=lambda: {"name": "moe"})
    attention: dict | str | None = None
    layer: dict | str | None = None
    objectives: dict[str, Any] | None = field(default_factory=dict)
    residual_mix: bool | dict[str | int, bool] = per_layer(default=False)
    attention_blocks: str | None = None
    token_balanced_loss: bool = False

    def __post_init__(self, **kwargs):
        kwargs = take_copies(self, kwargs)
        for name in unknown_fields(kwargs):
            raise ValueError(unknown_name_message("option of moe_config", name, list(MoeConfig.__annotations__)))
        super().__post_init__(**kwargs)
        self.layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        self.objectives = self.objectives or {}
        for kind in MECHANISM_FIELDS:
            if isinstance(getattr(self, kind), str):
                setattr(self, kind, {"name": getattr(self, kind)})
            for value in layer_values(getattr(self, kind)):
                if value is None and kind in OPTIONAL_MECHANISMS:
                    continue
                if not isinstance(value, dict) or not isinstance(value.get("name"), str):
                    raise ValueError(
                        f"moe_config.{kind} needs a 'name', for example {{'name': 'top_k'}}; got {value!r}."
                    )
            if getattr(self, kind) is not None:
                setattr(self, kind, map_layers(getattr(self, kind), partial(without_alias, kind)))
        for label, value in self.objectives.items():
            objective_entry(label, value)
        if self.expert_banks is not None:
            self._check_banks()
            sizes = self._bank_sizes()
            if self.num_experts is None:
                self.num_experts = sizes or None
            elif not is_layer_map(self.num_experts) and not is_layer_map(sizes) and self.num_experts != sizes:
                raise ValueError(
                    f"moe_config.num_experts={self.num_experts} contradicts expert_banks, which hold {sizes} "
                    "experts: leave num_experts out."
                )

    def _check_banks(self) -> None:
        """Refuse banks that are no dicts of their two sizes, and read those that are."""
        for banks in layer_values(self.expert_banks):
            if banks is None:
                continue
            if not banks or not all(isinstance(bank, dict) for bank in banks.values()):
                raise ValueError(
                    "moe_config.expert_banks maps the name of a bank to its sizes, {'text': {'num_experts': 4, "
                    f"'intermediate_size': 256}}, ...}}; got {banks!r}."
                )
            for name, bank in banks.items():
                place = f"moe_config.expert_banks[{name!r}]"
                if not isinstance(name, str) or not name.isidentifier():
                    raise ValueError(f"{place}: the name of a bank is a word.")
                if "num_experts" not in bank:
                    raise ValueError(f"{place} needs 'num_experts', got {bank!r}.")
                for key, value in bank.items():
                    if key not in BANK_FIELDS:
                        raise ValueError(unknown_name_message(f"key of {place}", key, list(BANK_FIELDS)))
                    read = partial(checked, f"{place}[{key!r}]", hint=BANK_FIELDS[key])
                    by_layer = is_layer_map(value)
                    bank[key] = {layer: read(item) for layer, item in value.items()} if by_layer else read(value)

    def _bank_sizes(self) -> int | dict[str | int, int]:
        """Return how many experts all banks hold: a number, or a layer map where the banks differ."""

        def total(banks: Any) -> int:
            return sum(bank["num_experts"] for bank in banks.values())

        layers = layers_named(self.expert_banks)
        if not layers:
            return total(self.expert_banks)
        sizes: dict[str | int, int] = {}
        for layer in sorted(layers):
            banks = at_layer(self.expert_banks, layer)
            if banks is not None:
                sizes[layer] = total(banks)
        return sizes

    def fill_numbers(self, num_experts: int, num_experts_per_tok: int) -> None:
        """Fill the numbers of experts and slots that were left out."""
        if self.num_experts is None:
            self.num_experts = num_experts
        elif self.expert_banks is not None and is_layer_map(self.num_experts):
            # Layers without banks of their own.
            self.num_experts = {"default": num_experts, **self.num_experts}  # type: ignore[dict-item]
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = num_experts_per_tok

    def check_layers(self, num_hidden_layers: int) -> None:
        """Refuse what contradicts itself, or names layers beyond those of a decoder or tower."""
        for name in MoeConfig.__annotations__:
            setattr(self, name, spell_out(getattr(self, name), num_hidden_layers))
        # The numbers of experts are derived from the banks.
        for name in ("expert_banks", *MoeConfig.__annotations__):
            outside = {key for key in layers_named(getattr(self, name)) if key != "default"}
            outside -= {str(index) for index in range(num_hidden_layers)}
            if outside:
                raise ValueError(
                    f"moe_config.{name} names the layers {sorted(outside, key=int)}, but the decoder has the layers 0 "
                    f"to {num_hidden_layers - 1}."
                )
        for layer in self.moe_layers(num_hidden_layers):
            self._check_layer(layer)

    def _check_layer(self, layer_idx: int) -> None:
        """Refuse a missing number, and fields that contradict each other in one layer."""
        at = {name: at_layer(getattr(self, name), layer_idx) for name in MoeConfig.__annotations__ if name != "layers"}
        for name in ("num_experts", "num_experts_per_tok"):
            checked(f"Layer {layer_idx}: moe_config.{name}", at[name], PositiveInt)
        if at["expert_banks"] is not None:
            size = sum(bank["num_experts"] for bank in at["expert_banks"].values())
            if size != at["num_experts"]:
                raise ValueError(
                    f"Layer {layer_idx}: moe_config.num_experts={at['num_experts']} contradicts expert_banks, which "
                    f"hold {size} experts: leave num_experts out."
                )
        if not at["num_shared_experts"] and at["shared_intermediate_size"] is not None:
            raise ValueError(
                f"Layer {layer_idx}: moe_config.shared_intermediate_size={at['shared_intermediate_size']} is the "
                "width of the shared experts, and num_shared_experts is 0: set it, or leave the width out."
            )

    def moe_layers(self, num_hidden_layers: int) -> list[int]:
        """Return the indices of the MoE layers of a decoder of `num_hidden_layers` layers.

        Raises:
            ValueError: if `layers` has no documented form, or names layers that the decoder does not have, or none.
        """
        if isinstance(self.layers, str):
            layers = list(range(num_hidden_layers)[_named_layers(self.layers, num_hidden_layers)])
            if not layers:
                raise ValueError(
                    f"moe_config.layers={self.layers!r} names no layer of a decoder of {num_hidden_layers} layers; "
                    "a model without MoE layers has layers=[]."
                )
            return layers
        outside = [index for index in self.layers if not 0 <= index < num_hidden_layers]
        if outside:
            raise ValueError(
                f"moe_config.layers names {outside}, but the decoder has the layers 0 to {num_hidden_layers - 1}."
            )
        return sorted(set(self.layers))


def _named_layers(layers: str, num_hidden_layers: int) -> slice:
    """Return which layers a name stands for."""
    half = num_hidden_layers // 2
    modes = {
        "all": slice(None),
        "sparse": slice(None, None, 2),
        "first_half": slice(half),
        "second_half": slice(half, None),
    }
    if layers in modes:
        return modes[layers]
    form = re.fullmatch(r"(every|from|last|except_last)_([1-9][0-9]*)", layers)
    if form is None:
        raise ValueError(
            f"moe_config.layers={layers!r}: allowed are 'all', 'every_N', 'sparse', 'first_half', "
            "'second_half', 'from_N', 'last_N', 'except_last_N' or a list of indices."
        )
    number = int(form[2])
    forms = {
        "every": slice(number - 1, None, number),
        "from": slice(number, None),
        "last": slice(max(num_hidden_layers - number, 0), None),
        "except_last": slice(max(num_hidden_layers - number, 1)),
    }
    return forms[form[1]]


def objective_entry(label: str, value: Any) -> tuple[str, float, dict[str, Any]]:
    """Return the name, the coefficient and the options of an entry of `objectives`; its label may be its name."""
    place = f"moe_config.objectives[{label!r}]"
    if not isinstance(label, str) or not re.fullmatch(r"\w[\w-]*", label):
        raise ValueError(f"{place}: a label is a word, for it becomes part of the names of buffers and of logs.")
    options = dict(value) if isinstance(value, dict) else {"coef": value}
    if "coef" not in options:
        raise ValueError(f"{place} needs a coefficient under 'coef', got {value!r}.")
    coef = checked(f"{place}: coef", options.pop("coef"), NonNegative)
    name = checked(f"{place}: name", options.pop("name", label), str)
    return name, coef, options


def take_copies(config: PreTrainedConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give a config that is being built values of its own, and return its further arguments as copies.

    A config writes into what it holds. Two configs that are given the same object must not share it.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, dict | list | PreTrainedConfig):
            setattr(config, item.name, copy.deepcopy(value))
    kwargs = copy.deepcopy(kwargs)
    dtype = kwargs.get("torch_dtype") if config.dtype is None else config.dtype
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} must be the name of a dtype of torch, such as 'float32' or 'bfloat16'.")
    if not isinstance(kwargs.get("auto_map") or {}, dict):
        raise ValueError(f"auto_map={kwargs['auto_map']!r} must be a dict of Auto class to class.")
    return kwargs


def unknown_fields(names: dict[str, Any]) -> list[str]:
    """Return the names that are neither fields nor what any config of Transformers may hold."""
    return [
        name
        for name in names
        if not name.startswith("_") and name not in COMMON_FIELDS and not hasattr(PreTrainedConfig, name)
    ]
