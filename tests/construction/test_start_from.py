"""A router that takes the place of a trained one starts from its gate."""

from dataclasses import replace

import pytest
import torch
from helpers.hosts.composed import logit_gap
from helpers.mechanisms import CASES

from hf_moe.construction.build import build_model
from hf_moe.construction.conversion import convert_router
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism, mechanism_names
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing_context import NUM_MODALITIES


SPEC = MoELayerSpec(0, 16, num_experts=16, num_experts_per_tok=2, expert_intermediate_size=8, vocab_size=64)
OPTIONS = {"ming_multi_router": {"modalities": ["text", "image", "audio"], "gate": "sigmoid_bias"}}


def router_of(name, like=None, **options):
    """Return a router, in a layer as its own case has it, or that of the router `like`."""
    own = {field: value for field, value in CASES["router"][like or name].moe.items() if field in vars(SPEC)}
    spec = replace(SPEC, **own)
    router = build("router", get_mechanism("router", name), {**OPTIONS.get(name, {}), **options}, spec)
    torch.manual_seed(sum(map(ord, name)))
    router.initialize(0.5)
    return router


# The others score tokens by no linear map of the hidden states: no row of another gate has a meaning there.
WITH_GATE = [name for name in mechanism_names("router") if router_of(name).gate_rows() is not None]
WITHOUT_GATE = sorted({*mechanism_names("router")} - {*WITH_GATE})


def test_routers_with_plain_gates_say_so():
    assert {"top_k", "adamoe", "anyexperts", "ming_multi_router", "moiie", "sequence", "speechmoe"} <= {*WITH_GATE}
    assert {"evomoe_dtr", "omni_router", "rmoe_layerwise"} <= {*WITHOUT_GATE}


@pytest.mark.parametrize("name", WITH_GATE)
def test_a_router_starts_from_the_gate_of_a_plain_one(name):
    old, new = router_of("top_k", name), router_of(name)
    new.start_from(old)
    assert torch.equal(new.gate_rows(), old.weight.expand(NUM_MODALITIES, -1, -1))


@pytest.mark.parametrize("name", WITHOUT_GATE)
def test_a_router_without_a_plain_gate_stays_fresh(name):
    new = router_of(name)
    before = {key: value.clone() for key, value in new.state_dict().items()}
    new.start_from(router_of("top_k"))
    assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())


@pytest.mark.parametrize("name", WITH_GATE)
def test_a_plain_router_starts_from_the_text_gate_of_any(name):
    old, new = router_of(name), router_of("top_k", name)
    new.start_from(old)
    assert torch.equal(new.weight, old.gate_rows()[0])


def test_gates_of_modalities_find_each_other():
    moiie = router_of("moiie")
    ming = router_of("ming_multi_router", modalities=["text", "image", "video", "audio"])
    ming.start_from(moiie)
    assert torch.equal(ming.weight, moiie.weight[[0, 1, 1, 0]])
    back = router_of("moiie")
    back.start_from(ming)
    assert torch.equal(back.weight, moiie.weight)


def test_null_experts_are_copies_of_the_trained_rows():
    old, new = router_of("top_k"), router_of("adamoe", num_null_experts=18)
    new.start_from(old)
    assert torch.equal(new.null_weight, torch.cat([old.weight, old.weight[:2]]))
    drawn = router_of("adamoe", null_router_init="normal")
    before = drawn.null_weight.clone()
    drawn.start_from(old)
    assert torch.equal(drawn.null_weight, before)


def test_a_router_of_the_same_class_hands_over_everything():
    old, new = router_of("adamoe"), router_of("adamoe")
    torch.nn.init.normal_(old.null_weight)
    new.start_from(old)
    assert torch.equal(new.null_weight, old.null_weight) and torch.equal(new.weight, old.weight)


def test_the_common_term_of_evomoe_starts_as_the_old_gate():
    old, new = router_of("top_k"), router_of("evomoe_dtr", shared_router=True)
    scorer = new.weight.clone()
    new.start_from(old)
    assert torch.equal(new.shared_weight, old.weight) and torch.equal(new.weight, scorer)


@pytest.mark.parametrize(
    ("score_function", "taken"), [("sigmoid", True), ("softmax", False)], ids=["same scores", "other scores"]
)
def test_a_balancing_bias_goes_along_with_its_kind_of_scores(score_function, taken):
    old, new = router_of("top_k", score_function=score_function, bias_update_rate=0.1), router_of("ming_multi_router")
    torch.nn.init.normal_(old.e_score_correction_bias)
    new.start_from(old)
    expected = old.e_score_correction_bias.expand(3, -1) if taken else torch.zeros(3, 16)
    assert torch.equal(new.e_score_correction_bias, expected)


@pytest.fixture
def mixtral(save_decoder):
    return save_decoder("mixtral", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)


@pytest.mark.parametrize("system", ["moiie", "ming_multi_router", "adamoe"])
def test_a_system_on_a_moe_decoder_starts_from_its_gates(mixtral, system):
    model, _ = build_model(mixtral, None, moe_config={"num_experts_per_tok": 2})
    built, _ = build_model(mixtral, None, system, moe_config={"num_experts_per_tok": 2})
    converted, _ = build_model(mixtral, None)
    convert_router(converted, system)
    for index, layer in model.moe_layers().items():
        for other in (built, converted):
            rows = other.moe_layers()[index].router.gate_rows()
            assert torch.equal(rows, layer.router.weight.expand(NUM_MODALITIES, -1, -1))


def test_gates_per_modality_leave_a_moe_decoder_as_it_was(mixtral):
    model, _ = build_model(mixtral, None)
    built, _ = build_model(mixtral, None, "ming_multi_router", moe_config={"num_experts_per_tok": 2})
    assert logit_gap(built, model) < 1e-5


def test_speechmoe_learns_to_read_the_embedding_after_it_has_started():
    old, new, again = router_of("top_k"), router_of("speechmoe"), router_of("speechmoe")
    again.start_from(new)
    new.start_from(old)
    assert again.embedding_weight.all() and not new.embedding_weight.any()
