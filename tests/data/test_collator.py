"""The collator: labels, padding, images and errors."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_moe.data import FeatureCache, VisionLanguageCollator, tokenize_rows


CHATML = (
    "{% for message in messages %}<im_start>{{ message.role }}\n"
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<im_end>\n"
    "{% endfor %}{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
)
UNCLOSED = (
    "{% for message in messages %}{{ message.role }} "
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ part.text }}{% endgeneration %}"
    "{% else %}{{ '<image>' if part.type == 'image' else part.text }} {% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if message.role == 'assistant' and not loop.last %}{% elif message.role == 'assistant' %}"
    "{{ part.text if messages[-1] == message else 'that' }} </s> "
    "{% else %}{{ '<image>' if part.type == 'image' else part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def learnt(batch, processor):
    """Return the words every row learns."""
    return [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]


def test_only_the_assistants_turns_are_learnt_with_the_token_that_ends_them(processor, rows):
    batch = VisionLanguageCollator(processor)(rows)
    assert learnt(batch, processor) == ["circle </s>", "no </s>", "red and blue </s> blue </s>", "yes </s>"]
    marked = batch["labels"] != -100
    assert torch.equal(batch["labels"][marked], batch["input_ids"][marked])


@pytest.mark.parametrize("template", [GENERATION, UNCLOSED], ids=["generation block", "turns without an end"])
def test_labels_follow_any_template(processor, rows, template):
    processor.chat_template = template
    expected = ["circle </s>", "no </s>", "yes </s>"]
    assert learnt(VisionLanguageCollator(processor)([rows[0], rows[1], rows[3]]), processor) == expected


def test_white_space_after_the_end_of_a_turn_is_not_learnt(processor, rows):
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<im_start>", "<im_end>"]})
    processor.chat_template = CHATML
    batch = VisionLanguageCollator(processor)(rows[:1])
    assert learnt(batch, processor) == ["circle <im_end>"]


def test_template_that_rewrites_earlier_turns_is_refused(processor, rows):
    processor.chat_template = FORGETFUL
    with pytest.raises(ValueError, match=r"Row 0 of the batch .*generation"):
        VisionLanguageCollator(processor)(rows[2:3])


def test_a_mark_after_a_generation_block_closes_each_answer(processor, rows):
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<end>"]})
    processor.chat_template = GENERATION.replace("</s>", "<end>")
    batch = VisionLanguageCollator(processor)(rows[2:3])
    assert learnt(batch, processor) == ["red and blue <end> blue <end>"]


def test_template_that_asks_otherwise_than_it_answers_is_refused(processor, rows):
    processor.chat_template = processor.chat_template.replace("%}assistant {%", "%}assistant that {%")
    with pytest.raises(ValueError, match="Row 0 of the batch .*something else than the generation prompt, which ends"):
        VisionLanguageCollator(processor)(rows[:1])


def test_training_and_generation_see_the_same_prompt(processor, rows):
    asked = VisionLanguageCollator(processor, train=False)(rows[:1])
    trained = VisionLanguageCollator(processor)(rows[:1])
    conversation = copy.deepcopy(rows[0]["messages"][:1])
    conversation[0]["content"][0]["image"] = rows[0]["images"][0]
    reference = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = reference["input_ids"].shape[1]
    assert torch.equal(asked["input_ids"], reference["input_ids"])
    assert torch.equal(trained["input_ids"][:, :length], reference["input_ids"])
    assert torch.equal(asked["pixel_values"], reference["pixel_values"])
    assert torch.equal(asked["mm_token_type_ids"], torch.as_tensor(reference["mm_token_type_ids"]))


def test_training_pads_right_and_prompts_pad_left(processor, rows):
    trained = VisionLanguageCollator(processor)(rows)
    assert trained["attention_mask"][1].tolist() == sorted(trained["attention_mask"][1].tolist(), reverse=True)
    asked = VisionLanguageCollator(processor, train=False)(rows)
    assert asked["attention_mask"][1].tolist() == sorted(asked["attention_mask"][1].tolist())
    assert "labels" not in asked
    assert (asked["input_ids"][:, -1] == processor.tokenizer.convert_tokens_to_ids("assistant")).all()


def test_batches_mix_rows_with_and_without_images(processor, rows, vlm):
    batch = VisionLanguageCollator(processor)(rows)
    assert batch["pixel_values"].shape[0] == 4
    assert (batch["mm_token_type_ids"] == 1).sum(-1).tolist() == [4, 0, 8, 4]
    assert vlm(**batch).loss.isfinite()
    text_only = VisionLanguageCollator(processor)(rows[1:2])
    assert "pixel_values" not in text_only
    assert vlm(**text_only).loss.isfinite()


def test_max_length_cuts_the_tail_but_never_an_image(processor, rows):
    whole = VisionLanguageCollator(processor)(rows[2:3])["input_ids"]
    last_image = (whole[0] == processor.image_token_id).nonzero().max().item()
    cut = VisionLanguageCollator(processor, max_length=last_image + 5)(rows[2:3])
    assert torch.equal(cut["input_ids"], whole[:, : last_image + 5])
    with pytest.raises(ValueError, match=r"Row 1 of the batch \(id \['second', 'third'\]\) .* would cut an image"):
        VisionLanguageCollator(processor, max_length=last_image)([rows[1], rows[2]])
    with pytest.raises(ValueError, match=r"Row 0 of the batch \(id 'first'\) has no assistant token to learn"):
        VisionLanguageCollator(processor, max_length=7)(rows[:1])


def test_wrong_number_of_images_names_the_row(processor, rows):
    rows[3] = {**rows[3], "images": rows[3]["images"] * 2, "id": "q17"}
    with pytest.raises(ValueError, match=r"Row 3 of the batch \(id 'q17'\) has 1 <image> placeholders and 2 images"):
        VisionLanguageCollator(processor)(rows)


def test_plain_string_content_puts_the_images_first(processor, rows):
    plain = [{"role": "user", "content": "what is this ?"}, {"role": "assistant", "content": "circle"}]
    expected = VisionLanguageCollator(processor)(rows[:1])
    batch = VisionLanguageCollator(processor)([{"messages": plain, "image": rows[0]["images"][0]}])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_tokenised_rows_give_the_same_batch(processor, rows, streaming):
    dataset = Dataset.from_list([rows[0], rows[3]])
    tokenized = tokenize_rows(dataset.to_iterable_dataset() if streaming else dataset, processor)
    expected = VisionLanguageCollator(processor)([rows[0], rows[3]])
    batch = VisionLanguageCollator(processor)(list(tokenized))
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_tokenising_names_the_row_of_the_dataset(processor, rows):
    broken = Dataset.from_list([rows[0], {**rows[3], "images": rows[3]["images"] * 2}])
    with pytest.raises(ValueError, match=r"Row 1 of the dataset \(id 'first'\) has 1 <image> placeholders"):
        tokenize_rows(broken, processor)


def test_rows_tokenised_for_another_processor_are_refused(processor, rows):
    tokenized = tokenize_rows(Dataset.from_list([rows[0]]), processor)
    processor.image_seq_length = 9
    with pytest.raises(ValueError, match="Row 0 .* has 4 placeholder tokens and 1 images of 9 tokens"):
        VisionLanguageCollator(processor)(list(tokenized))


def test_a_picture_that_the_cache_lacks_names_its_row(processor, rows):
    cache = FeatureCache({}, torch.zeros(0, 4, 32))
    with pytest.raises(
        ValueError, match=r"Row 0 of the batch \(id 'first'\) has an image 0 that is not in the feature"
    ):
        VisionLanguageCollator(processor, feature_cache=cache)(rows[:1])


def test_plain_trainer_trains_on_the_batches(processor, rows, vlm, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    before = vlm.lm_head.weight.detach().clone()
    dataset = Dataset.from_list([rows[0], rows[3]])
    trainer = Trainer(vlm, arguments, train_dataset=dataset, data_collator=VisionLanguageCollator(processor))
    assert trainer.train().training_loss > 0
    assert not torch.equal(vlm.lm_head.weight, before)


def test_trl_trains_on_the_batches(processor, rows, vlm, tmp_path):
    arguments = SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    before = vlm.lm_head.weight.detach().clone()
    dataset = Dataset.from_list([rows[0], rows[3]])
    SFTTrainer(
        vlm, arguments, VisionLanguageCollator(processor), train_dataset=dataset, processing_class=processor
    ).train()
    assert not torch.equal(vlm.lm_head.weight, before)
