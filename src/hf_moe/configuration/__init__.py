"""Configuration of multimodal MoE models; plain data that imports no mechanism."""

from .configuration_hf_moe import HfMoeConfig, MoeConfig


__all__ = ["HfMoeConfig", "MoeConfig"]
