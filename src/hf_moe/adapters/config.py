"""Configuration of the LoRA experts."""

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_type_hints

from peft import PeftConfig, XLoraConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from ..configuration.checks import Interval, NonNegativeInt, Positive, PositiveInt, check, unknown_name_message
from ..configuration.names import without_alias
from ..configuration.systems import load_system
from ..hub.adapter_folder import WEIGHTS_FILE, check_weights, is_local_base
from ..modeling.auxiliary import AuxiliaryLosses
from ..modeling.gating import check_choice
from ..modeling.layer_spec import MoELayerSpec
from ..modeling.mechanisms import get_mechanism
from ..modeling.registry import build, registered
from ..modeling.routing import Router
from .checkpoints import EARLIER_TYPE, check_version, complete_saved_config
from .experts import EXPERT_KINDS, build_kind
from .host_router import HostRouter
from .hosts import PARTS
from .stacks import Target


ROUTER_INPUTS = ("decoder_layer", "model", "target")
# Fields of every PEFT method, which PEFT does not check.
OF_PEFT = {
    "base_model_name_or_path": str | None,
    "revision": str | None,
    "inference_mode": bool,
    "auto_mapping": dict | None,
    "peft_version": str | None,
}
# Fields that hold names, or one regular expression.
NAMES = ("target_modules", "target_parameters", "exclude_modules", "layers_pattern", "modules_to_save", "expert_names")
# What `target_overrides` may set for single targets.
OVERRIDABLE = ("experts", "router", "router_input", "num_experts", "num_experts_per_tok", "r", "lora_alpha")


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of PEFT's enum of methods, adding it where it is missing.

    `register_peft_method` refuses a name that is not in the enum, and an enum with members cannot be subclassed.
    """
    if name not in PeftType.__members__:
        try:
            member: Any = str.__new__(PeftType, name)
            member._name_, member._value_ = name, name
            setattr(PeftType, name, member)
            PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
            PeftType._member_names_.append(name)
        except (AttributeError, TypeError) as error:
            raise RuntimeError(
                f"PEFT's list of methods, {PeftType.__name__}, takes no new member {name!r}: install a "
                "version of peft that hf_moe's pyproject.toml allows, and report this."
            ) from error
    return PeftType[name]


MOE_LORA = add_peft_type("MOE_LORA")


def _option(default: Any, text: str) -> Any:
    """Return a field with a default, or its factory, and what an error says of it."""
    metadata = {"help": text}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True)
class TargetSettings:
    """What holds for one target, after patterns and overrides; the fields are those of [`MoeLoraConfig`]."""

    experts: dict[str, Any]
    router: dict[str, Any]
    router_input: str
    num_experts: int
    num_experts_per_tok: int
    r: int | list[int]
    lora_alpha: float

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every expert."""
        return (self.r,) * self.num_experts if isinstance(self.r, int) else tuple(self.r)

    @property
    def router_group(self) -> str:
        """What targets must have in common to share a router."""
        return json.dumps([self.router, self.router_input, self.num_experts, self.num_experts_per_tok], sort_keys=True)


