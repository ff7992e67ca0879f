"""LoRA experts as a PEFT method; importing this package registers it with PEFT."""

from peft.utils import register_peft_method

from .config import MoeLoraConfig
from .layer import MoeLoraLayer
from .model import MoeLoraModel


__all__ = ["MoeLoraConfig", "MoeLoraLayer", "MoeLoraModel"]

register_peft_method(name="moe_lora", config_cls=MoeLoraConfig, model_cls=MoeLoraModel, prefix=MoeLoraModel.prefix)
