"""How mechanisms are built: their options, their labels, and who initialises them."""

import pytest
import torch
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.initialisation import initialize_mechanisms
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.registry import build, register
from hf_moe.modeling.routing import Connector, Experts, Objective, Router


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
# What the library's defaults are not enough for, and the words that say so.
MISSING = {
    "llama4": ({"router": "llama4"}, "set it to 1"),
    "expert_contrast": ({"objectives": {"expert_contrast": 0.1}}, "num_experts_per_tok=1"),
}


def make_model(**moe_config) -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    return HfMoeForConditionalGeneration(
        HfMoeConfig(text_config=LlamaConfig(**SIZES, vocab_size=64), moe_config=moe_config)
    )


@pytest.mark.parametrize(("moe_config", "missing"), MISSING.values(), ids=MISSING)
def test_a_mechanism_says_at_construction_what_is_missing(moe_config, missing):
    with pytest.raises(ValueError, match=missing):
        make_model(**moe_config)
    make_model(num_experts_per_tok=1, **moe_config)


@pytest.mark.parametrize("slots", [1, 8])
def test_anyexperts_says_at_construction_that_it_has_no_slots_to_move_between(slots):
    with pytest.raises(ValueError, match="set one of the four"):
        make_model(router="anyexperts", num_experts=8, num_experts_per_tok=slots)


class Mine:
    """A mechanism whose options are declared in ways of a user's."""

    def __init__(self, spec, *, free=None, rate: "float" = 0.5, sizes: list[int] | None = None):
        self.values = (free, rate, sizes)


@pytest.fixture
def mine():
    return register("router", "mine")(Mine)


def test_options_of_a_user_are_checked_by_their_annotations(mine):
    assert build("router", mine, {"free": object, "rate": "1e-3", "sizes": [1]}, None).values == (object, 1e-3, [1])
    for options in ({"rate": "fast"}, {"rate": True}, {"rate": float("nan")}, {"sizes": ["1.5"]}, {"sizes": 1}):
        with pytest.raises(ValueError, match=f"router 'mine': {next(iter(options))}="):
            build("router", mine, options, None)


TWO = {
    "experts": {"name": "load_balance", "coef": 0.1},
    "devices": {"name": "load_balance", "coef": 0.2, "expert_groups": 2},
    "router_z": 0.001,
}


@pytest.fixture
def two():
    return make_model(objectives=TWO).train()


def test_two_objectives_of_one_kind_are_told_apart_by_label(two, tmp_path):
    ids = torch.arange(8, 56).view(2, 24)
    optimizer = torch.optim.SGD(two.parameters(), lr=0.1)
    for _ in range(2):
        output = two(input_ids=ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    values = output.objective_values
    assert list(values) == list(TWO) and values["experts"] != values["devices"]
    expected = 0.1 * values["experts"] + 0.2 * values["devices"] + 0.001 * values["router_z"]
    torch.testing.assert_close(output.aux_loss, expected)
    two(input_ids=ids, labels=ids)
    kept = {name: value for name, value in two.state_dict().items() if "population" in name}
    assert {name.split(".")[2] for name in kept} == {"experts", "devices"} and any(
        item.any() for item in kept.values()
    )
    two.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in kept.items())


def test_a_label_that_a_module_dict_has_taken_is_refused():
    objectives = {"pop": {"name": "load_balance", "coef": 0.1}}
    with pytest.raises(ValueError, match="'pop'.*taken"):
        make_model(objectives=objectives)


SPEC = MoELayerSpec(layer_idx=0, hidden_size=8, num_experts=4, num_experts_per_tok=2, expert_intermediate_size=4)
ARGUMENTS = {Router: (SPEC,), Experts: (), Objective: ([], 0.1), Connector: (8, 8)}


def mechanism_of(base: type, std_of_weight: float) -> torch.nn.Module:
    """Return a mechanism whose only weight starts as `std_of_weight` times the model's standard deviation."""

    class Mechanism(base):
        def initialize(self, std: float) -> None:
            torch.nn.init.constant_(self.weight, std_of_weight * std)

    mechanism = Mechanism(*ARGUMENTS[base])
    mechanism.weight = torch.nn.Parameter(torch.full((2,), torch.nan))
    return mechanism


@pytest.mark.parametrize("inner", ARGUMENTS)
@pytest.mark.parametrize("outer", ARGUMENTS)
def test_a_mechanism_within_a_mechanism_initialises_itself(outer, inner):
    model = make_model()
    model.outer = mechanism_of(outer, 1.0)
    model.outer.parts = torch.nn.ModuleList(
        [mechanism_of(inner, 2.0), torch.nn.ModuleList([mechanism_of(inner, 3.0)])]
    )
    model.initialize_weights()
    std = model.config.initializer_range
    weights = [parameter for name, parameter in model.outer.named_parameters()]
    assert [weight.tolist() for weight in weights] == [pytest.approx([factor * std] * 2) for factor in (1, 2, 3)]


def test_the_outer_mechanism_has_the_last_word_on_its_parts():
    model = make_model()
    model.outer = mechanism_of(Experts, 1.0)
    model.outer.part = mechanism_of(Experts, 2.0)
    model.outer.initialize = lambda std: torch.nn.init.zeros_(model.outer.part.weight)
    model.initialize_weights()
    assert not model.outer.part.weight.any()


def test_initialising_by_hand_reaches_mechanisms_within():
    outer = mechanism_of(Router, 1.0)
    outer.part = mechanism_of(Experts, 2.0)
    initialize_mechanisms(outer, 0.5)
    assert (outer.weight.tolist(), outer.part.weight.tolist()) == ([0.5, 0.5], [1.0, 1.0])
