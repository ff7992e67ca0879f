"""Soft MoE in a vision tower: slots that average tokens, and tokens that average slots."""

import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import copy_experts, make_context, make_experts, make_router, make_spec
from transformers import CLIPVisionConfig, LlamaConfig, Siglip2VisionConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, SlotMixture, from_system
from hf_moe.modeling.block import run_experts


TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE, PATCHES = 63, 16


def make_model(tower=None, **fields) -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    config = from_system(
        "soft_moe",
        text_config=LlamaConfig(**TEXT),
        vision_config=tower or CLIPVisionConfig(**TOWER),
        image_token_id=IMAGE,
        initializer_range=0.15,
        **fields,
    )
    return HfMoeForConditionalGeneration(config).eval()


def make_rows(patches=PATCHES):
    ids = torch.arange(2 * (patches + 4)).view(2, -1) % 60 + 2
    ids[:, 1 : patches + 1] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def mixture_of(**options):
    spec = make_spec(causal=False)
    router, context = make_router("soft_moe", options, spec), make_context()
    hidden = torch.randn(context.token_mask.numel(), spec.hidden_size)
    return router(hidden, context), hidden, context


@pytest.mark.parametrize("options", [{"normalize": True}, {"slots_per_expert": 3}])
def test_slots_are_averages_of_tokens_and_tokens_of_slots(options):
    decision, _, context = mixture_of(**options)
    real = context.token_mask.float()
    assert_near(decision.dispatch.sum(1), torch.ones_like(decision.dispatch.sum(1)))
    assert_near(decision.combine.sum(-1), real)
    assert (decision.dispatch[real == 0] == 0).all() and (decision.dispatch[real == 1] > 0).all()


def test_patches_may_come_in_any_order():
    spec = make_spec(causal=False)
    router, experts = make_router("soft_moe", {"normalize": True}, spec), make_experts(spec)
    context = make_context(rows=1)
    context.token_mask[:] = True
    hidden, order = torch.randn(10, spec.hidden_size), torch.randperm(10)
    output = experts(hidden, router(hidden, context))
    assert_near(experts(hidden[order], router(hidden[order], context)), output[order], 1e-5)


def test_slots_of_one_token_each_are_the_dense_layer():
    """One expert whose slots are the tokens themselves is the feed-forward that it holds."""
    spec = make_spec(num_experts=1, num_experts_per_tok=1, causal=False)
    experts, hidden = make_experts(spec), torch.randn(10, spec.hidden_size)
    permutation = torch.eye(10)[torch.randperm(10)][None]
    dense = experts(hidden, torch.zeros(10, 1, dtype=torch.long), torch.ones(10, 1))
    mixed = run_experts(copy_experts(spec, experts), hidden, SlotMixture(permutation, permutation, 1))
    assert_near(mixed, dense, 1e-5)


def test_a_causal_layer_refuses_it():
    with pytest.raises(ValueError, match="all tokens of a row.*vision_moe_config"):
        HfMoeForConditionalGeneration(HfMoeConfig(text_config=LlamaConfig(**TEXT), moe_config={"router": "soft_moe"}))


def test_it_stands_in_the_second_half_of_the_tower():
    model = make_model()
    assert list(model.moe_blocks()) == ["vision.2", "vision.3"]
    ids = make_rows()
    with torch.no_grad():
        parts = model(**ids, output_routing=True).routing.parts
        expected = model(**ids).logits
        later = {**ids, "input_ids": ids["input_ids"].clone()}
        later["input_ids"][:, -1] = 5
        assert_near(model(**later).logits[:, :-1], expected[:, :-1], 1e-6)
    (part,) = parts.values()
    assert {site: tuple(item.dispatch.shape) for site, item in part.decisions.items()} == {
        "vision.2": (2, PATCHES + 1, 8),
        "vision.3": (2, PATCHES + 1, 8),
    }


def test_one_image_trains_every_expert():
    model = make_model().train()
    ids = {name: value[:1] for name, value in make_rows().items()}
    model(**ids, labels=ids["input_ids"]).loss.backward()
    for block in model.moe_blocks().values():
        assert all(p.grad.flatten(1).abs().amax(1).min() > 0 for p in block.experts.parameters() if p.dim() > 1)
        assert all(p.grad.abs().max() > 0 for p in block.gate.parameters())


def test_padding_patches_are_in_no_slot():
    """Of images of several sizes the patches beyond their own change nothing."""
    fields = {name: value for name, value in TOWER.items() if name != "image_size"}
    model = make_model(Siglip2VisionConfig(**fields, num_patches=PATCHES))
    mask = torch.ones(2, PATCHES, dtype=torch.long)
    mask[1, 8:] = 0
    rows = make_rows()
    rows["input_ids"][1, 9 : PATCHES + 1] = 7
    pixels = torch.randn(2, PATCHES, 48)
    packed = {"pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4], [2, 4]])}
    found = []
    for filler in (0.0, 3.0):
        pixels = pixels.masked_fill(mask[..., None] == 0, filler)
        with torch.no_grad():
            output = model(input_ids=rows["input_ids"], pixel_values=pixels, **packed, output_routing=True)
        found.append(output.logits)
    assert_near(found[1], found[0], 1e-6)
    (part,) = output.routing.parts.values()
    assert torch.equal(part.token_mask, mask.bool())
    assert all((item.dispatch[1, 8:] == 0).all() for item in part.decisions.values())
