"""The generation settings of a fresh model."""

import logging
from copy import deepcopy

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .tokenizer import end_of_turn


logger = logging.getLogger(__name__)


def generation_settings(
    dense: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, image_token_id: int | None
) -> GenerationConfig:
    """Return the decoder's generation settings, ended by the tokenizer's marks, and never writing a placeholder.

    Settings that Transformers would refuse to save are left out.
    """
    generation = GenerationConfig() if dense is None else deepcopy(dense.generation_config)
    own = generation.eos_token_id
    ends = {*end_of_turn(tokenizer), *(own if isinstance(own, list) else [] if own is None else [own])}
    generation.eos_token_id = sorted(ends) or None
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = None if image_token_id is None else [image_token_id]
    return savable(generation)


def savable(generation: GenerationConfig) -> GenerationConfig:
    """Return generation settings without those that contradict the others, and warn of them.

    Many decoders come with a temperature and do not sample: it has no effect, but a model that holds it cannot be
    saved.
    """
    left = generation.to_diff_dict()
    kept: dict[str, object] = {}
    # What one setting allows another may need: `do_sample` comes after `temperature`.
    while added := {name: value for name, value in left.items() if _is_valid({**kept, name: value})}:
        for name, value in added.items():
            if _is_valid({**kept, name: value}):
                kept[name] = left.pop(name)
    if left:
        dropped = ", ".join(f"{name}={value!r}" for name, value in left.items())
        logger.warning("Left out of the decoder's generation settings, which have no use for it: %s.", dropped)
    return GenerationConfig(**kept)


def _is_valid(settings: dict[str, object]) -> bool:
    try:
        GenerationConfig(**settings).validate(strict=True)
    except ValueError:
        return False
    return True
