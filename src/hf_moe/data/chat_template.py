"""What a chat template makes of a conversation: its text, the answers in it, and their prompts."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .messages import Message
from .placeholders import media_tokens
from .text import TextProcessor


AnyProcessor: TypeAlias = ProcessorMixin | TextProcessor
Tokens: TypeAlias = tuple[list[int], list[int]]
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
LINKS = {"tool_call_id"}  # names another message's tool call, which templates write by its order


@dataclass
class Answer:
    """An assistant turn within a rendered conversation: its message, the text that asks for it, what is learnt."""

    index: int
    prompt: str
    spans: list[tuple[int, int]]  # of characters

    @property
    def end(self) -> int:
        return max(last for _, last in self.spans)


@dataclass
class Conversation:
    """A rendered conversation; each image, video and sound is a placeholder in its text."""

    text: str
    answers: list[Answer]
    is_open: bool  # whether something follows the last answer
    tokens: Tokens | None = None  # ids and labels, once they are known

    def _positions(self) -> list[int]:
        ends = {end for answer in self.answers for span in answer.spans for end in span}
        return sorted({*ends, *(len(answer.prompt) for answer in self.answers), len(self.text)})

    def marked(self, mark: str) -> str:
        """Return the text with a mark wherever an answer begins or ends, and at its end."""
        positions = self._positions()
        pieces = (self.text[first:last] for first, last in zip([0, *positions], positions, strict=False))
        return "".join(f"{piece}{mark}" for piece in pieces)

    def expanded(self, marked: str, mark: str) -> "Conversation":
        """Return the conversation whose text, as [`marked`] gives it, a processor has expanded."""
        pieces, positions = marked.split(mark), self._positions()
        if len(pieces) != len(positions) + 1:
            raise ValueError(f"the processor changed the text beyond its placeholders: {marked!r:.200}")
        *ends, _ = accumulate(map(len, pieces))
        moved = dict(zip(positions, ends, strict=True))
        text = "".join(pieces)
        answers = []
        for answer in self.answers:
            spans = [(moved[first], moved[last]) for first, last in answer.spans]
            answers.append(Answer(answer.index, text[: moved[len(answer.prompt)]], spans))
        return Conversation(text, answers, self.is_open)


class ChatTemplate:
    """A processor's chat template and the way in which its prompts become ids, which must be those of their text."""

    def __init__(self, processor: AnyProcessor):
        self.processor = processor
        tokenizer = processor.tokenizer
        added = tokenizer.added_tokens_decoder
        self.special_ids = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        specials = {tokenizer.convert_ids_to_tokens(index) for index in self.special_ids}
        self._special = "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)"
        template = processor.chat_template
        self._source = template if isinstance(template, str) else template["default"]
        self._adds_special_tokens = self._processor_adds_special_tokens()

    def _processor_adds_special_tokens(self) -> bool:
        content: Any = [{"type": "text", "text": "a"}] if media_tokens(self.processor) else "a"
        probe = [{"role": "user", "content": content}]
        try:
            text = self.render(probe, {}, add_generation_prompt=True)
        except ValueError:  # a template may want other turns than these
            return False
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        asked = self.processor.apply_chat_template(probe, **options)["input_ids"]
        asked = list(asked[0] if len(asked) and not isinstance(asked[0], int) else asked)
        for added in (False, True):
            if self.processor.tokenizer(text, add_special_tokens=added)["input_ids"] == asked:
                return added
        raise ValueError(
            f"The processor gives the prompt {text!r} other ids than its tokenizer: {asked}. What is trained would "
            "not be what generation is asked for."
        )

    def encode(self, text: str) -> Any:
        """Return ids and offsets of a text, with the special tokens that the processor gives a prompt."""
        tokenizer = self.processor.tokenizer
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        added = self._adds_special_tokens and not begins
        return tokenizer(text, add_special_tokens=added, return_offsets_mapping=True)

    def render(self, messages: list[Message], options: dict[str, Any], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation."""
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **options)
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"cannot be rendered by the chat template (turns: {roles}): {type(error).__name__}: {error}"
            ) from error

    def check_fields(self, messages: list[Message], options: dict[str, Any]) -> None:
        """Refuse a field of a message or a part, or an option, without which the text is the same."""
        changed = list(_without_a_field(messages))
        if not changed and not options:
            return
        text = self.render(messages, options)
        for field, fewer in changed:
            if self.render(fewer, options) == text:
                raise ValueError(f"has {field}, which the chat template does not read: take it out.")
        for name, value in options.items():
            rest = _without(options, name)
            prompts = [self.render(messages, given, add_generation_prompt=True) for given in (options, rest)]
            if prompts[0] == prompts[1] and self.render(messages, rest) == text:
                raise ValueError(f"has {name}={value!r:.100}, which the chat template does not read: take it out.")

    def answers(self, messages: list[Message], options: dict[str, Any]) -> tuple[str, list[Answer]]:
        """Return the text of a conversation, and the answers in it from which something is learnt."""
        text = self.render(messages, options)
        marked = self._marked(messages, options) if GENERATION_BLOCK.search(self._source) else None
        indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [self.render(messages[:index], options, add_generation_prompt=True) for index in indices]
        answers = []
        for number, (index, prompt) in enumerate(zip(indices, prompts, strict=True)):
            if not text.startswith(prompt):
                raise ValueError(
                    f"has an answer (message {index}) before which the chat template writes something else than the "
                    f"generation prompt, which ends in {prompt[-40:]!r}: the model would be asked otherwise than "
                    "trained."
                )
            begin, limit = len(prompt), len(prompts[number + 1]) if number + 1 < len(prompts) else len(text)
            if marked is None:
                spans = [(begin, self._end_of_turn(messages[: index + 1], options, text, begin))]
            else:
                spans = [(max(first, begin), min(last, limit)) for first, last in marked if begin < last]
                spans = [(first, last) for first, last in spans if first < last]
                if spans:
                    first, last = spans[0]
                    if not text[begin:first].strip():  # white space before the answer is asked for too
                        spans[0] = (begin, last)
                    first, last = spans[-1]
                    spans[-1] = (first, self._close(text, first, last))
            if spans:
                answers.append(Answer(index, prompt, spans))
        return text, answers

    def _marked(self, messages: list[Message], options: dict[str, Any]) -> list[tuple[int, int]]:
        """Return the characters within the template's generation blocks."""
        _, marked = render_jinja_template(
            conversations=[messages],
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            **{**self.processor.tokenizer.special_tokens_map, **options},
        )
        return marked[0]

    def _end_of_turn(self, messages: list[Message], options: dict[str, Any], text: str, begin: int) -> int:
        """Return the end of the last turn of `messages` within `text`, with the special token that closes it."""
        turn = self.render(messages, options)
        end = self._close(turn, begin, len(turn))
        if not text.startswith(turn[:end]):
            raise ValueError(
                f"has an assistant turn (message {len(messages) - 1}) that the chat template renders differently once "
                "more turns follow: mark it in the template with {% generation %} ... {% endgeneration %}."
            )
        return end

    def _close(self, text: str, begin: int, end: int) -> int:
        """Return the end of the special token that closes `text[begin:end]`, within it or right after it."""
        within = re.compile(rf"({self._special})(\s|{self._special})*\Z").search(text[:end], begin)
        if within:
            return within.end(1)
        after = re.compile(rf"\s*({self._special})").match(text, end)
        return after.end() if after else max(begin, len(text[:end].rstrip()))


def _without_a_field(messages: list[Message]) -> Iterator[tuple[str, list[Message]]]:
    """Give, for each field that not every message or part has, its name and the messages without it."""
    for index, message in enumerate(messages):

        def instead(fewer: dict[str, Any], index: int = index) -> list[Message]:
            return [*messages[:index], fewer, *messages[index + 1 :]]

        for name in message.keys() - {"role", "content", *LINKS}:
            yield f"{name}={message[name]!r:.100} in message {index}", instead(_without(message, name))
        parts = message["content"] if isinstance(message["content"], list) else []
        for position, part in enumerate(parts):
            for name in part.keys() - {"type", "text"}:
                fewer = [*parts[:position], _without(part, name), *parts[position + 1 :]]
                where = f"{name}={part[name]!r:.100} in a part of message {index}"
                yield where, instead({**message, "content": fewer})


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in fields.items() if other != name}
