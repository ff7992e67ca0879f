"""Every registered mechanism with the library's defaults trains a step, or says at construction what is missing."""

import inspect

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.configuration.checks import in_words, option_hints
from hf_moe.configuration.systems import list_systems
from hf_moe.modeling.initialisation import initialize_mechanisms
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism, mechanism_names
from hf_moe.modeling.registry import KINDS, build, register
from hf_moe.modeling.routing import Connector, Experts, Objective, Router


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = 5
# What the library's defaults are not enough for, and the words that say so.
MISSING = {
    "llama4": "set it to 1",
    "expert_contrast": "num_experts_per_tok=1",
    "soft_moa": "all tokens of a sequence",
}
REMEDY = {"num_experts_per_tok": 1}
# What the library's defaults do not fit.
FITTING = {
    "intuition_mor1e": {"num_experts": 4},
    "modality": {"num_experts": 2, "num_experts_per_tok": 1},
}
WITHOUT_PARAMETERS = {"condition", "constant", "modality"}
CONDITIONS = {"domain": torch.tensor([0, 1]), "task": torch.tensor([1, 0])}
FEATURES = {"intuition_mor1e": {"intuition": torch.rand(2, 16)}}
# The router that an objective is made for, where the default is not.
ROUTER_OF = {"null_load": "adamoe", "slot_budget": "anyexperts", "router_orthogonality": "ernie45_vl"}
MECHANISMS = [(kind, name) for kind in KINDS for name in mechanism_names(kind)]


def make_model(kind: str, name: str, **moe_config) -> HfMoeForConditionalGeneration:
    connector = name if kind == "connector" else "mlp"
    if kind == "objective":
        moe_config |= {"objectives": {name: 0.1}, "router": ROUTER_OF.get(name, "top_k")}
    elif kind not in ("connector", "host"):
        moe_config[kind] = name
    if kind == "router":
        moe_config["objectives"] = recommended(name)
    config = HfMoeConfig(
        text_config=LlamaConfig(**SIZES, vocab_size=64),
        vision_config=CLIPVisionConfig(**SIZES, image_size=16, patch_size=4),
        image_token_id=IMAGE,
        connector=connector,
        moe_config=moe_config,
    )
    torch.manual_seed(0)
    return HfMoeForConditionalGeneration(config)


def recommended(router: str) -> dict:
    """Return the objectives of the first published system that has the router."""
    records = [record.model for record in list_systems("model")]
    found = [item for item in records if item.get("router", {"name": "top_k"})["name"] == router]
    return found[0].get("objectives", {}) if found else {}


def train_a_step(model: HfMoeForConditionalGeneration, name: str) -> set[str]:
    """Return the names of the parameters that have changed."""
    ids = torch.arange(8, 56).view(2, 24)
    ids[:, : model.config.image_seq_length] = IMAGE
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = model.train()(
        input_ids=ids,
        pixel_values=torch.randn(2, 3, 16, 16),
        labels=ids,
        condition_ids={**CONDITIONS, **FEATURES.get(name, {})},
    ).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert loss.isfinite()
    return {name for name in before if not torch.equal(before[name], model.get_parameter(name))}


@pytest.mark.parametrize(("kind", "name"), MECHANISMS)
def test_a_mechanism_trains_a_step_or_says_what_is_missing(kind, name):
    if name in MISSING:
        with pytest.raises(ValueError, match=MISSING[name]):
            make_model(kind, name)
        if name == "soft_moa":
            return  # it has no place in a decoder
    changed = train_a_step(make_model(kind, name, **(REMEDY if name in MISSING else FITTING.get(name, {}))), name)
    assert any((".experts." if name in WITHOUT_PARAMETERS else ".gate.") in item for item in changed)


@pytest.mark.parametrize("slots", [1, 8])
def test_anyexperts_says_at_construction_that_it_has_no_slots_to_move_between(slots):
    with pytest.raises(ValueError, match="set one of the four"):
        make_model("router", "anyexperts", num_experts=8, num_experts_per_tok=slots)


@pytest.mark.parametrize(("kind", "name"), MECHANISMS)
def test_every_option_declares_its_type(kind, name):
    cls = get_mechanism(kind, name)
    options = [item for item in inspect.signature(cls).parameters.values() if item.kind is item.KEYWORD_ONLY]
    hints = option_hints(cls, 0)
    assert not [item.name for item in options if in_words(hints[item.name]) in ("Any", "_empty")]


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
    config = HfMoeConfig(text_config=LlamaConfig(**SIZES, vocab_size=64), moe_config={"objectives": TWO})
    torch.manual_seed(0)
    return HfMoeForConditionalGeneration(config).train()


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
    config = HfMoeConfig(text_config=LlamaConfig(**SIZES, vocab_size=64), moe_config={"objectives": objectives})
    with pytest.raises(ValueError, match="'pop'.*taken"):
        HfMoeForConditionalGeneration(config)


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
    model = make_model("connector", "mlp")
    model.outer = mechanism_of(outer, 1.0)
    model.outer.parts = torch.nn.ModuleList(
        [mechanism_of(inner, 2.0), torch.nn.ModuleList([mechanism_of(inner, 3.0)])]
    )
    model.initialize_weights()
    std = model.config.initializer_range
    weights = [parameter for name, parameter in model.outer.named_parameters()]
    assert [weight.tolist() for weight in weights] == [pytest.approx([factor * std] * 2) for factor in (1, 2, 3)]


def test_the_outer_mechanism_has_the_last_word_on_its_parts():
    model = make_model("connector", "mlp")
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
