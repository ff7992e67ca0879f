"""Malformed inputs are refused with one clear error, and what inputs tell of their tokens is used."""

import pytest
import torch
from helpers.image_rows import IMAGE, collate, labels_of, row
from transformers import DynamicCache, LlamaConfig

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.modeling import inputs
from hf_moe.modeling.inputs import real_tokens


# What is changed of two rows of 11 tokens, the first with an image, and what the error says.
MALFORMED = {
    "ids as a list": ({"input_ids": [[3, 4]]}, r"input_ids must have the shape \(rows, tokens\) .*, got list"),
    "ids of one row": ({"input_ids": torch.ones(11).long()}, r"input_ids .*int64 of the shape \(11,\)"),
    "float ids": ({"input_ids": torch.ones(2, 11)}, r"input_ids must .* hold integers, got float32"),
    "negative ids": ({"input_ids": torch.full((2, 11), -1)}, r"input_ids must be 0 to 95 .*, got -1 at \(0, 0\)"),
    "unknown ids": ({"input_ids": torch.full((2, 11), 96)}, r"input_ids must be 0 to 95 \(the decoder's vocab_size\)"),
    "mask of one row": ({"attention_mask": torch.ones(11)}, "attention_mask must have 2 or 4 dimensions"),
    "mask of three dimensions": ({"attention_mask": torch.ones(2, 11, 11)}, "attention_mask must have 2 or 4"),
    "mask of other rows": ({"attention_mask": torch.ones(3, 11)}, "attention_mask must cover 2 rows of 11 tokens"),
    "shorter mask": ({"attention_mask": torch.ones(2, 10)}, r"attention_mask .* got float32 of the shape \(2, 10\)"),
    "longer mask": ({"attention_mask": torch.ones(2, 12)}, r"attention_mask .* got float32 of the shape \(2, 12\)"),
    "additive 2-D mask": (
        {"attention_mask": torch.full((2, 11), -1e9)},
        "attention_mask must hold 1 for tokens and 0",
    ),
    "mask of documents": ({"attention_mask": torch.full((2, 11), 2)}, "attention_mask must hold 1 .*, got .2"),
    "float positions": ({"position_ids": torch.ones(2, 11)}, "position_ids must be integers, one for each of the 11"),
    "fewer positions": ({"position_ids": torch.ones(2, 10).long()}, r"position_ids must .* of the shape \(2, 10\)"),
    "negative positions": ({"position_ids": torch.full((2, 11), -3)}, r"position_ids must be 0 or more, got -3"),
    "modalities of other tokens": (
        {"mm_token_type_ids": torch.zeros(2, 10).long()},
        r"mm_token_type_ids must have the shape \(2, 11\)",
    ),
    "float modalities": ({"mm_token_type_ids": torch.zeros(2, 11)}, "mm_token_type_ids must .* got float32"),
    "unknown modality": (
        {"mm_token_type_ids": torch.full((2, 11), 4)},
        r"mm_token_type_ids must be 0 to 3 \(the modalities text, image, video, audio\), got 4",
    ),
    "negative modality": ({"mm_token_type_ids": torch.full((2, 11), -1)}, "mm_token_type_ids must be 0 to 3"),
    "conditions as a tensor": ({"condition_ids": torch.zeros(2).long()}, "condition_ids must be a dict"),
    "a condition of three dimensions": (
        {"condition_ids": {"task": torch.zeros(2, 11, 3).long()}},
        r"condition_ids\['task'\] must have the shape \(2,\) of the rows",
    ),
    "conditions of other rows": ({"condition_ids": {"task": torch.zeros(3).long()}}, r"condition_ids\['task'\]"),
    "float conditions": ({"condition_ids": {"task": torch.zeros(2)}}, r"condition_ids\['task'\] .* got float32"),
    "negative condition": ({"condition_ids": {"task": torch.tensor([0, -1])}}, r"condition_ids\['task'\] .*, got -1"),
    "integer pixels": (
        {"pixel_values": torch.zeros(1, 3, 16, 16).byte()},
        r"pixel_values must be floating point of the shape \(images, 3, height, width\), .* got uint8",
    ),
    "pixels as a list": ({"pixel_values": [torch.zeros(3, 16, 16)]}, "pixel_values must .*, got list"),
    "one image without a batch": ({"pixel_values": torch.zeros(3, 16, 16)}, r"pixel_values .* \(3, 16, 16\)"),
    "grey images": ({"pixel_values": torch.zeros(1, 1, 16, 16)}, r"pixel_values .* \(1, 1, 16, 16\)"),
    "channels last": ({"pixel_values": torch.zeros(1, 16, 16, 3)}, r"pixel_values .* \(1, 16, 16, 3\)"),
    "images of another size": (
        {"pixel_values": torch.zeros(1, 3, 24, 24)},
        r"pixel_values of the shape \(1, 3, 24, 24\) do not fit the tower .* 16 x 16",
    ),
    "too many images": (
        {"pixel_values": torch.zeros(2, 3, 16, 16)},
        "4 placeholder tokens .* 8 features from 2 images",
    ),
    "an empty batch of images": ({"pixel_values": torch.zeros(0, 3, 16, 16)}, "4 placeholder tokens .* no images"),
    "features of another width": (
        {"pixel_values": None, "image_features": torch.zeros(1, 4, 7)},
        r"image_features must be floating point of the shape \(images, patches, 24\), got .*\(1, 4, 7\)",
    ),
    "integer features": (
        {"pixel_values": None, "image_features": torch.zeros(1, 4, 24).int()},
        "image_features .* int32",
    ),
    "outputs of another encoder": ({"mm_encoder_outputs": {"audio": None}}, r"mm_encoder_outputs may hold 'image'"),
}
LABELS = {
    "labels of other tokens": (torch.zeros(2, 10).long(), r"labels must have the shape \(2, 11\) of the tokens"),
    "flat labels": (torch.zeros(22).long(), r"labels must have the shape \(2, 11\)"),
    "float labels": (torch.zeros(2, 11), "labels must .* hold integers, got float32"),
    "unknown labels": (torch.full((2, 11), 96), "labels must be 0 to 95 .*and -100 where masked.*, got 96"),
    "another mask": (torch.full((2, 11), -1), "labels must be 0 to 95 .*, got -1"),
}