@dataclass
class MoeLoraConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts.

    A targeted linear layer computes `W x + s * sum_i g_i B_i A_i x`, where the router chooses the experts i and their
    weights g_i, and `s = lora_alpha / r`. With `shared_r`, a plain LoRA of that rank is added for every token.

    Args:
        r: rank of every expert, or the ranks of all experts in a list.
        lora_alpha: numerator of the scaling s.
        num_experts: E.
        num_experts_per_tok: K, the experts of a token; `None` for all of them, which is soft mixing.
        shared_r: rank of a plain LoRA beside the routed experts; 0 for none.
        target_modules: names or a regular expression of the linear layers to adapt, or `"all-linear"`; also of whole
            modules that take and return hidden states, such as `"mlp"`, or of whole layers.
        target_parameters: names of stacked expert weights (E, ., .) to adapt, such as `"mlp.experts.down_proj"`: every
            expert of the host gets a mixture of its own.
        exclude_modules: names or a regular expression of modules to leave out.
        model_part: of a multimodal model, adapt the `"language_model"` alone, or the `"towers"` and connectors around
            it; all of it when `None`. A model that is one part is adapted either way.
        experts: kind of the experts, or a dict of `name` and options.
        router: name of a router of this library, or a dict of `name` and options.
        router_input: `"decoder_layer"`: one router per decoder layer, shared by its targets, reads the hidden state
            that enters the layer. `"model"`: one for all layers reads what enters the first of them. `"target"`: every
            target has its own, which reads what the target reads.
        ffn_experts: mix whole feed-forward experts, behind the down projection (MixLoRA), in place of mixing at each
            of its linear layers; `gate_proj`, `up_proj` and `down_proj` must be targets.
        objectives: auxiliary losses, name to coefficient or to a dict of `coef` and options.
        lora_dropout: dropout on the experts' input.
        use_rslora: scale by `lora_alpha / sqrt(r)`.
        init_lora_weights: start with B = 0, so that the adapter changes nothing; `False` draws B as well.
        freeze_experts: train the router alone.
        expert_names: names of the experts, in order; their numbers when `None`.
        frozen_experts: numbers of single experts that training leaves as they are.
        rank_pattern: module name or regular expression to another r.
        alpha_pattern: module name or regular expression to another lora_alpha.
        target_overrides: module name or regular expression to a dict of other values there, of `experts`, `router`,
            `router_input`, `num_experts`, `num_experts_per_tok`, `r` and `lora_alpha`. Targets share a router if they
            agree in what describes it.
        layers_to_transform: indices of the layers to adapt; all when `None`.
        layers_pattern: name of the list that `layers_to_transform` counts in.
        modules_to_save: further modules to train and save whole.
        system: the published system of these fields, all of whose targets must be found; `None` for what is none, or
            is to be without some of them.
        hf_moe_version: the version of this package that saved the adapter; not to be set.

    Raises:
        ValueError: if a field is of another type or out of range, or the experts, the router or an objective are
            unknown or refuse their options.
    """

    r: PositiveInt | list[PositiveInt] = _option(8, "Rank of every expert, or a list of all ranks.")
    lora_alpha: Positive = _option(8, "Numerator of the scaling.")
    num_experts: PositiveInt = _option(4, "Number of experts.")
    num_experts_per_tok: PositiveInt | None = _option(2, "Experts of a token; all when None.")
    shared_r: NonNegativeInt = _option(0, "Rank of a plain LoRA beside the experts.")
    target_modules: list[str] | set[str] | str | None = _option(None, "Linear layers to adapt.")
    target_parameters: list[str] | None = _option(None, "Stacked weights to adapt.")
    exclude_modules: list[str] | set[str] | str | None = _option(None, "Modules to leave out.")
    model_part: str | None = _option(None, "Part of a multimodal model to adapt.")
    experts: str | dict[str, Any] = _option("lora", "Experts: kind, or name and options.")
    router: str | dict[str, Any] = _option("top_k", "Router: its name, or name and options.")
    router_input: str = _option(
        "decoder_layer", "What a router reads: the input of the decoder layer, of the model, or of the target."
    )
    ffn_experts: bool = _option(False, "Mix whole feed-forward experts.")
    objectives: dict[str, float | dict[str, Any]] = _option(dict, "Auxiliary losses by name.")
    lora_dropout: Annotated[float, Interval(0, 1, open_maximum=True)] = _option(0.0, "Dropout on the experts' input.")
    use_rslora: bool = _option(False, "Scale by lora_alpha / sqrt(r).")
    init_lora_weights: bool = _option(True, "Start with B = 0.")
    freeze_experts: bool = _option(False, "Train the router alone.")
    expert_names: list[str] | None = _option(None, "Names of the experts.")
    frozen_experts: list[int] | None = _option(None, "Experts that are not trained.")
    rank_pattern: dict[str, Any] = _option(dict, "Module name to another r.")
    alpha_pattern: dict[str, float] = _option(dict, "Module name to another alpha.")
    target_overrides: dict[str, dict[str, Any]] = _option(
        dict, "Module name to other experts, router, numbers of experts, ..."
    )
    layers_to_transform: list[NonNegativeInt] | NonNegativeInt | None = _option(None, "Layers to adapt.")
    layers_pattern: list[str] | str | None = _option(None, "Name of the list of layers.")
    modules_to_save: list[str] | None = _option(None, "Further modules to train and save.")
    system: str | None = _option(None, "Published system, all targets of which are needed.")
    hf_moe_version: str | None = _option(None, "Version that saved the adapter.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_types()
        self.peft_type = MOE_LORA
        check_version(self.hf_moe_version)
        if self.ffn_experts and self.shared_r:
            raise ValueError("shared_r has no place beside whole feed-forward experts: set ffn_experts=False.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.model_part is not None:
            check_choice("model_part", self.model_part, PARTS)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern names the list that layers_to_transform counts in: set that as well.")
        names = self.expert_names
        if names is not None and not len(set(names)) == len(names) == self.num_experts:
            raise ValueError(f"expert_names={names} must give each of {self.num_experts} experts a name of its own.")
        if not set(self.frozen_experts or ()) <= set(range(self.num_experts)):
            raise ValueError(f"frozen_experts={self.frozen_experts} must lie in [0, {self.num_experts}).")
        self.router = _named("router", self.router)
        self.experts = _named("experts", self.experts)
        # What refuses its options does so here, not when a model is wrapped.
        specs: list[MoELayerSpec] = []
        for key in ("", *self.rank_pattern, *self.alpha_pattern, *self.target_overrides):
            settings = self.settings(key)
            specs.append(self.spec(len(specs), 64, settings, vocab_size=64))
            self.build_router(specs[-1], settings)
            build_kind(settings.experts, Target(key, 0, 0, settings.num_experts, settings.ranks, head_dim=1))
        if "outputs" in self.build_objectives(specs).reads:
            raise ValueError(
                f"objectives={list(self.objectives)}: one reads the outputs of whole experts; leave it out."
            )

    def _check_types(self) -> None:
        """Refuse fields of another type or out of range, those for single targets included."""
        cls = MoeLoraConfig
        own = cls.__annotations__
        hints = {name: hint for name, hint in get_type_hints(cls, include_extras=True).items() if name in own}
        for name, hint in hints.items():
            check(name, getattr(self, name), hint, cls.__dataclass_fields__[name].metadata["help"])
        for name, hint in OF_PEFT.items():
            check(name, getattr(self, name), hint)
        if self.peft_type not in (None, MOE_LORA, EARLIER_TYPE):
            raise ValueError(f"peft_type={self.peft_type!r}: LoRA experts are {MOE_LORA.value!r}; leave it out.")
        expressions = [(name, getattr(self, name)) for name in NAMES if isinstance(getattr(self, name), str)]
        for name in NAMES:
            value = getattr(self, name)
            if value == "" or (isinstance(value, list | set) and "" in value):
                raise ValueError(f"{name}={value!r} has an empty name in it, which nothing has.")
        for name in ("rank_pattern", "alpha_pattern", "target_overrides"):
            expressions += [(name, key) for key in getattr(self, name)]
        for name, expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{name}: {expression!r} is no regular expression: {error}.") from error
        if self.layers_to_transform == []:
            raise ValueError("layers_to_transform=[] names no layer: leave it out for all of them.")
        if self.system is not None:
            load_system(self.system)
        for name, value in self.objectives.items():
            if isinstance(value, dict) and "coef" in value:
                check(f"objectives[{name!r}]['coef']", value["coef"], float)
        for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            for key, value in getattr(self, pattern).items():
                check(f"{pattern}[{key!r}]", value, hints[name])
        for key, overrides in self.target_overrides.items():
            for name, value in overrides.items():
                if name not in OVERRIDABLE:
                    raise ValueError(unknown_name_message("field of target_overrides", name, list(OVERRIDABLE)))
                check(f"target_overrides[{key!r}][{name!r}]", value, hints[name])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "MoeLoraConfig":
        """Return the config of a saved adapter; damaged weights beside it are an `OSError`."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        check_weights(folder)
        config.weights_file = folder / WEIGHTS_FILE  # for messages
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config, with a warning where the base is a folder of this machine."""
        super().save_pretrained(save_directory, **kwargs)
        complete_saved_config(save_directory)
        base = self.base_model_name_or_path
        if base and is_local_base(base):
            warnings.warn(
                f"The adapter's config names its base by a folder of this machine, {base!r}, which nobody else has: "
                "name it by its id on the Hub, with hf_moe.hub.adapter_folder.set_base, before you share it.",
                stacklevel=2,
            )

    def scaling(self, alpha: float, rank: int) -> float:
        """Return the factor s of experts with this alpha and rank."""
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def settings(self, key: str, num_host_experts: int | None = None) -> TargetSettings:
        """Return what holds for the target `key`; `num_host_experts` is E of the MoE host whose routing it follows."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in OVERRIDABLE}
        for pattern, name in ((self.rank_pattern, "r"), (self.alpha_pattern, "lora_alpha")):
            fields[name] = pattern.get(get_pattern_key(pattern.keys(), key), fields[name])
        fields |= self.target_overrides.get(get_pattern_key(self.target_overrides.keys(), key), {})
        fields["router"], fields["experts"] = _named("router", fields["router"]), _named("experts", fields["experts"])
        check_choice("router_input", fields["router_input"], ROUTER_INPUTS)
        check_choice("experts", fields["experts"]["name"], tuple(EXPERT_KINDS))
        if num_host_experts is not None and fields["router"]["name"] == "host":
            fields["num_experts"] = num_host_experts
        if fields["num_experts_per_tok"] is None:
            fields["num_experts_per_tok"] = fields["num_experts"]
        ranks, experts = fields["r"], fields["num_experts"]
        if isinstance(ranks, list) and len(ranks) != experts:
            raise ValueError(f"r={ranks} must name the rank of each of num_experts={experts} experts.")
        return TargetSettings(**fields)

    def spec(self, number: int, hidden_size: int, settings: TargetSettings, **facts: Any) -> MoELayerSpec:
        """Return the facts of router `number`, which reads hidden states of width `hidden_size`."""
        sizes = hidden_size, settings.num_experts, settings.num_experts_per_tok, max(settings.ranks)
        return MoELayerSpec(number, *sizes, **facts)

    def build_router(self, spec: MoELayerSpec, settings: TargetSettings) -> Router:
        """Return a router as configured; its parameters are not initialised."""
        options = dict(settings.router)
        name = options.pop("name")
        own = registered("router").get(name)
        if name == HostRouter.mechanism_name and own is not None:
            raise ValueError(
                f"The router {name!r} is registered by {own.__module__}.{own.__qualname__}, and LoRA experts have one "
                "of that name, which follows the host's routing: register yours under another name."
            )
        cls = HostRouter if name == HostRouter.mechanism_name else get_mechanism("router", name)
        return build("router", cls, options, spec)

    @classmethod
    def from_system(cls, key: str, *, variant: str | None = None, **fields: Any) -> PeftConfig:
        """Return the configuration of a published system.

        Args:
            key: the system, see `hf_moe.list_systems("adapter")`.
            variant: which of its forms; the first one when `None`.
            fields: what differs from the record, usually `target_modules`. Dicts (`router`, `experts`, `objectives`,
                `target_overrides`, ...) are merged with the record's key by key, down to the options; an empty dict, a
                plain name or another `name` replaces what the record has. `x_lora`, whose configuration is PEFT's,
                takes `adapters`, a list, and `hidden_size`.

        Raises:
            ValueError: if the system or its variant is unknown, or a field that it needs is missing.
        """
        record = load_system(key)
        merged = record.fields("adapter", variant, fields)
        if merged.pop("peft_type", MOE_LORA.value) == MOE_LORA.value:
            return cls(**{"system": record.key, **merged})
        if not fields.get("adapters") or "hidden_size" not in fields:
            raise ValueError("x_lora needs adapters=[folder or Hub name, ...] and the hidden_size of the base model.")
        # PEFT's X-LoRA loads its adapters under their numbers, and finds them under no other name.
        merged["adapters"] = {str(number): adapter for number, adapter in enumerate(fields["adapters"])}
        return XLoraConfig(**merged)

    def build_objectives(self, specs: list[MoELayerSpec]) -> AuxiliaryLosses:
        """Return the objectives over all routers of an adapter."""
        return AuxiliaryLosses(SimpleNamespace(moe_config=SimpleNamespace(objectives=self.objectives)), specs)


def _named(field_name: str, value: str | dict[str, Any]) -> dict[str, Any]:
    """Return a mechanism's `name` and options; there must be a name."""
    options = {"name": value} if isinstance(value, str) else dict(value)
    if not isinstance(options.get("name"), str):
        raise ValueError(f"{field_name}={options} needs the key 'name', with a text.")
    return without_alias(field_name, options)
