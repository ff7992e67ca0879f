"""Omni-SMoLA: soft mixtures of low-rank experts, in branches for text, for images and for all tokens."""

import pytest
import torch
from helpers.adapter_fixtures import IMAGE
from helpers.near import assert_near
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.routers.omni_smola import OmniSmolaRouter
from hf_moe.modeling.routing_context import RoutingContext


END = 61
PREFIX = {"scope": "prefix", "end_token_id": END}


def adapt(model, randomise, targets=("q_proj", "down_proj"), variant="token", **router):
    fields = {"target_modules": list(targets), "num_experts": 6, **({"router": router} if router else {})}
    model = get_peft_model(model, MoeLoraConfig.from_system("omni_smola", variant=variant, **fields)).eval()
    randomise(model)
    return model


def rows(length=12):
    """Return a row of text, an image, the rest of the question, its end, and an answer."""
    ids = torch.randint(3, IMAGE, (2, length), generator=torch.Generator().manual_seed(1))
    ids[:, 2:6], ids[:, 8] = IMAGE, END
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "pixel_values": pixels}


def route(scope, hidden, modality, **options):
    """Return what a router with two experts in each branch decides for one row."""
    torch.manual_seed(0)
    router = OmniSmolaRouter(MoELayerSpec(0, hidden.shape[-1], 6, 6, 4), scope=scope, **options)
    router.initialize(1.0)
    context = RoutingContext(modality[None], torch.ones(1, len(modality), dtype=torch.bool))
    return router, router(hidden, context)


MODALITY = torch.tensor([0, 1, 1, 0, 3, 2])
BRANCHES = {0: [0], 1: [1, 2], 2: [0, 1, 2, 3]}  # branch -> what it sees


@pytest.mark.parametrize("slots", [1, 2])
def test_every_branch_is_a_soft_moe_of_what_it_sees(slots):
    hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    router, made = route("sequence", hidden, MODALITY, slots_per_expert=slots)
    scores = hidden @ router.weight.T
    expected = torch.zeros(2, 6, 6 * slots)
    for branch, seen in BRANCHES.items():
        tokens = torch.isin(MODALITY, torch.tensor(seen)).nonzero()
        columns = torch.arange(2 * slots) + 2 * slots * branch
        for part, dim in enumerate((0, 1)):
            expected[part, tokens, columns] = scores[tokens, columns].softmax(dim)
    assert_near(torch.cat([made.dispatch, made.combine]), expected, 1e-5)
    assert_near(made.dispatch.sum(1), torch.ones(1, 6 * slots), 1e-5)
    _, alone = route("token", hidden, MODALITY)
    if slots == 1:
        assert_near(alone.expert_weight, made.combine[0], 1e-6)


def test_a_fresh_adapter_changes_nothing(own_model):
    with torch.no_grad():
        expected = own_model()(**rows()).logits
        assert torch.equal(adapt(own_model(), lambda model: None)(**rows()).logits, expected)


def test_an_image_reaches_text_through_the_branch_of_all_alone():
    hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    other = torch.where(MODALITY[:, None] == 1, hidden.flip(1), hidden)
    router, first = route("sequence", hidden, MODALITY)
    _, second = route("sequence", other, MODALITY)
    slots = [made.dispatch[0].T @ x for made, x in ((first, hidden), (second, other))]  # (E, d)
    text = [made.combine[0, [0, 3]] for made in (first, second)]
    assert torch.equal(text[0], text[1])
    assert torch.equal(slots[0][:2], slots[1][:2]) and (slots[0][4:] - slots[1][4:]).abs().amin(0).max() > 0.01


def test_a_token_is_not_told_of_later_ones(own_model, randomise):
    model, batch = adapt(own_model(), randomise), rows()
    changed = batch["input_ids"].clone()
    changed[:, 9] = changed[:, 9] % 50 + 3
    with torch.no_grad():
        before, after = (model(**{**batch, "input_ids": ids}).logits for ids in (batch["input_ids"], changed))
    assert torch.equal(before[:, :9], after[:, :9]) and (before[:, 9:] - after[:, 9:]).abs().max() > 1e-3


def test_a_prefix_is_mixed_once_and_answers_are_left_alone(own_model, randomise):
    model, batch = adapt(own_model(), randomise, ["q_proj", "o_proj"], **PREFIX), rows()
    ids = batch["input_ids"]
    ids[0, 11], ids[1, 8] = END, 5  # a second end, and a row without any
    made = []
    layer = next(layer for layer in tuner_layers(model) if layer.moe_lora_router)
    layer.moe_lora_router["default"].register_forward_hook(lambda module, args, decision: made.append(decision))
    with torch.no_grad():
        whole = model(**batch).logits
        prompt = model(**{**batch, "input_ids": ids[:, :10]}, use_cache=True)
        rest = model(input_ids=ids[:, 10:], past_key_values=prompt.past_key_values)
    assert_near(torch.cat([prompt.logits, rest.logits], 1), whole, 1e-5)
    assert made[0].combine[0, :9].any(-1).all() and not made[0].combine[0, 9:].any()
    assert not made[0].combine[1].any() and not made[2].combine.any()
    assert_near(made[0].dispatch[0].sum(0), torch.ones(6), 1e-5)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"scope": "sequence"}, "'omni_smola' mixes all tokens of a sequence"),
        (PREFIX, "down_proj: The router 'omni_smola' returns a SlotMixture"),
        ({"scope": "prefix"}, "end_token_id=None.*needs it"),
        ({"end_token_id": 3}, "belongs to scope='prefix'"),
        ({"slots_per_expert": 2}, "there are no slots"),
        ({"num_text_experts": 5}, "at most num_experts=6 together"),
    ],
)
def test_what_does_not_fit_in_a_decoder_is_refused(own_model, randomise, router, message):
    with pytest.raises(ValueError, match=message):
        adapt(own_model(), randomise, **router)


def test_a_tower_takes_the_slots_of_its_patches(own_model, randomise):
    model = adapt(own_model(), randomise, ["fc1"], "sequence")
    (first, second), batch = tuner_layers(model), rows()
    assert {type(layer.deciding_router("default")) for layer in (first, second)} == {OmniSmolaRouter}
    with torch.no_grad():
        pixels = batch["pixel_values"].clone()
        pixels[:, :, 8:, 8:] += 1.0  # of the last patch
        seen = []
        first.register_forward_hook(lambda module, args, output: seen.append(output - module.base_layer(args[0])))
        for values in (batch["pixel_values"], pixels):
            model(**{**batch, "pixel_values": values})
    assert (seen[0] - seen[1]).abs().amax(-1).min() > 1e-3
