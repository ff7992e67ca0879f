"""AnyExperts in a whole model: the budget moves without training, and no token sees another's allocation."""

import pytest
import torch
from helpers.caches import cache_of
from helpers.near import assert_near
from peft import LoraConfig, get_peft_model

from hf_moe import HfMoeForConditionalGeneration, RoutingOverrides


ROUTER = {"name": "anyexperts", "min_slots": 2, "max_slots": 6, "max_virtual_share": 0.5}


@pytest.fixture
def model(tiny_model):
    model = tiny_model(moe_config={"num_experts": 8, "num_experts_per_tok": 4, "router": ROUTER})
    with torch.no_grad():
        for layer in model.moe_layers().values():
            layer.router.importance_out.mul_(5)
            layer.router.virtual_bias.fill_(1.0)
    return model


def mean_slots(model, batch, **options) -> float:
    with torch.no_grad():
        routing = model(**batch, output_routing=True, **options).routing
    slots = [decision.signals["slots"].view(routing.token_mask.shape) for decision in routing.decisions.values()]
    return torch.stack([item[routing.token_mask] for item in slots]).mean().item()


def test_a_budget_moves_the_slots_and_stays_with_the_checkpoint(model, batch, tmp_path):
    own = mean_slots(model, batch)
    model.set_expert_budget(5.5)
    moved = mean_slots(model, batch)
    assert moved > own + 0.5
    model.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.moe_config.router["target_slots"] == 5.5
    assert mean_slots(loaded, batch) == moved
    loaded.set_expert_budget(2)
    assert mean_slots(loaded, batch) == 2.0
    loaded.save_pretrained(tmp_path)
    assert mean_slots(HfMoeForConditionalGeneration.from_pretrained(tmp_path), batch) == 2.0
    model.set_expert_budget(None)
    assert mean_slots(model, batch) == own


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]},
    ],
    ids=["beside", "copied", "wrapped"],
)
def test_a_budget_reaches_routers_that_peft_has_wrapped(model, batch, fields):
    adapted = get_peft_model(model, LoraConfig(**fields)).eval()
    for budget in (2, 6):
        model.set_expert_budget(budget)
        assert mean_slots(adapted, batch) == budget
        with adapted.disable_adapter():
            assert mean_slots(adapted, batch) == budget
    assert model.config.moe_config.router["target_slots"] == 6


def test_a_budget_for_one_call_leaves_the_model_alone(model, batch):
    own = mean_slots(model, batch)
    assert mean_slots(model, batch, routing_overrides=RoutingOverrides(expert_budget=2)) == 2.0
    assert mean_slots(model, batch) == own


def test_generation_takes_a_budget_in_every_step(model, make_batch):
    batch = make_batch([(1, 6, 0), (0, 9, 1)])
    seen = []

    def record(gate, args, decision):
        seen.append((decision.signals["slots"].unique().tolist(), len(args[0])))

    handle = model.moe_layers()[1].gate.register_forward_hook(record)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**batch, expert_budget=2, **options)
    handle.remove()
    assert [slots for slots, _ in seen] == [[2.0]] * 3 and [count for _, count in seen[1:]] == [2, 2]
    model.set_expert_budget(2)
    assert torch.equal(tokens, model.generate(**batch, **options))


@pytest.mark.parametrize("budget", [1.5, 7, -1])
def test_a_budget_out_of_range_is_refused(model, batch, budget):
    for refuse in (
        lambda: model.set_expert_budget(budget),
        lambda: model.generate(**batch, expert_budget=budget, max_new_tokens=1),
        lambda: model(**batch, routing_overrides=RoutingOverrides(expert_budget=budget)),
    ):
        with pytest.raises(ValueError, match=rf"a budget of {budget} .* \[2, 6\]"):
            refuse()


def test_a_model_without_a_slot_budget_says_so(tiny_model, batch):
    with pytest.raises(ValueError, match="No router of this model has a slot budget"):
        tiny_model().set_expert_budget(2)


def test_layers_keep_their_own_options(tiny_model):
    router = {"1": {"name": "top_k"}, "default": ROUTER}
    model = tiny_model(moe_config={"num_experts": 8, "num_experts_per_tok": 4, "router": router})
    model.set_expert_budget(3.0)
    assert model.config.moe_config.router == {"1": {"name": "top_k"}, "2": {**ROUTER, "target_slots": 3.0}}
    assert model.moe_layers()[2].router.target_slots == 3.0


def test_decoding_from_a_cache_equals_the_full_forward(model, make_batch):
    batch = make_batch([(1, 9, 0)])
    ids = batch["input_ids"]
    with torch.no_grad():
        full = model(**batch).logits
        prefill = {**batch, "input_ids": ids[:, :-3], "attention_mask": batch["attention_mask"][:, :-3]}
        outputs = model(**prefill, use_cache=True)
        logits = [outputs.logits]
        for position in range(ids.shape[1] - 3, ids.shape[1]):
            outputs = model(
                input_ids=ids[:, position : position + 1],
                attention_mask=batch["attention_mask"][:, : position + 1],
                cache=cache_of(outputs),
                use_cache=True,
            )
            logits.append(outputs.logits)
    assert_near(torch.cat(logits, dim=1), full, 1e-5)


def test_a_row_is_routed_alike_alone_and_in_a_batch(model, make_batch):
    rows = [(1, 6, 0), (0, 9, 1), (3, 4, 2)]
    with torch.no_grad():
        together = model(**make_batch(rows), output_routing=True)
        alone = model(**make_batch(rows[:1]), output_routing=True)
    length = alone.logits.shape[1]
    assert_near(together.logits[:1, -length:], alone.logits, 1e-5)
    for layer, decision in alone.routing.decisions.items():
        slots = together.routing.decisions[layer].signals["slots"].view(3, -1)[0, -length:]
        assert torch.equal(slots, decision.signals["slots"])


def test_empty_and_virtual_slots_change_no_output(model, batch):
    widths = {}

    def widen(gate, args, decision):
        tokens, slots = decision.expert_index.shape
        widths[gate] = slots
        empty = decision.expert_index.new_full((tokens, 3), decision.num_experts)
        decision.expert_index = torch.cat([empty, decision.expert_index], dim=1)
        decision.expert_weight = torch.cat([torch.zeros(tokens, 3), decision.expert_weight], dim=1)
        return decision

    with torch.no_grad():
        expected = model(**batch, output_routing=True)
        assert max(item.signals["virtual_share"].max() for item in expected.routing.decisions.values()) > 0
        for layer in model.moe_layers().values():
            layer.gate.register_forward_hook(widen)
        assert_near(model(**batch).logits, expected.logits, 2e-6)
    assert len(widths) == 2
