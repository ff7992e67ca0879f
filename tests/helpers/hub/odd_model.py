"""A model of somebody else, which travels as remote code: of no library, not even a decoder."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class OddConfig(PreTrainedConfig):
    model_type = "odd"
    width: int = 32
    vocab_size: int = 64


class OddModel(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config: OddConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.mix = nn.Linear(config.width, config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.mix(self.embed(input_ids)).relu())}


OddConfig.register_for_auto_class()
OddModel.register_for_auto_class("AutoModelForImageTextToText")
