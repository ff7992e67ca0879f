"""LoRA experts as a PEFT method; importing this package registers it with PEFT."""

from peft.utils import register_peft_method

from .assembly import assemble_lora_experts
from .config import MoeLoraConfig
from .layer import MoeLoraLayer
from .model import MoeLoraModel


__all__ = ["MoeLoraConfig", "MoeLoraLayer", "MoeLoraModel", "assemble_lora_experts"]

register_peft_method(name="moe_lora", config_cls=MoeLoraConfig, model_cls=MoeLoraModel, prefix=MoeLoraModel.prefix)
