"""Tokenizers and chat templates: what turns messages with images into the ids that a decoder reads."""

import logging
from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
# The steps of a multimodal chain of thought that draws an image (MINT, arXiv:2503.01298).
STEPS = ("plan", "draft", "reflection", "correction")

# The assistant's text and the end of its turn stand inside the generation marks: what the model is trained to write. A
# generation prompt ends in no white space, with which a tokenizer would split an answer otherwise than in training.
TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{{- '<|' + part['step'] + '|>' if part['step'] else '' -}}
{{- '@IMAGE' if part['type'] in ('image', 'image_url') else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
@BEGIN
{%- for message in messages -%}
{{- @START + '@LEAD' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- parts(message['content']) + '@END' -}}{%- endgeneration -%}
{%- else -%}
{{- parts(message['content']) + '@CLOSE' -}}
{%- endif -%}
{{- '@BREAK' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{%- set message = {'role': 'assistant'} -%}{{- @START -}}{%- endif -%}
"""

# Goes before a decoder's own template, which reads texts: parts become one, the placeholder where an image stands.
TEXTS_OF_PARTS = """\
{%- set texts = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is defined and message['content'] is not none and message['content'] is not string -%}
{%- set text -%}
{%- for part in message['content'] -%}
{{- '<|' + part['step'] + '|>' if part['step'] else '' -}}
{{- '@IMAGE' if part['type'] in ('image', 'image_url') else part['text'] -}}
{%- endfor -%}
{%- endset -%}
{%- set texts.messages = texts.messages + [dict(message, content=text)] -%}
{%- else -%}
{%- set texts.messages = texts.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = texts.messages %}
"""


def _template(
    tokenizer: PreTrainedTokenizerBase,
    start: str,
    end: str,
    image_token: str,
    close: str | None = None,
    lead: str = "",
    line_break: str = "",
) -> str:
    """Return a chat template, which begins each text with a token where the tokenizer does.

    Args:
        start: Jinja expression that opens the turn of `message`.
        end: what ends the assistant's turns, and is learnt with them.
        close: what ends the other turns; `end` when absent.
        lead: what stands before the text of a turn.
    """
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    text = TEMPLATE.replace("@BEGIN\n", "{{- bos_token -}}\n" if begins else "")
    text = text.replace("@START", start).replace("@IMAGE", image_token).replace("@END", end).replace("@LEAD", lead)
    return text.replace("@CLOSE", end if close is None else close).replace("@BREAK", line_break)


def default_chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str | None = IMAGE_TOKEN) -> str:
    """Return a chat template for messages with image and text parts.

    The tokenizer's own, made to take image parts where it does not; a warning says so where it cannot be kept. Where
    there is none, ChatML if the tokenizer has its marks; else `User: ...` and `Assistant: ...` lines, the assistant's
    ended by the end-of-sequence token.

    Args:
        image_token: the placeholder; `None` for a model of text alone.

    Raises:
        ValueError: if there is no template, and no end-of-sequence token to make one with.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own:
        reads_parts = image_token is None or image_token in own
        kept = own if reads_parts else TEXTS_OF_PARTS.replace("@IMAGE", str(image_token)) + own
        fault = _fault(tokenizer, kept, image_token)
        if fault is None:
            return kept
        logger.warning("The tokenizer's own chat template is replaced by a default one: %s.", fault)
    image = image_token or IMAGE_TOKEN
    if {"<|im_start|>", "<|im_end|>"} <= _special_tokens(tokenizer):
        start = "'<|im_start|>' + message['role'] + '\\n'"
        return _template(tokenizer, start, "<|im_end|>", image, line_break="\\n")
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template, and no end-of-sequence token to end an answer with: "
            "set tokenizer.eos_token, such as to its separator."
        )
    start = "(message['role'] | capitalize) + ':'"
    return _template(tokenizer, start, tokenizer.eos_token, image, close="", lead=" ", line_break="\\n")


def _fault(tokenizer: PreTrainedTokenizerBase, template: str, image_token: str | None) -> str | None:
    """Return why a template does not serve, `None` if it does."""
    image: list[dict[str, Any]] = [{"type": "image"}] if image_token else []
    parts = [*image, {"type": "text", "text": "question"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts if image_token else "question"},
        {"role": "assistant", "content": [{"type": "text", "text": "answer"}] if image_token else "answer"},
    ]
    try:
        prompt = _render(tokenizer, template, messages[:1], add_generation_prompt=True)
        text = _render(tokenizer, template, messages)
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"it fails ({type(error).__name__}: {error})"
    if "question" not in prompt or "answer" not in text[len(prompt) :] or not text.startswith(prompt):
        return f"it asks with {prompt!r}, and {text!r} is trained"
    if image_token and prompt.count(image_token) != 1:
        return f"it does not write {image_token} where an image stands"
    return None


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the end of the sequence, that of a turn in ChatML, and what the tokenizer's
    chat template writes after an answer."""
    vocabulary = tokenizer.get_vocab()
    ends = {tokenizer.eos_token, "<|im_end|>"}
    if isinstance(tokenizer.chat_template, str) and _fault(tokenizer, tokenizer.chat_template, None) is None:
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        rest = _render(tokenizer, tokenizer.chat_template, messages).rpartition("answer")[2].lstrip()
        ends |= {token for token in _special_tokens(tokenizer) if rest.startswith(token)}
    return sorted(vocabulary[token] for token in ends if token in vocabulary)


def add_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN) -> int:
    """Make the tokenizer know the placeholder, give it a padding token if it has none, and return the placeholder's
    id."""
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer.convert_tokens_to_ids(image_token)


def add_steps(tokenizer: PreTrainedTokenizerBase, steps: Iterable[str] = STEPS) -> list[int]:
    """Make the tokenizer know the markers of steps, and return their ids; before a model is built for it.

    A part of a message begins a step where it says so: `{"type": "image", "step": "draft", ...}` is written as
    `<|draft|><image>`. A tokenizer's own chat template that reads parts by itself writes no markers.

    Args:
        steps: their names.
    """
    markers = [f"<|{step}|>" for step in steps]
    added = [AddedToken(marker, special=True, normalized=False) for marker in markers]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer.convert_tokens_to_ids(markers)


def train_word_tokenizer(texts: Iterable[str], image_token: str = IMAGE_TOKEN) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, for decoders trained from scratch on a small vocabulary.

    Words and runs of punctuation are tokens; `<|user|>`, `<|assistant|>` and `<|end|>` frame the turns of its chat
    template, and `<|end|>` ends a sequence.

    Args:
        texts: what the vocabulary is made of, most frequent words first.
        image_token: the placeholder.
    """
    special = ["<pad>", "<unk>", image_token, "<|user|>", "<|assistant|>", "<|end|>"]
    words = learn_words(texts, special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>", padding_side="left"
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    tokenizer.chat_template = _template(tokenizer, "'<|' + message['role'] + '|>'", "<|end|>", image_token)
    return tokenizer


def learn_words(texts: Iterable[str], special: list[str]) -> Tokenizer:
    """Return the words and runs of punctuation of texts as tokens, the special ones before them."""
    words = Tokenizer(WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    trainer = WordLevelTrainer(special_tokens=special, show_progress=False)
    words.train_from_iterator(texts, trainer)
    return words
