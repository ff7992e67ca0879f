"""What the data pipeline asks of a processor, for a model that reads text alone."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .messages import MEDIUM_NAMES


class TextProcessor:
    """Stands in for a processor where there is only a tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
    """

    image_token: str | None = None
    image_token_id = -1  # no token's
    image_seq_length = 0
    image_processor: Any = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> Any:
        return self.tokenizer.chat_template

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool = False, **options: Any) -> Any:
        """Return the rendered conversation, or what its tokenizer makes of it."""
        return self.tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)


def tokenizer_or_processor(processor: Any) -> Any:
    """Return what Transformers would give as the model's processor."""
    return processor.tokenizer if isinstance(processor, TextProcessor) else processor


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose content is a string, as the chat templates of text models want it."""
    for part in (part for message in messages for part in message["content"]):
        if (kind := part["type"]) != "text":
            raise ValueError(f"has {MEDIUM_NAMES[kind]}, and this model reads text alone: take other rows or base.")
        for name in part.keys() - {"type", "text"}:
            raise ValueError(f"has {name} in a content part, which a model of text alone does not read: take it out.")
    return [{**message, "content": "".join(part["text"] for part in message["content"])} for message in messages]
