"""Routers are told the modality of every token, and left padding changes nothing of what a row does."""

import pytest
import torch
from helpers.hosts.catalogue import (
    ADOPTED,
    ALL,
    DENSE,
    HOSTS,
    MODALITY_GATES,
    MULTIMODAL,
    drift_apart,
    fast_and_slow,
    in_place,
    labels_of,
    routing_of,
)
from helpers.hosts.native import MODALITY_OF, SPECIAL
from helpers.near import assert_near

from hf_moe.construction.conversion import convert_router
from hf_moe.modeling.routing_context import RoutingContext


SEEING_OR_HEARING = [name for name in MULTIMODAL if name in ALL]
# Idefics sees through cross-attention and writes no placeholders.
WITH_PLACEHOLDERS = [name for name in SEEING_OR_HEARING if name != "idefics"]
# No other router can start as theirs: Ernie's has banks, and Llama 4's weighs what experts see.
OWN_ROUTERS = ["ernie4_5_vl_moe", "llama4"]
WITH_GATES = [name for name in WITH_PLACEHOLDERS if name not in OWN_ROUTERS]
# Its positions are absolute, and a call that names none counts the padding.
COUNTS_PADDING = ["gpt2", "gpt_bigcode"]
TYPE_IDS = ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids")
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": SPECIAL}


def with_modality_gates(name):
    """A host whose tokens are routed by a gate for every modality, experts and gates unlike each other."""
    if name in OWN_ROUTERS:
        model = in_place(name)
    elif name in ADOPTED:
        model = in_place(name)
        options = {key: value for key, value in MODALITY_GATES.items() if key != "name"}
        convert_router(model, MODALITY_GATES["name"], **options)
    else:
        model = in_place(name, {"num_experts": 4, "router": MODALITY_GATES})
    return drift_apart(model)


@pytest.mark.parametrize("name", SEEING_OR_HEARING)
def test_routers_see_the_modality_of_every_token(name):
    host, inputs = HOSTS[name], HOSTS[name].inputs()
    _, routing = routing_of(in_place(name), inputs)
    assert torch.equal(routing.modality_ids, host.modality_ids())
    assert torch.equal(routing.token_mask, inputs["attention_mask"].bool())


@pytest.mark.parametrize("name", SEEING_OR_HEARING)
def test_placeholders_alone_tell_the_modality(name):
    host = HOSTS[name]
    inputs = {key: value for key, value in host.inputs().items() if key not in TYPE_IDS}
    found = in_place(name).routing_context(**inputs).modality_ids
    placeholders = torch.tensor([[MODALITY_OF.get(token, 0) for token in row] for row in inputs["input_ids"].tolist()])
    assert torch.equal(found, placeholders)


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_token_type_ids_never_tell_the_modality(name):
    """PaliGemma's tell prefix (0) from suffix (1)."""
    inputs = HOSTS[name].inputs()
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    assert torch.equal(in_place(name).routing_context(**inputs).modality_ids, HOSTS[name].modality_ids())


def test_given_modalities_win_over_placeholders():
    inputs = HOSTS["smolvlm"].inputs()
    given = torch.where(HOSTS["smolvlm"].modality_ids() == 1, 2, 0)
    _, routing = routing_of(in_place("smolvlm"), {**inputs, "mm_token_type_ids": given})
    assert torch.equal(routing.modality_ids, given), "SmolVLM writes the frames of a video as images"


@pytest.mark.parametrize("name", SEEING_OR_HEARING)
def test_generated_tokens_are_text(name):
    model, host, seen = in_place(name), HOSTS[name], []
    layer = next(iter(model.moe_layers().values()))

    def record(router, args, kwargs):
        context = next(item for item in (*args, *kwargs.values()) if isinstance(item, RoutingContext))
        seen.append(context.modality_ids)

    layer.router.register_forward_pre_hook(record, with_kwargs=True)
    model.generate(**host.inputs(), **GENERATE)
    assert torch.equal(seen[0], host.modality_ids())
    assert len(seen) == 4
    for ids in seen[1:]:
        assert torch.equal(ids, torch.zeros(len(host.rows), 1, dtype=torch.long))


@pytest.mark.parametrize("name", WITH_GATES)
def test_a_gate_of_its_own_moves_a_modality(name):
    model, inputs = with_modality_gates(name), HOSTS[name].inputs()
    apart, routing = routing_of(model, inputs)
    with torch.no_grad():
        for layer in model.moe_layers().values():
            layer.router.weight[1:] = layer.router.weight[:1]
    alike, same = routing_of(model, inputs)
    assert (apart - alike)[inputs["attention_mask"].bool()].abs().max() > 1e-3
    text = (routing.modality_ids == 0).flatten()
    first = min(model.moe_layers())
    before, after = (item.decisions[first].expert_index[text] for item in (routing, same))
    assert torch.equal(before, after), "text tokens of the first layer keep their experts"


@pytest.mark.parametrize("name", SEEING_OR_HEARING)
def test_a_row_alone_is_the_row_in_a_padded_batch(name):
    host, model = HOSTS[name], with_modality_gates(name)
    together, routing = routing_of(model, host.inputs())
    for row, tokens in enumerate(host.rows):
        length = len(tokens)
        alone, own = routing_of(model, host.inputs(row))
        assert_near(together[row, -length:], alone[0, -length:], 2e-6)
        for layer, decision in own.decisions.items():
            in_batch = routing.decisions[layer].expert_index.view(len(host.rows), -1, decision.expert_index.shape[-1])
            assert torch.equal(in_batch[row, -length:].sort(-1)[0], decision.expert_index[-length:].sort(-1)[0]), layer


@pytest.mark.parametrize("name", SEEING_OR_HEARING)
def test_a_row_alone_generates_what_it_does_in_a_batch(name):
    host, model = HOSTS[name], with_modality_gates(name)
    together = model.generate(**host.inputs(), **GENERATE)[:, -4:]
    alone = [model.generate(**host.inputs(row), **GENERATE)[0, -4:] for row in range(len(host.rows))]
    assert torch.equal(together, torch.stack(alone))


SYSTEMS = {
    "anyexperts": {"layers": "all"},
    "moiie": {"layers": "all"},
    "ming_multi_router": {"layers": "all", "granularity": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "evomoe_dtr": {"layers": "all"},
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_four_modalities_run_in_one_batch(system):
    name = "qwen2_5_omni_thinker"
    model = drift_apart(in_place(name, SYSTEMS[system], system=system)).train()
    inputs = HOSTS[name].inputs()
    outputs = model(**inputs, labels=inputs["input_ids"], output_routing=True)
    assert set(outputs.routing.modality_ids.unique().tolist()) == {0, 1, 2, 3}
    outputs.loss.backward()
    gates = [p.grad for layer in model.moe_layers().values() for p in layer.router.parameters() if p.requires_grad]
    assert any(gradient is not None and gradient.any() for gradient in gates)
    generated = model.eval().generate(**inputs, **GENERATE)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("name", fast_and_slow([name for name in DENSE if name not in COUNTS_PADDING]))
def test_padding_is_counted_by_no_objective(name):
    model, host = in_place(name, {"objectives": {"load_balance": 1.0, "router_z": 1.0}}), HOSTS[name]
    drift_apart(model)
    values = []
    for padding in (0, 5):
        inputs = host.inputs(0, padding=padding)
        values.append(model(**inputs, labels=labels_of(inputs)).aux_loss.detach())
    assert_near(values[1], values[0])
