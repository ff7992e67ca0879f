"""Word tokenizers and chat templates."""

import pytest

from hf_moe.construction.tokenizer import add_image_token, default_chat_template, end_of_turn, train_word_tokenizer


TEXTS = ["what color is the shape ? red", "is there a circle ? yes"]
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the shape ?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}


@pytest.fixture
def tokenizer():
    return train_word_tokenizer(TEXTS)


def learnt_text(tokenizer, messages):
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return tokenizer.convert_ids_to_tokens([token for token, learnt in marked if learnt])


def test_words_and_punctuation_are_tokens_and_decode_cleanly(tokenizer):
    ids = tokenizer("what color?")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["what", "color", "?"]
    assert (
        tokenizer.decode([tokenizer.convert_tokens_to_ids("red"), tokenizer.eos_token_id], skip_special_tokens=True)
        == "red"
    )
    assert tokenizer("purple")["input_ids"] == [tokenizer.unk_token_id]


def test_word_template_frames_turns_and_marks_the_answer(tokenizer):
    text = tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)
    assert text == "<|user|><image>what color is the shape ?<|end|><|assistant|>red<|end|>"
    assert learnt_text(tokenizer, [QUESTION, ANSWER, QUESTION, ANSWER]) == ["red", "<|end|>"] * 2
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|assistant|>")


def test_special_tokens_survive_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("<image>red<|end|>")["input_ids"] == tokenizer("<image>red<|end|>")["input_ids"]
    assert len(again("<image>red<|end|>")["input_ids"]) == 3


def test_chatml_where_the_tokenizer_has_its_marks(tokenizer):
    tokenizer.chat_template = None
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = default_chat_template(tokenizer)
    text = tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)
    assert text == (
        "<|im_start|>user\n<image>what color is the shape ?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    assert learnt_text(tokenizer, [QUESTION, ANSWER]) == ["red", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ["<|end|>", "<|im_end|>"]


def test_plain_turns_where_the_tokenizer_has_no_marks(tokenizer):
    tokenizer.chat_template = None
    tokenizer.chat_template = default_chat_template(tokenizer)
    question = {"role": "user", "content": "is there a circle ?"}
    text = tokenizer.apply_chat_template([question, ANSWER], tokenize=False)
    assert text == "User: is there a circle ?\nAssistant: red<|end|>\n"
    assert learnt_text(tokenizer, [question, ANSWER]) == ["red", "<|end|>"]


def test_a_template_that_takes_images_is_kept(tokenizer):
    assert default_chat_template(tokenizer) == tokenizer.chat_template


def test_image_token_is_added_once(tokenizer):
    size = len(tokenizer)
    first = add_image_token(tokenizer, "<picture>")
    assert first == size
    assert add_image_token(tokenizer, "<picture>") == first and len(tokenizer) == size + 1
