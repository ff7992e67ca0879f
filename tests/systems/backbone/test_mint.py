"""MINT: two sets of weights for text and images, attention in both directions inside an image, and marked steps."""

import pytest
import torch
from helpers.caches import cache_of
from helpers.hosts.catalogue import HOSTS
from helpers.mechanisms import PICTURE, build, make_rows, until
from helpers.near import assert_near
from torch.utils.flop_counter import FlopCounterMode

from hf_moe import HfMoeConfig, from_system
from hf_moe.construction.tokenizer import add_steps, default_chat_template, train_word_tokenizer
from hf_moe.modeling.per_modality import PerModality


CASE = ("layer", "mot_transformers-blocks")


def mint(name="llava", **options):
    return from_system("mint", host=HOSTS[name].build(), **options).eval()


@torch.no_grad()
def logits_of(model, inputs, **extra):
    return model(**inputs, **extra).logits


def image_sees_itself(inputs, image):
    """Return the mask of a causal decoder in which the tokens of an image see each other, (B, 1, S, S)."""
    length = inputs["input_ids"].shape[1]
    both = image[:, :, None] & image[:, None, :]
    allowed = torch.ones(length, length).tril().bool() | both
    return (allowed & inputs["attention_mask"].bool()[:, None])[:, None]


def test_equal_sets_are_the_dense_model_with_that_mask():
    inputs, dense = HOSTS["llava"].inputs(), HOSTS["llava"].build()
    image, real = inputs["input_ids"] == dense.config.image_token_id, inputs["attention_mask"].bool()
    mask = image_sees_itself(inputs, image)
    expected = logits_of(dense, {**inputs, "attention_mask": mask})
    assert_near(logits_of(mint(), inputs)[real], expected[real], 1e-5)
    assert (expected - logits_of(dense, inputs))[real].abs().max() > 1e-2
    causal = mint(variant="causal")
    assert_near(logits_of(causal, inputs)[real], logits_of(dense, inputs)[real], 1e-5)


def test_an_image_reaches_text_through_attention_alone():
    model, inputs = build(*CASE), make_rows(build(*CASE))
    other = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    del other["input_ids"]
    changed = {**other, "inputs_embeds": other["inputs_embeds"].clone()}
    changed["inputs_embeds"][:, PICTURE.stop - 1] += 1.0
    moved = (logits_of(model, changed) - logits_of(model, other)).abs().amax((0, 2))
    assert (moved[PICTURE.start :] > 1e-3).all() and moved[: PICTURE.start].max() == 0
    apart = torch.ones(len(moved), len(moved)).tril().bool()
    apart[PICTURE.stop :, PICTURE] = False
    model.model.language_model.attention_blocks = None
    masked = [logits_of(model, {**rows, "attention_mask": apart.expand(3, 1, -1, -1)}) for rows in (changed, other)]
    assert torch.equal(masked[0][:, PICTURE.stop :], masked[1][:, PICTURE.stop :])


def test_text_alone_is_the_text_model_and_leaves_images_alone():
    model, dense = mint().train(), HOSTS["llava"].build()
    text = {"input_ids": torch.arange(3, 19)[None]}
    assert_near(logits_of(model, text), logits_of(dense, text), 1e-5)
    model(**text, labels=text["input_ids"]).loss.backward()
    for module in model.modules():
        if isinstance(module, PerModality):
            assert all(p.grad.any() for p in module.text.parameters())
            assert not any(p.grad.any() for p in module.image.parameters())


def test_a_token_costs_what_it_does_in_the_dense_model():
    counts = []
    for model in (mint(), mint(variant="ffn"), HOSTS["llava"].build().eval()):
        with FlopCounterMode(display=False) as counter:
            logits_of(model, HOSTS["llava"].inputs())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_after_an_image_is_exact(cache):
    model, inputs = mint("qwen2_5_vl"), HOSTS["qwen2_5_vl"].inputs()
    options = {"cache_implementation": "static"} if cache == "static" else {}
    found = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    added = torch.zeros(len(found.sequences), 4, dtype=torch.long)
    whole = {name: torch.cat([inputs[name], added], 1) for name in ("attention_mask", "mm_token_type_ids")}
    whole = {**inputs, "input_ids": found.sequences, **whole}
    whole["attention_mask"][:, -4:] = 1
    assert_near(torch.stack(found.logits, 1), logits_of(model, whole)[:, -5:-1], 1e-5)


def test_a_block_after_cached_tokens_is_whole():
    model, rows = build(*CASE), make_rows(build(*CASE))
    rows["input_ids"][:, 8:], rows["mm_token_type_ids"][:, 8:] = 9, 1
    first = model(**until(rows, PICTURE.stop + 1), use_cache=True)
    rest = {name: rows[name][:, PICTURE.stop + 1 :] for name in ("input_ids", "mm_token_type_ids")}
    found = logits_of(model, {**rest, "attention_mask": rows["attention_mask"]}, past_key_values=cache_of(first))
    assert_near(found, logits_of(model, rows)[:, PICTURE.stop + 1 :], 1e-5)


def test_steps_are_marked_in_chats():
    tokenizer = train_word_tokenizer(["draw a dog better now"])
    plan, draft, *_ = add_steps(tokenizer)
    image = {"type": "image", "step": "draft"}
    said = [{"type": "text", "text": "a dog ", "step": "plan"}, image, {"type": "text", "text": "better"}]
    chat = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": said}]
    own = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"
    for template in (own, default_chat_template(tokenizer)):
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        assert "<|plan|>a dog <|draft|><image>better" in text
        ids = tokenizer(text)["input_ids"]
        assert ids.count(plan) == ids.count(draft) == 1


def test_blocks_are_refused_where_others_make_the_mask():
    with pytest.raises(ValueError, match="makes the attention mask"):
        logits_of(mint("gemma3"), HOSTS["gemma3"].inputs())
    with pytest.raises(ValueError, match="is of the decoder"):
        HfMoeConfig(moe_config={"layers": []}, vision_moe_config={"attention_blocks": "image"}, image_token_id=3)
