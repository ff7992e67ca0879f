"""LoRA experts as a PEFT method; importing this package registers it with PEFT."""

from peft.utils import register_peft_method

from .adaptation import TestTimeAdapter
from .alignment import gromov_wasserstein_init
from .assembly import assemble_lora_experts
from .checkpoints import accept_earlier_type
from .conditions import ConditionCollator, routing_inputs
from .config import MoeLoraConfig
from .editing import add_expert, expert_names, freeze_experts, remove_expert, rename_expert
from .layer import MoeLoraLayer
from .logs import LogRouting
from .merging import merge_by_mean_routing, merge_for
from .model import MoeLoraModel
from .plain_lora import check_lora_trained, get_lora_model, lora_targets
from .quantised import prepare_quantised, quantization_config
from .routers.intuition_mor1e import find_centroids, intuition
from .selection import score_adapters, select_adapters, select_data, update_similarities
from .systems import list_lora_systems


__all__ = [
    "ConditionCollator",
    "LogRouting",
    "MoeLoraConfig",
    "MoeLoraLayer",
    "MoeLoraModel",
    "TestTimeAdapter",
    "add_expert",
    "assemble_lora_experts",
    "check_lora_trained",
    "expert_names",
    "find_centroids",
    "freeze_experts",
    "get_lora_model",
    "gromov_wasserstein_init",
    "intuition",
    "list_lora_systems",
    "lora_targets",
    "merge_by_mean_routing",
    "merge_for",
    "prepare_quantised",
    "quantization_config",
    "remove_expert",
    "rename_expert",
    "routing_inputs",
    "score_adapters",
    "select_adapters",
    "select_data",
    "update_similarities",
]

register_peft_method(name="moe_lora", config_cls=MoeLoraConfig, model_cls=MoeLoraModel, prefix=MoeLoraModel.prefix)
accept_earlier_type(MoeLoraConfig)
