"""Generation: with a cache and without, by every strategy, over images."""

import pytest
import torch
from helpers.caches import cache_of


GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "top_k": 20, "temperature": 1.5}
BEAMS = {"do_sample": False, "num_beams": 3}


def generate(model, batch, seed=0, **options):
    torch.manual_seed(seed)
    model.generation_config.suppress_tokens = [95]
    return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **options)


@pytest.mark.parametrize("host", ["llama", "gemma3_text"])
@pytest.mark.parametrize("strategy", [GREEDY, SAMPLED, BEAMS], ids=["greedy", "sampled", "beams"])
def test_cached_equals_uncached(tiny_model, batch, strategy, host):
    model = tiny_model(host, {"head_dim": 8} if host == "gemma3_text" else {})
    cached = generate(model, batch, use_cache=True, **strategy)
    assert torch.equal(cached, generate(model, batch, use_cache=False, **strategy))
    assert cached.shape == (4, batch["input_ids"].shape[1] + 6)
    if strategy is SAMPLED:
        assert not torch.equal(cached, generate(model, batch, seed=1, **strategy))


@pytest.mark.parametrize("strategy", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_static_cache_equals_dynamic(tiny_model, batch, strategy):
    model = tiny_model()
    expected = generate(model, batch, **strategy)
    # `generate` would compile the decoding step, which takes longer than it saves here.
    actual = generate(model, batch, cache_implementation="static", disable_compile=True, **strategy)
    assert torch.equal(actual, expected)


def test_a_batch_generates_what_its_rows_generate(tiny_model, rows, batch):
    model = tiny_model()
    together = generate(model, batch)[:, -6:]
    for index, item in enumerate(rows):
        pixels = {"pixel_values": item["pixel_values"]} if len(item["pixel_values"]) else {}
        alone = generate(model, {"input_ids": item["input_ids"][None], **pixels})
        assert torch.equal(alone[0, -6:], together[index])


def test_beams_over_rows_with_several_images_equal_single_rows(tiny_model, rows, batch):
    model = tiny_model()
    together = generate(model, batch, **BEAMS)[:, -6:]
    for index, item in enumerate(rows):
        pixels = {"pixel_values": item["pixel_values"]} if len(item["pixel_values"]) else {}
        alone = generate(model, {"input_ids": item["input_ids"][None], **pixels}, **BEAMS)
        assert torch.equal(alone[0, -6:], together[index])


def test_the_beams_of_a_row_share_its_condition(tiny_model, text_batch):
    model = tiny_model(tower=False, moe_config={"router": "condition", "num_experts": 4, "objectives": {}})
    tasks = torch.arange(len(text_batch["input_ids"])) % 4

    def of(rows):
        given = {name: text_batch[name][rows] for name in ("input_ids", "attention_mask")}
        return generate(model, {**given, "condition_ids": {"task": tasks[rows]}}, **BEAMS)

    assert torch.equal(of(slice(None)), torch.cat([of(slice(row, row + 1)) for row in range(len(tasks))]))


@pytest.mark.parametrize("strategy", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_features_computed_before_generate_the_same(tiny_model, batch, strategy):
    model = tiny_model()
    expected = generate(model, batch, **strategy)
    pixels = batch.pop("pixel_values")
    with torch.no_grad():
        features = model.get_image_features(pixels).last_hidden_state
    assert torch.equal(generate(model, {**batch, "image_features": features}, **strategy), expected)


def test_generation_sees_the_image(tiny_model, batch):
    model = tiny_model()
    other = {**batch, "pixel_values": -3 * batch["pixel_values"]}
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits[0, -1], model(**other).logits[0, -1])
    assert torch.equal(generate(model, batch)[1], generate(model, other)[1]), "the row without images stays"


def test_decoding_routes_new_tokens_as_text_and_by_the_same_experts_as_a_full_forward(tiny_model, make_batch):
    model = tiny_model()
    batch = make_batch([(2, 5, 0)])
    full = model(**batch, output_routing=True).routing
    prefix = {**batch, "input_ids": batch["input_ids"][:, :-1], "attention_mask": batch["attention_mask"][:, :-1]}
    with torch.no_grad():
        cache = cache_of(model(**prefix, use_cache=True))
        step = model(
            input_ids=batch["input_ids"][:, -1:],
            attention_mask=batch["attention_mask"],
            cache=cache,
            output_routing=True,
        ).routing
    assert step.modality_ids.tolist() == [[0]]
    for layer, decision in step.decisions.items():
        assert torch.equal(decision.expert_index[0], full.decisions[layer].expert_index[-1])


def test_modality_ids_may_be_given_to_generate(tiny_model, batch):
    model = tiny_model(moe_config={"router": {"name": "moiie"}, "num_experts": 4})
    expected = generate(model, batch)
    given = (batch["input_ids"] == 95).long()
    assert torch.equal(generate(model, {**batch, "mm_token_type_ids": given}), expected)


def test_prompt_lookup_and_assisted_decoding_equal_greedy(tiny_model, make_batch):
    model = tiny_model()
    batch = make_batch([(1, 9, 0)])
    expected = generate(model, batch)
    assert torch.equal(generate(model, batch, prompt_lookup_num_tokens=2), expected)


def test_contrastive_inputs_are_dropped_outside_the_prefill(tiny_model, batch):
    model, calls = tiny_model(), []
    tower = model.model.vision_tower
    tower.register_forward_hook(lambda *_: calls.append(1))
    generate(model, batch)
    assert len(calls) == 1, "the tower runs for the prompt alone"


CACHES = {"no cache": {"use_cache": False}, "a cache": {}, "a static cache": {"cache_implementation": "static"}}


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
def test_placeholders_without_images_are_not_answered(tiny_model, batch, options):
    model = tiny_model()
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    count = int((batch["input_ids"] == model.config.image_token_id).sum())
    with pytest.raises(ValueError, match=f"{count} placeholder tokens in the text, no images: pass pixel_values"):
        generate(model, asked, disable_compile=True, **options)


def test_a_placeholder_after_a_cached_prompt_is_a_token(tiny_model, batch):
    model = tiny_model()
    with torch.no_grad():
        prompt = model(**batch, use_cache=True)
        placeholder = torch.full((4, 1), model.config.image_token_id)
        assert model(placeholder, past_key_values=cache_of(prompt)).logits.isfinite().all()
