"""Tokenizers and chat templates: what turns messages with images into the ids that a decoder reads."""

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast


IMAGE_TOKEN = "<image>"

# The assistant's text and the end of its turn stand inside the generation marks: what the model is trained to write.
TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}{{ '@IMAGE' if part['type'] in ('image', 'image_url') else part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- @START -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- parts(message['content']) + '@END' -}}{%- endgeneration -%}
{%- else -%}
{{- parts(message['content']) + '@CLOSE' -}}
{%- endif -%}
{{- '@BREAK' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{%- set message = {'role': 'assistant'} -%}{{- @START -}}{%- endif -%}
"""


def _template(start: str, end: str, image_token: str, close: str | None = None, line_break: str = "") -> str:
    """Return a chat template.

    Args:
        start: Jinja expression that opens the turn of `message`.
        end: what ends the assistant's turns, and learnt with them.
        image_token: what stands for an image.
        close: what ends the other turns; `end` when absent.
        line_break: what stands between turns.
    """
    text = TEMPLATE.replace("@START", start).replace("@IMAGE", image_token).replace("@END", end)
    return text.replace("@CLOSE", end if close is None else close).replace("@BREAK", line_break)


def default_chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN) -> str:
    """Return a chat template for messages with image and text parts.

    The tokenizer's own where it takes image parts; ChatML where the tokenizer has its marks; else `User: ...` and
    `Assistant: ...` lines, the assistant's ended by the end-of-sequence token.
    """
    own = tokenizer.chat_template
    if isinstance(own, str) and image_token in own:
        return own
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        start = "'<|im_start|>' + message['role'] + '\\n'"
        return _template(start, "<|im_end|>", image_token, line_break="\\n")
    return _template(
        "message['role'] | capitalize + ': '", tokenizer.eos_token or "", image_token, close="", line_break="\\n"
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the end of the sequence and, in ChatML, of the turn."""
    vocabulary = tokenizer.get_vocab()
    return sorted({vocabulary[token] for token in (tokenizer.eos_token, "<|im_end|>") if token in vocabulary})


def add_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN) -> int:
    """Make the tokenizer know the placeholder, give it a padding token if it has none, and return the placeholder's
    id."""
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer.convert_tokens_to_ids(image_token)


def train_word_tokenizer(
    texts: Iterable[str], image_token: str = IMAGE_TOKEN, max_vocab_size: int = 30_000
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, for decoders trained from scratch on a small vocabulary.

    Words and runs of punctuation are tokens; `<|user|>`, `<|assistant|>` and `<|end|>` frame the turns of its chat
    template, and `<|end|>` ends a sequence.

    Args:
        texts: what the vocabulary is made of, most frequent words first.
        image_token: the placeholder.
        max_vocab_size: number of tokens, special ones included.
    """
    special = ["<pad>", "<unk>", image_token, "<|user|>", "<|assistant|>", "<|end|>"]
    words = Tokenizer(WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    trainer = WordLevelTrainer(vocab_size=max_vocab_size, special_tokens=special, show_progress=False)
    words.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>", padding_side="left"
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    tokenizer.chat_template = _template("'<|' + message['role'] + '|>'", "<|end|>", image_token)
    return tokenizer
