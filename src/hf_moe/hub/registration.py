"""Lets the installed classes open checkpoints, in place of the code that these carry."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from ..configuration.configuration_hf_moe import HfMoeConfig, hosted_config_class, on_config_class
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.processing_hf_moe import HfMoeProcessor


def register() -> None:
    """Make the installed classes win over those a checkpoint carries, for every Auto class; safe to call again."""

    def register_hosted(config_class: type) -> None:
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            auto_class.register(config_class, HfMoeForConditionalGeneration, exist_ok=True)

    AutoConfig.register(HfMoeConfig.model_type, HfMoeConfig, exist_ok=True)
    # The processors of other hosts are Transformers' own.
    AutoProcessor.register(hosted_config_class(HfMoeConfig, None), HfMoeProcessor, exist_ok=True)
    on_config_class(register_hosted)