@pytest.fixture
def two_rows():
    return collate([row(1, 6, 0), row(0, 9, 1)])


@pytest.mark.parametrize("change, message", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("headless", [False, True], ids=["with head", "headless"])
def test_a_malformed_input_is_refused_by_name(tiny_model, two_rows, change, message, headless):
    model = tiny_model()
    model = model.model if headless else model
    with pytest.raises(ValueError, match=message):
        model(**{**two_rows, **change})


@pytest.mark.parametrize("labels, message", LABELS.values(), ids=LABELS)
def test_malformed_labels_are_refused_by_name(tiny_model, two_rows, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**two_rows, labels=labels)


@pytest.mark.parametrize("surplus", [-1, 1])
def test_a_mask_must_cover_the_cache_too(tiny_model, two_rows, surplus):
    model, cache = tiny_model(), DynamicCache()
    model(**two_rows, cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \(2, 12\) .* cache included"):
        model(torch.ones(2, 1).long(), torch.ones(2, 12 + surplus), cache=cache)
    model(torch.ones(2, 1).long(), torch.ones(2, 12), cache=cache)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_masks_of_any_type_are_equal(tiny_model, two_rows, dtype):
    model = tiny_model()
    expected = model(**two_rows).logits
    actual = model(**{**two_rows, "attention_mask": two_rows["attention_mask"].to(dtype)}).logits
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "embeds", [torch.zeros(2, 11), torch.zeros(2, 11, 31), torch.zeros(2, 11, 32).long()], ids=str
)
def test_malformed_embeddings_are_refused(tiny_model, embeds):
    with pytest.raises(ValueError, match=r"inputs_embeds must be floating point of the shape \(rows, tokens, 32\)"):
        tiny_model()(inputs_embeds=embeds)


@pytest.mark.parametrize("host", ["gpt2", "gpt_bigcode"])
def test_rows_longer_than_the_positions_are_refused(tiny_model, host):
    model = tiny_model(host, {"max_position_embeddings": 16}, tower=False)
    ids = torch.ones(1, 17).long()
    with pytest.raises(ValueError, match="rows are 17 tokens long, and the decoder has 16 positions"):
        model(ids)
    cache = DynamicCache()
    model(ids[:, :16], cache=cache)
    with pytest.raises(ValueError, match="rows are 17 tokens long"):
        model(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match="position_ids must be 0 to 15"):
        model(ids[:, :1], position_ids=torch.full((1, 1), 16))


def test_computed_positions_have_no_end(tiny_model):
    model = tiny_model(host_fields={"max_position_embeddings": 16}, tower=False)
    assert model(torch.ones(1, 17).long()).logits.shape[1] == 17


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_of_images_is_none(tiny_model, text_batch, training):
    model = tiny_model().train(training)
    expected = model(**text_batch).loss
    assert torch.equal(model(**text_batch, pixel_values=torch.zeros(0, 3, 16, 16)).loss, expected)


PLACEHOLDERS = {
    "no image token": ({"image_token_id": None}, "image_token_id is None, and there is a vision tower"),
    "image token beyond": (
        {"image_token_id": 96},
        "image_token_id=96 is no token of the decoder, .* vocab_size is 96",
    ),
    "negative": ({"image_token_id": -1}, r"image_token_id[\s\S]*-1 must be at least 0"),
    "video token beyond": ({"image_token_id": 95, "video_token_id": 100}, "video_token_id=100 is no token"),
    "audio token beyond": ({"image_token_id": 95, "audio_token_id": 100}, "audio_token_id=100 is no token"),
}


@pytest.mark.parametrize("headless", [False, True], ids=["with head", "headless"])
def test_placeholders_without_images_are_told_and_not_trained(tiny_model, two_rows, headless, monkeypatch):
    model = tiny_model()
    model = model.model if headless else model
    told = []
    monkeypatch.setattr(inputs.logger, "warning_once", told.append)
    asked = {**two_rows, "pixel_values": None}
    with torch.no_grad():
        model(**asked)
    assert len(told) == 1 and "4 placeholder tokens in the text, no images" in told[0]
    with pytest.raises(ValueError, match="4 placeholder tokens in the text, no images"):
        model.train()(**asked)


@pytest.mark.parametrize("fields, message", PLACEHOLDERS.values(), ids=PLACEHOLDERS)
def test_placeholders_that_no_token_can_be_are_refused(tiny_config, fields, message):
    config = tiny_config()
    with pytest.raises(ValueError, match=message):
        for name, value in fields.items():
            setattr(config, name, value)
        HfMoeForConditionalGeneration(config)


@pytest.mark.parametrize("modality, token", [("image", 95), ("video", 94), ("audio", 93)])
@pytest.mark.parametrize("host", ["llama", "gemma3_text"])
def test_embeddings_tell_the_modality_of_their_placeholders(tiny_model, modality, token, host):
    fields = {"head_dim": 8} if host == "gemma3_text" else {}
    model = tiny_model(
        host,
        fields,
        tower=False,
        moe_config={"router": "moiie"},
        **{f"{modality}_token_id": token} if modality != "image" else {},
    )
    ids = torch.tensor([[5, token, token, 7]])
    expected = model(ids, output_routing=True)
    actual = model(inputs_embeds=model.get_input_embeddings()(ids), output_routing=True)
    assert expected.routing.modality_ids.bool().tolist() == [[False, True, True, False]]
    assert torch.equal(actual.routing.modality_ids, expected.routing.modality_ids)
    assert torch.equal(actual.logits, expected.logits)


@pytest.mark.parametrize("router", ["moiie", "ming_multi_router", "ernie45_vl"])
def test_embeddings_and_pixels_are_routed_as_ids_and_pixels(tiny_model, two_rows, router):
    model = tiny_model(moe_config={"router": router})
    expected = model(**two_rows, output_routing=True)
    embeds = {**two_rows, "inputs_embeds": model.get_input_embeddings()(two_rows.pop("input_ids"))}
    del embeds["input_ids"]
    actual = model(**embeds, output_routing=True)
    assert torch.equal(actual.routing.modality_ids, expected.routing.modality_ids)
    assert torch.equal(actual.logits, expected.logits)


def square(mask, kind):
    """Return the 4-D mask of a causal decoder for a 2-D one."""
    positions = mask.shape[1]
    allowed = mask[:, None, None].bool() & torch.ones(positions, positions).tril().bool()
    if kind == "bool":
        return allowed
    if kind == "integer":
        return allowed.long()
    low = -torch.inf if kind == "infinite" else torch.finfo(torch.float32).min
    return torch.zeros(allowed.shape).masked_fill(~allowed, low)


KINDS = ["bool", "integer", "float", "infinite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("as_dict", [False, True], ids=["tensor", "dict"])
def test_square_masks_tell_padding(kind, side, as_dict):
    batch = collate([row(0, 6, 4), row(0, 9, 5)], side)
    mask = square(batch["attention_mask"], kind)
    mask = {"full_attention": mask, "sliding_attention": mask} if as_dict else mask
    found = real_tokens(LlamaConfig(), {"attention_mask": mask}, batch["input_ids"])
    assert torch.equal(found, batch["attention_mask"].bool())


def test_what_a_mask_tells_of_padding():
    ids = torch.ones(2, 3).long()
    for mask in (None, {"full_attention": None}):
        assert real_tokens(LlamaConfig(), {"attention_mask": mask}, ids).all()
    for mask in (torch.zeros(2, 1, 4, 3), object()):
        assert real_tokens(LlamaConfig(), {"attention_mask": mask}, ids) is None
    assert real_tokens(LlamaConfig(), {"attention_mask": torch.zeros(1, 4, 3, 3)}, ids).shape == (2, 3)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_training_with_a_square_mask_counts_no_padding(tiny_model, kind):
    batch = collate([row(0, 6, 4), row(0, 9, 5)])
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    batch |= {"labels": labels_of(batch), "position_ids": positions}
    masks = [batch.pop("attention_mask")]
    masks.append(square(masks[0], kind))
    moe_config = {"router": "deepseek_v3", "objectives": {"load_balance": 0.1}}
    models = [tiny_model(tower=False, moe_config=moe_config).train() for _ in masks]
    expected, actual = (model(**batch, attention_mask=mask) for model, mask in zip(models, masks, strict=True))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss)
    loads = [[layer.router.load for layer in model.moe_layers().values()] for model in models]
    assert all(map(torch.equal, *loads))


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("given", [False, True], ids=["derived", "given"])
@pytest.mark.parametrize("same", [False, True], ids=["other assistant", "same assistant"])
def test_assisted_decoding_equals_greedy(tiny_model, images, given, same):
    model, assistant = tiny_model(), tiny_model(seed=0 if same else 1)
    batch = collate([row(images, 9, 0)])
    if given:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    expected = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, assistant_model=assistant, **options), expected)
    assert torch.equal(model.generate(**batch, prompt_lookup_num_tokens=2, **options), expected)


@pytest.mark.parametrize("tower", [False, True], ids=["text", "images"])
def test_flex_attention_equals_sdpa(tiny_model, two_rows, tower):
    model = tiny_model(tower=tower)
    batch = two_rows if tower else {name: two_rows[name] for name in ("input_ids", "attention_mask")}
    flex = HfMoeForConditionalGeneration._from_config(model.config, attn_implementation="flex_attention").eval()
    flex.load_state_dict(model.state_dict())
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(flex(**batch).logits[real], model(**batch).logits[real], rtol=0, atol=1e-5)
