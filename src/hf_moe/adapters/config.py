"""Configuration of the LoRA experts."""

import os
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from ..modeling.auxiliary import AuxiliaryLosses
from ..modeling.gating import check_choice
from ..modeling.mechanisms import get_mechanism
from ..modeling.registry import build
from ..modeling.routing import MoELayerSpec, Router


ROUTER_INPUTS = ("decoder_layer", "target")


def add_peft_type(name: str, peft_types: Any = PeftType) -> PeftType:
    """Return the member `name` of PEFT's enum of methods, adding it where it is missing.

    `register_peft_method` refuses a name that is not in the enum, and an enum with members cannot be subclassed.

    Raises:
        RuntimeError: if this version of PEFT or Python does not let a member be added.
    """
    if name not in peft_types.__members__:
        try:
            member = str.__new__(peft_types, name)
            member._name_, member._value_ = name, name
            setattr(peft_types, name, member)
            peft_types._member_map_[name] = peft_types._value2member_map_[name] = member
            peft_types._member_names_.append(name)
        except (AttributeError, TypeError) as error:
            raise RuntimeError(
                f"PEFT's list of methods, {peft_types.__name__}, takes no new member {name!r}: install a "
                "version of peft that hf_moe's pyproject.toml allows, and report this."
            ) from error
    return peft_types[name]


MOE_LORA = add_peft_type("MOE_LORA")


@dataclass
class MoeLoraConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts.

    A targeted linear layer computes `W x + s * sum_i g_i B_i A_i x`, where the router chooses the experts i and their
    weights g_i, and `s = lora_alpha / r`. With `shared_r`, a plain LoRA of that rank is added for every token.

    Args:
        r: rank of every expert.
        lora_alpha: numerator of the scaling s.
        num_experts: E.
        num_experts_per_tok: K, the experts of a token; E of them with the router `top_k` is soft mixing.
        shared_r: rank of a plain LoRA beside the routed experts; 0 for none.
        target_modules: names or a regular expression of the linear layers to adapt, or `"all-linear"`.
        exclude_modules: names or a regular expression of modules to leave out.
        router: name of a router of this library, or a dict of `name` and options.
        router_input: `"decoder_layer"`: one router per decoder layer, shared by its targets, reads the hidden state
            that enters the layer. `"target"`: every target has its own, which reads what the target reads.
        objectives: auxiliary losses, name to coefficient or to a dict of `coef` and options.
        lora_dropout: dropout on the experts' input.
        use_rslora: scale by `lora_alpha / sqrt(r)`.
        init_lora_weights: start with B = 0, so that the adapter changes nothing; `False` draws B as well.
        freeze_experts: train the router alone.
        rank_pattern: module name or regular expression to another r.
        alpha_pattern: module name or regular expression to another lora_alpha.
        layers_to_transform: indices of the layers to adapt; all when `None`.
        layers_pattern: name of the list that `layers_to_transform` counts in.
        modules_to_save: further modules to train and save whole.

    Raises:
        ValueError: if a number is out of range, or the router or an objective is unknown or refuses its options.
    """

    r: int = field(default=8, metadata={"help": "Rank of every expert."})
    lora_alpha: int = field(default=8, metadata={"help": "Numerator of the scaling."})
    num_experts: int = field(default=4, metadata={"help": "Number of experts."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts of a token."})
    shared_r: int = field(default=0, metadata={"help": "Rank of a plain LoRA beside the experts."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    router: str | dict[str, Any] = field(default="top_k", metadata={"help": "Router: its name, or name and options."})
    router_input: str = field(
        default="decoder_layer",
        metadata={"help": "What a router reads: the input of the decoder layer (shared), or of the target."},
    )
    objectives: dict[str, Any] = field(default_factory=dict, metadata={"help": "Auxiliary losses by name."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    init_lora_weights: bool = field(default=True, metadata={"help": "Start with B = 0."})
    freeze_experts: bool = field(default=False, metadata={"help": "Train the router alone."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module name to another r."})
    alpha_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module name to another alpha."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOE_LORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        ranks = {"r": self.r, "num_experts": self.num_experts, **self.rank_pattern}
        for name, value in ranks.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.shared_r < 0:
            raise ValueError(f"shared_r={self.shared_r} must be at least 0; 0 leaves the plain LoRA out.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout} must lie in [0, 1).")
        check_choice("router_input", self.router_input, ROUTER_INPUTS)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern names the list that layers_to_transform counts in: set that as well.")
        self.router = {"name": self.router} if isinstance(self.router, str) else dict(self.router)
        if "name" not in self.router:
            raise ValueError(f"router={self.router} needs the key 'name'.")
        # What refuses its options does so here, not when a model is wrapped.
        spec = self.spec(0, hidden_size=64)
        self.build_router(spec)
        if self.build_objectives([spec]).reads_outputs:
            raise ValueError(
                f"objectives={list(self.objectives)}: one reads the outputs of whole experts; leave it out."
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        base = self.base_model_name_or_path
        if base and os.path.isdir(base):
            warnings.warn(
                f"The adapter's config names its base by a folder of this machine, {base!r}, which nobody else has: "
                "set its base_model_name_or_path to a repository on the Hub before you share the adapter.",
                stacklevel=2,
            )
        super().save_pretrained(save_directory, **kwargs)

    def scaling(self, alpha: int, rank: int) -> float:
        """Return the factor s of experts with this alpha and rank."""
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def spec(self, number: int, hidden_size: int) -> MoELayerSpec:
        """Return the facts of router `number`, which reads hidden states of width `hidden_size`."""
        return MoELayerSpec(number, hidden_size, self.num_experts, self.num_experts_per_tok, self.r)

    def build_router(self, spec: MoELayerSpec) -> Router:
        """Return a router as configured; its parameters are not initialised."""
        options: dict[str, Any] = dict(self.router)  # type: ignore[arg-type]
        return build("router", get_mechanism("router", options.pop("name")), options, spec)

    def build_objectives(self, specs: list[MoELayerSpec]) -> AuxiliaryLosses:
        """Return the objectives over all routers of an adapter."""
        return AuxiliaryLosses(SimpleNamespace(moe_config=SimpleNamespace(objectives=self.objectives)), specs)
