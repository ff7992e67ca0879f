"""An answer is trained as it will be asked for, whatever the tokenizer and its chat template."""

import pytest
from helpers.tokenizer_kinds import VARIANTS, make_tokenizer
from PIL import Image
from transformers import CLIPImageProcessor

from hf_moe import HfMoeProcessor
from hf_moe.construction.tokenizer import default_chat_template
from hf_moe.data import TextProcessor
from hf_moe.data.tokenisation import IGNORE_INDEX, ConversationTokenizer


def turn(role, text, image=False):
    return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


ASKED = turn("user", "what colour is this?", image=True)
CONVERSATIONS = {
    "one turn": [ASKED, turn("assistant", "red")],
    "a system turn": [turn("system", "be brief."), ASKED, turn("assistant", "007")],
    "turns": [ASKED, turn("assistant", "red"), turn("user", "is it?"), turn("assistant", "(green), it seems")],
    "answers in a row": [ASKED, turn("assistant", "red"), turn("assistant", " a circle")],
    "an empty answer": [ASKED, turn("assistant", "")],
    "a question at the end": [ASKED, turn("assistant", "3.50"), turn("user", "what?")],
}
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (  # asks with white space at its end, as many do
    "{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: {{ message['content'] }}</s>"
    "{% else %}USER: {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
OPEN = (
    "{% for message in messages %}\n{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant:{% endif %}"
)
TEMPLATES = {"none": None, "chatml": CHATML, "vicuna": VICUNA, "open": OPEN}


def make_processor(kind, ends, prefix, template, sees):
    tokenizer = make_tokenizer(kind, ends, prefix)
    if template == CHATML:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.chat_template = default_chat_template(tokenizer, "<image>" if sees else None)
    if not sees:
        return TextProcessor(tokenizer)
    images = CLIPImageProcessor(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8})
    return HfMoeProcessor(images, tokenizer, image_seq_length=1, chat_template=tokenizer.chat_template)


def asked_ids(processor, messages):
    """Return the ids with which generation asks."""
    if processor.image_token is None:
        messages = [{**message, "content": message["content"][-1]["text"]} for message in messages]
    else:
        shown = {"type": "image", "image": Image.new("RGB", (8, 8))}
        messages = [
            {**message, "content": [shown if part["type"] == "image" else part for part in message["content"]]}
            for message in messages
        ]
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = ids["input_ids"]
    return list(ids[0]) if isinstance(ids[0], list) else list(ids)


def check(processor, messages):
    """Check that each prompt is a prefix of what is trained, and that one mark ends each answer."""
    tokenizer = processor.tokenizer
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")} - {None, tokenizer.unk_token_id}
    num_images = 0 if processor.image_token is None else 1
    if not num_images:
        messages = [{**message, "content": message["content"][-1:]} for message in messages]
    trained, labels = ConversationTokenizer(processor)(messages, {"image": num_images})
    learnt = [position for position, label in enumerate(labels) if label != IGNORE_INDEX]
    asked_only = ConversationTokenizer(processor, train=False)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = asked_ids(processor, messages[:index])
        assert trained[: len(prompt)] == prompt
        assert asked_only(messages[: index + 1], {"image": num_images})[0] == prompt
        own = [position for position in learnt if position >= len(prompt)]
        end = next(position for position in own if trained[position] in ends)
        answer = [position for position in own if position <= end]
        assert answer == list(range(len(prompt), end + 1))
        written = tokenizer.decode([trained[position] for position in answer[:-1]])
        wanted = message["content"][-1]["text"]
        wanted = tokenizer.decode(tokenizer(wanted, add_special_tokens=False)["input_ids"])
        assert "".join(written.split()) == "".join(wanted.split())
        learnt = [position for position in learnt if position not in answer]
    assert not learnt


def refusal(kind, template, conversation):
    """Return what may be said of several answers that cannot all be asked for as they would be trained."""
    if conversation not in ("turns", "answers in a row", "a question at the end"):
        return None
    if template == "open":
        return "ends with no special token although more turns follow"
    return "change once more turns follow" if template == "vicuna" or kind == "metaspace unsplit" else None


