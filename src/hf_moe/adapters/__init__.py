"""LoRA experts as a PEFT method; importing this package registers it with PEFT."""

from peft.utils import register_peft_method

from .adaptation import TestTimeAdapter
from .alignment import gromov_wasserstein_init
from .assembly import assemble_lora_experts
from .checkpoints import accept_saved_type
from .config import MoeLoraConfig
from .layer import MoeLoraLayer
from .logs import LogRouting
from .model import MoeLoraModel
from .routers.intuition_mor1e import find_centroids, intuition
from .routing import routing_inputs
from .selection import score_adapters, select_adapters, select_data, update_similarities
from .systems import list_systems


__all__ = [
    "LogRouting",
    "MoeLoraConfig",
    "MoeLoraLayer",
    "MoeLoraModel",
    "TestTimeAdapter",
    "assemble_lora_experts",
    "find_centroids",
    "gromov_wasserstein_init",
    "intuition",
    "list_systems",
    "routing_inputs",
    "score_adapters",
    "select_adapters",
    "select_data",
    "update_similarities",
]

register_peft_method(name="moe_lora", config_cls=MoeLoraConfig, model_cls=MoeLoraModel, prefix=MoeLoraModel.prefix)
accept_saved_type("MOE_LORA", MoeLoraConfig)
