"""The processor of a trained model, as the data pipeline takes it."""

from typing import Any

from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin

from ..configuration.configuration_hf_moe import ComposedConfig
from ..data import TextProcessor
from ..data.chat_template import AnyProcessor
from ..modeling.parts import host_parts
from ..modeling.processing_hf_moe import HfMoeProcessor


def as_processor(processor: Any) -> AnyProcessor:
    """Return a processor, or a tokenizer alone, as the data pipeline takes it."""
    return processor if isinstance(processor, ProcessorMixin) else TextProcessor(processor)


def load_processor(model: Any, source: str, **options: Any) -> AnyProcessor:
    """Return the processor of a model's checkpoint, of a model of text alone its tokenizer."""
    parts = host_parts(model)
    if not (parts.towers or parts.connectors):
        return as_processor(AutoTokenizer.from_pretrained(source, **options))
    if isinstance(model.config, ComposedConfig):
        return HfMoeProcessor.from_pretrained(source, **options)
    # Transformers' own: without the code of a checkpoint, for which it would ask.
    return as_processor(AutoProcessor.from_pretrained(source, trust_remote_code=False, **options))
