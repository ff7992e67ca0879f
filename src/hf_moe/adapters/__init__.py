"""LoRA experts as a PEFT method; importing this package registers it with PEFT."""

from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from ..data.intuition import find_centroids, intuition
from .checkpoints import EARLIER_TYPE
from .conditions import ConditionCollator, routing_inputs
from .config import MoeLoraConfig
from .editing import add_expert, expert_names, freeze_experts, remove_expert, rename_expert
from .gate_fitting import GateReport, fit_gate
from .layer import MoeLoraLayer
from .merging import merge_by_mean_routing, merge_for
from .model import MoeLoraModel


__all__ = [
    "ConditionCollator",
    "GateReport",
    "MoeLoraConfig",
    "MoeLoraLayer",
    "MoeLoraModel",
    "add_expert",
    "expert_names",
    "find_centroids",
    "fit_gate",
    "freeze_experts",
    "intuition",
    "merge_by_mean_routing",
    "merge_for",
    "remove_expert",
    "rename_expert",
    "routing_inputs",
]

register_peft_method(name="moe_lora", config_cls=MoeLoraConfig, model_cls=MoeLoraModel, prefix=MoeLoraModel.prefix)
PEFT_TYPE_TO_CONFIG_MAPPING[EARLIER_TYPE] = MoeLoraConfig