def check_or_refuse(kind, ends, prefix, template, conversation):
    message = refusal(kind, template, conversation)
    for sees in (True, False):
        processor = make_processor(kind, ends, prefix, TEMPLATES[template], sees)
        try:
            check(processor, CONVERSATIONS[conversation])
        except ValueError as error:
            assert message is not None and message in str(error)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kind, ends, prefix", VARIANTS)
def test_default_template_asks_as_it_trains(kind, ends, prefix, conversation):
    check_or_refuse(kind, ends, prefix, "none", conversation)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "none"])
@pytest.mark.parametrize("kind, prefix", [(kind, prefix) for kind, ends, prefix in VARIANTS if ends == "bos and eos"])
def test_own_template_is_kept_and_asks_as_it_trains(kind, prefix, template, conversation, caplog):
    check_or_refuse(kind, "bos and eos", prefix, template, conversation)
    assert not caplog.records


@pytest.mark.parametrize(
    "template, message",
    [
        ("vicuna", "answer 0 change once more turns follow: .* must not end in white space"),
        ("open", "no special token"),
    ],
)
def test_answers_that_would_be_asked_otherwise_are_refused(template, message):
    processor = make_processor("byte-level", "bare", False, TEMPLATES[template], False)
    messages = [{**message, "content": message["content"][-1:]} for message in CONVERSATIONS["turns"]]
    with pytest.raises(ValueError, match=message):
        ConversationTokenizer(processor)(messages, {})


@pytest.mark.parametrize("kind, ends, prefix", [variant for variant in VARIANTS if variant[1].startswith("bos")])
def test_rendered_prompt_has_the_ids_and_one_beginning(kind, ends, prefix):
    processor = make_processor(kind, ends, prefix, None, True)
    prompt = [{"role": "user", "content": [{"type": "text", "text": "what colour?"}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    rendered = processor(text=text)["input_ids"]
    asked = asked_ids(processor, prompt)
    assert list(rendered[0] if isinstance(rendered[0], list) else rendered) == asked
    assert asked.count(processor.tokenizer.bos_token_id) == 1 and asked[0] == processor.tokenizer.bos_token_id


BROKEN = {
    "fails": "{{ raise_exception('no') }}",
    "asks otherwise": "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}",
    "loses questions": "{% for m in messages if m.role == 'assistant' %}{{ m.content }}</s>{% endfor %}",
    "loses images": "{% for m in messages %}{{ m.role }}: {{ m.content.split('>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}


@pytest.mark.parametrize("template", BROKEN)
def test_template_that_cannot_be_kept_is_announced(template, caplog):
    check(make_processor("byte-level", "bos", False, BROKEN[template], True), CONVERSATIONS["turns"])
    assert "own chat template is replaced by a default one" in caplog.text


def test_tokenizer_without_an_end_is_refused():
    tokenizer = make_tokenizer("byte-level")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        default_chat_template(tokenizer)


@pytest.mark.parametrize("written", ["red</s>", "red</s></s>", "red </s>", "red</s>\n"])
@pytest.mark.parametrize("template", ["none", "vicuna", "open"])
def test_answer_that_ends_itself_learns_one_mark(template, written):
    processor = make_processor("byte-level", "bare", False, TEMPLATES[template], False)
    tokenizer = processor.tokenizer
    trained, labels = ConversationTokenizer(processor)([turn("user", "what?"), turn("assistant", written)], {})
    learnt = [label for label in labels if label != IGNORE_INDEX]
    assert learnt.count(tokenizer.eos_token_id) == 1 and learnt[-1] == tokenizer.eos_token_id == trained[-1]
    assert tokenizer.decode(learnt[:-1]).strip() == "red"


@pytest.mark.parametrize("answer", ["a </s> b", "<image>"])
def test_answer_that_writes_a_mark_is_refused(answer):
    processor = make_processor("byte-level", "bare", False, None, True)
    with pytest.raises(ValueError, match="answer .message 1. (with an end mark|that writes <image>)"):
        ConversationTokenizer(processor)([ASKED, turn("assistant", answer)], {"image": 1})
