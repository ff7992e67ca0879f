"""What Transformers promises of every model that generates, beyond equal tokens: outputs, embeddings, continuation."""

import pytest
import torch
from transformers import StaticCache


NEW = 4
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 8},
    "beams": {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
    "beams sampled": {"do_sample": True, "num_beams": 2},
}
# The placeholder of an image is no word that a model should write.
EXACT = {"max_new_tokens": NEW, "min_new_tokens": NEW, "suppress_tokens": [95]}
GREEDY = {**EXACT, "do_sample": False}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_generation_returns_what_every_step_computed(tiny_model, batch, strategy, use_cache):
    model = tiny_model()
    model.set_attn_implementation("eager")
    wanted = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), True)
    outputs = model.generate(**batch, **strategy, **EXACT, **wanted, use_cache=use_cache, return_dict_in_generate=True)
    prompt, width = batch["input_ids"].shape[1], 96
    rows = len(batch["input_ids"]) * strategy.get("num_beams", 1)
    assert outputs.sequences.shape[1] == prompt + NEW
    assert [len(getattr(outputs, name)) for name in ("scores", "logits", "hidden_states", "attentions")] == [NEW] * 4
    assert {logits.shape for logits in (*outputs.scores, *outputs.logits)} == {(rows, width)}
    layers = model.config.text_config.num_hidden_layers
    for step, (hidden, attentions) in enumerate(zip(outputs.hidden_states, outputs.attentions, strict=True)):
        known = prompt + step
        queries = known if step == 0 or not use_cache else 1
        assert [state.shape for state in hidden] == [(rows, queries, 32)] * (layers + 1)
        assert [item.shape for item in attentions] == [(rows, 4, queries, known)] * layers


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_embeddings_generate_what_their_ids_generate(tiny_model, text_batch, cache):
    model = tiny_model()
    ids, mask = text_batch["input_ids"], text_batch["attention_mask"]
    options = {**GREEDY, "attention_mask": mask, "cache_implementation": cache}
    expected = model.generate(ids, **options)[:, ids.shape[1] :]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), expected)
    # With the ids beside them, these are returned in front.
    assert torch.equal(model.generate(ids, inputs_embeds=embeddings, **options)[:, ids.shape[1] :], expected)
    others = model.generate(inputs_embeds=embeddings.flip(1), **options)
    assert not torch.equal(others, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_goes_on_from_its_cache(tiny_model, batch, cache):
    model = tiny_model()
    whole = model.generate(**batch, **GREEDY)
    prompt = batch["input_ids"].shape[1]
    argument = model.model.cache_argument
    given = {}
    if cache == "static":
        given = {argument: StaticCache(config=model.config.text_config, max_cache_len=prompt + NEW)}
    halves = {**GREEDY, "max_new_tokens": NEW // 2, "min_new_tokens": NEW // 2}
    first = model.generate(**batch, **halves, **given, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW // 2), value=1)
    again = {"attention_mask": mask, argument: getattr(first, argument)}
    assert torch.equal(model.generate(first.sequences, **again, **halves), whole)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 2, 5])], ids=["last", "last three", "chosen"])
def test_logits_kept_are_those_of_all(tiny_model, batch, kept):
    model = tiny_model()
    whole = model(**batch).logits
    expected = whole[:, kept] if isinstance(kept, torch.Tensor) else whole[:, -kept:]
    torch.testing.assert_close(model(**batch, logits_to_keep=kept).logits, expected)


def test_generation_asks_for_the_last_logits_alone(tiny_model, batch):
    model = tiny_model()
    kept = []
    model.lm_head.register_forward_pre_hook(lambda module, args: kept.append(args[0].shape[1]))
    model.generate(**batch, **GREEDY)
    assert kept == [1] * NEW


@pytest.mark.parametrize("size", [104, 96 + 1])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resized_vocabulary_generates_as_before(tiny_model, batch, size, tied):
    model = tiny_model(host_fields={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    before = model(**batch).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.text_config.vocab_size == size
    after = model(**batch).logits
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :96], before)
    batch["input_ids"][0, -1] = size - 1
    assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + NEW


def test_left_padding_changes_no_logits(tiny_model, text_batch):
    model = tiny_model()
    ids = text_batch["input_ids"][:1, -5:]
    padded = torch.nn.functional.pad(ids, (6, 0), value=0)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (6, 0))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    actual = model(padded, attention_mask=mask, position_ids=positions).logits[:, 6:]
    torch.testing.assert_close(actual, model(ids).logits, rtol=1e-4, atol=1e-5)
