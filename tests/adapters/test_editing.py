"""Single experts of a trained adapter are added, removed, renamed and frozen, and the rest stays what it was."""

import copy

import pytest
import torch
from helpers.adapted import real_logits, stacks, step
from helpers.near import assert_near
from peft import LoraConfig, PeftModel, get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters.editing import add_expert, expert_names, freeze_experts, remove_expert, rename_expert
from hf_moe.adapters.layer import tuner_layers


TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapt(model, **fields):
    return get_peft_model(model, MoeLoraConfig(**{"target_modules": TARGETS, **fields})).eval()


def parts(model, adapter="default"):
    """What belongs to each expert, in every stack of every target that has A and B: copies."""
    found = []
    for layer in tuner_layers(model):
        target = layer.experts[adapter].target
        for side in "AB":
            split = target.split(side, getattr(layer, f"moe_lora_{side}")[adapter])
            host = target.num_host_experts
            found.append([torch.stack(split[i : i + host]).detach().clone() for i in range(0, len(split), host)])
    return found


def same(found, expected):
    return all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(found, expected, strict=True))


def reloaded(model, build, folder):
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(build(), folder, is_trainable=True).eval()


def routers(model):
    return [layer.moe_lora_router["default"] for layer in tuner_layers(model) if layer.moe_lora_router]


@pytest.mark.parametrize("router", ["top_k", {"name": "adamoe", "num_null_experts": 3}, "switch_transformer"])
def test_an_expert_that_no_token_may_choose_leaves_without_a_trace(llama, text, randomise, router):
    model = adapt(llama(), router=router, num_experts=5, num_experts_per_tok=1)
    randomise(model)
    before = [stack.detach().clone() for stack in stacks(model)]
    with torch.no_grad():
        for layer in tuner_layers(model):
            layer.moe_lora_B["default"][2] = 0.0
    # Its row far below all others: removing it changes no choice, and no weight beyond rounding.
    for item in routers(model):
        item.register_forward_pre_hook(lambda module, args: (args[0].abs(), args[1]))
        with torch.no_grad():
            item.weight[2] = -1e3
    expected = real_logits(model, text)
    remove_expert(model, 2)
    assert_near(logits_with(model, text, lambda args: (args[0].abs(), args[1])), expected, 1e-5)
    for stack, was in zip(stacks(model), before, strict=True):
        assert torch.equal(stack[2:], was[3:])
    assert model.peft_config["default"].num_experts == 4 and routers(model)[0].spec.num_experts == 4


def logits_with(model, inputs, hook):
    handles = [item.register_forward_pre_hook(lambda module, args: hook(args)) for item in routers(model)]
    found = real_logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def test_a_new_expert_computes_nothing_yet_and_then_trains(llama, text, randomise):
    model = adapt(llama(), router="constant", num_experts=3, objectives={})
    randomise(model)
    expected = real_logits(model, text)
    before = [stack.detach().clone() for stack in stacks(model)]
    assert add_expert(model, "new") == 3
    assert_near(real_logits(model, text), expected, 1e-6)
    assert all(torch.equal(stack[:3], was) for stack, was in zip(stacks(model), before, strict=True))
    assert expert_names(model) == ["0", "1", "2", "new"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, text, optimizer)
    assert all(layer.moe_lora_B["default"][3].abs().sum() > 0 for layer in tuner_layers(model))
    assert (real_logits(model, text) - expected).abs().max() > 1e-3


def test_an_expert_without_a_name_is_not_called_as_another(llama, tmp_path):
    model = adapt(llama())
    rename_expert(model, 0, "english")
    remove_expert(model, 2)
    add_expert(model)
    assert expert_names(model) == ["english", "1", "3", "4"]
    assert expert_names(reloaded(model, llama, tmp_path)) == ["english", "1", "3", "4"]


def test_a_target_with_its_own_number_of_experts_per_token_keeps_it(llama, text, randomise, tmp_path):
    model = adapt(llama(), target_overrides={"q_proj": {"num_experts_per_tok": 1, "router_input": "target"}})
    randomise(model)
    before = [router.spec.num_experts_per_tok for router in routers(model)]
    assert set(before) == {1, 2}
    add_expert(model, copy_of=0)
    remove_expert(model, 1)
    assert [router.spec.num_experts_per_tok for router in routers(model)] == before
    assert_near(real_logits(reloaded(model, llama, tmp_path), text), real_logits(model, text), 1e-6)


def test_a_copy_has_the_weights_and_the_rows_of_what_it_copies(llama, text, randomise):
    model = adapt(llama(), num_experts_per_tok=4, objectives={"load_balance": 0.01})
    randomise(model)
    rename_expert(model, 1, "old")
    add_expert(model, copy_of="old")
    for stack in stacks(model):
        assert torch.equal(stack[4], stack[1]) and not torch.equal(stack[4], stack[0])
    for router in routers(model):
        assert torch.equal(router.weight[4], router.weight[1]) and len(router.weight) == 5
    assert expert_names(model) == ["0", "old", "2", "3", "4"]
    model.train()(**text).loss.backward()  # with the objective over five experts
    assert all(router.weight.grad.abs().sum() > 0 for router in routers(model))


def test_an_edited_adapter_is_saved_and_loaded_as_it_is(llama, text, randomise, tmp_path):
    model = adapt(llama(), num_experts=3)
    randomise(model)
    add_expert(model, "fourth")
    remove_expert(model, 0)
    rename_expert(model, "1", "first")
    freeze_experts(model, ["fourth"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    assert expert_names(loaded) == ["first", "2", "fourth"]
    assert_near(real_logits(loaded, text), real_logits(model, text), 1e-6)
    kept = [stack[2].detach().clone() for stack in stacks(loaded)]
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    step(loaded, text, optimizer)
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(llama(), tmp_path / "again")
    assert all(torch.equal(stack[2], was) for stack, was in zip(stacks(again), kept, strict=True))


def test_removing_an_expert_moves_the_frozen_ones_with_their_numbers(llama, randomise):
    model = adapt(llama())
    randomise(model)
    freeze_experts(model, [0, 3])
    remove_expert(model, 1)
    assert model.peft_config["default"].frozen_experts == [0, 2]
    add_expert(model, copy_of=0)
    assert model.peft_config["default"].frozen_experts == [0, 2]
    remove_expert(model, 0)
    assert model.peft_config["default"].frozen_experts == [1]


def test_one_adapter_of_several_is_edited_and_the_others_stay(llama, text, randomise):
    model = adapt(llama(), num_experts=3)
    model.add_adapter("other", MoeLoraConfig(target_modules=["v_proj"], num_experts=5))
    randomise(model)
    base = real_logits(llama(), text)
    first = real_logits(model, text)
    remove_expert(model, 4, adapter_name="other")
    torch.testing.assert_close(real_logits(model, text), first, atol=0, rtol=0)
    model.set_adapter("other")
    assert (real_logits(model, text) - base).abs().max() > 0.01
    with model.disable_adapter():
        assert_near(real_logits(model, text), base, 1e-6)
    assert_near(real_logits(model.unload(), text), base, 1e-6)


def test_the_always_on_lora_is_no_expert(llama, text, randomise):
    model = adapt(llama(), router="constant", num_experts=2, shared_r=4)
    randomise(model)
    with torch.no_grad():
        for layer in tuner_layers(model):
            layer.moe_lora_B["default"].zero_()
    expected = real_logits(model, text)
    assert (expected - real_logits(llama(), text)).abs().max() > 0.1
    remove_expert(model, 0)
    assert_near(real_logits(model, text), expected, 1e-6)


GATED = {"name": "bottleneck", "gated": True}
RANKED = [
    {"r": [2, 4, 8], "lora_alpha": 6},
    {"r": [8] * 20 + [2, 4, 4, 8], "use_rslora": True},
    {"r": 4, "rank_pattern": {"q_proj": 2, "v_proj": [1, 2, 3]}},
    {"r": [2, 4, 4], "target_overrides": {"q_proj": {"r": 3, "num_experts": 3}, "v_proj": {"experts": "bottleneck"}}},
    {"r": [2, 4, 4], "experts": GATED, "target_modules": ["mlp"]},
    {"r": [2, 4, 4], "ffn_experts": True, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
]


@pytest.mark.parametrize("fields", RANKED, ids=lambda fields: "-".join(map(str, fields.values()))[:40])
def test_experts_of_their_own_rank_come_and_go_and_the_others_stay(llama, text, randomise, tmp_path, fields):
    number = len(fields["r"]) if isinstance(fields["r"], list) else 3
    # With every expert at weight 1, one that computes nothing yet leaves no trace.
    model = adapt(llama(), num_experts=number, router="constant", num_experts_per_tok=None, **fields)
    randomise(model)
    before, expected = parts(model), real_logits(model, text)
    assert add_expert(model, "new", rank=5) == number
    assert_near(real_logits(model, text), expected, 1e-5)
    for found, was in zip(parts(model), before, strict=True):
        assert same(found[:number], was) and 5 in found[number].shape
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, text, optimizer)
    assert all(found[number].any() for found in parts(model))
    randomise(model)
    before = parts(model)
    add_expert(model, copy_of="new")
    assert all(same(found, [*was, was[number]]) for found, was in zip(parts(model), before, strict=True))
    remove_expert(model, 1)
    left = [was[:1] + was[2:] + was[-1:] for was in before]
    assert all(same(found, was) for found, was in zip(parts(model), left, strict=True))
    loaded = reloaded(model, llama, tmp_path)
    assert_near(real_logits(loaded, text), real_logits(model, text), 1e-6)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert sum(part.numel() for found in left for part in found) == model.get_nb_trainable_parameters()[0]


def test_ranks_become_equal_and_unequal_with_the_experts(llama, text, randomise, tmp_path):
    model = adapt(llama(), r=[4, 4, 8], num_experts=3, lora_alpha=6)
    randomise(model)
    assert stacks(model)[0].shape == (16, 32)
    remove_expert(model, 2)
    layer = next(tuner_layers(model))
    assert stacks(model)[0].shape == (2, 4, 32) and model.peft_config["default"].r == [4, 4]
    assert layer.r["default"] == 4 and layer.scaling["default"] == 1.5
    add_expert(model)
    assert stacks(model)[0].shape == (3, 4, 32)
    add_expert(model, rank=2)
    assert stacks(model)[0].shape == (14, 32) and model.peft_config["default"].r == [4, 4, 4, 2]
    with torch.no_grad():
        layer.moe_lora_B["default"].fill_(1.0)
    torch.testing.assert_close(layer.scaled_b("default")[0], torch.tensor([1.5] * 12 + [3.0] * 2))
    assert_near(real_logits(reloaded(model, llama, tmp_path), text), real_logits(model, text), 1e-6)


@pytest.mark.parametrize("fields", RANKED, ids=lambda fields: "-".join(map(str, fields.values()))[:40])
def test_frozen_experts_of_their_own_rank_stay_to_the_bit(llama, text, randomise, tmp_path, fields):
    number = len(fields["r"]) if isinstance(fields["r"], list) else 3
    model = adapt(llama(), num_experts=number, num_experts_per_tok=None, **fields)
    randomise(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    step(model, text, optimizer)
    freeze_experts(model, [0, 2])
    before = parts(model)
    step(model, text, optimizer)
    loaded = reloaded(model, llama, tmp_path)
    step(loaded, text, torch.optim.AdamW(loaded.parameters(), lr=1e-2, weight_decay=0.1))
    real_logits(loaded, text)
    for item in (model, loaded):
        for found, was in zip(parts(item), before, strict=True):
            assert same([found[0], found[2]], [was[0], was[2]]) and not torch.equal(found[1], was[1])


def test_the_parts_of_an_expert_on_stacked_weights_go_together(own_model, image_rows, randomise, tmp_path):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(
        own_model(), MoeLoraConfig(target_parameters=targets, router="constant", num_experts=2, r=[2, 4])
    ).eval()
    randomise(model)
    before = parts(model)
    add_expert(model, rank=3)
    add_expert(model, copy_of=0)
    remove_expert(model, 0)
    freeze_experts(model, [0])
    found = parts(model)
    assert all(same([new[0], new[2]], [was[1], was[0]]) for new, was in zip(found, before, strict=True))
    model.train()(**image_rows).loss.backward()
    for layer in tuner_layers(model.eval()):
        lora_b = layer.moe_lora_B["default"]
        gradients = layer.experts["default"].target.split("B", lora_b.grad)
        assert not any(gradient.any() for gradient in gradients[:4]) and any(g.any() for g in gradients[4:])
    inputs = {name: value for name, value in image_rows.items() if name != "labels"}
    with torch.no_grad():
        expected = model(**inputs).logits
        found = reloaded(model, own_model, tmp_path)(**inputs).logits
    assert_near(found, expected, 1e-6)


def test_targets_with_another_number_of_experts_keep_theirs(llama, text, randomise, tmp_path):
    model = get_peft_model(llama(), MoeLoraConfig.from_system("mixlora", r=4)).eval()
    randomise(model)
    edited = [layer.num_experts("default") > 1 for layer in tuner_layers(model)]
    assert any(edited) and not all(edited)
    before, number = parts(model), model.peft_config["default"].num_experts
    add_expert(model, "small", rank=2)
    freeze_experts(model, [number - 1])
    remove_expert(model, 0)
    assert model.peft_config["default"].frozen_experts == [number - 2]
    for place, (found, was) in enumerate(zip(parts(model), before, strict=True)):
        assert same(found[:-1], was[1:]) if edited[place // 2] else same(found, was)
    loaded = reloaded(model, llama, tmp_path)
    assert_near(real_logits(loaded, text), real_logits(model, text), 1e-6)
    step(loaded, text, torch.optim.AdamW(loaded.parameters(), lr=1e-2, weight_decay=0.1))
    real_logits(loaded, text)
    for place, (found, was) in enumerate(zip(parts(loaded), parts(model), strict=True)):
        stayed = [torch.equal(*pair) for pair in zip(found, was, strict=True)][: number - 1]
        assert stayed == [edited[place // 2] and expert == number - 2 for expert in range(len(stayed))]


ONE_ALONE = {"q_proj": {"num_experts": 1, "num_experts_per_tok": 1, "router": "constant"}}


@pytest.mark.parametrize(
    "fields, edit, message",
    [
        ({}, lambda model: remove_expert(model, 7), "There is no expert 7; the experts are"),
        ({}, lambda model: rename_expert(model, 0, "1"), "has an expert '1' already"),
        ({}, lambda model: rename_expert(model, 0, 5), "is a text that is not empty, and not 5"),
        ({}, lambda model: add_expert(model, "1"), "has an expert '1' already"),
        ({}, lambda model: add_expert(model, ""), "is a text that is not empty"),
        ({}, lambda model: remove_expert(model, True), "There is no expert True"),
        ({}, lambda model: freeze_experts(model, "10"), r"must be a list of experts, such as \['10'\]"),
        ({}, lambda model: freeze_experts(model, [1, 9]), "There is no expert 9"),
        ({}, lambda model: add_expert(model, adapter_name="none"), "no LoRA experts of the name 'none'"),
        ({}, lambda model: add_expert(model, copy_of=1, rank=2), "leave rank=2 out, or copy_of"),
        ({}, lambda model: add_expert(model, rank=0), "0.* must be at least 1"),
        ({"r": [2, 4, 4, 8]}, lambda model: add_expert(model), r"ranks \[2, 4, 4, 8\]: give the rank"),
        ({"router": "condition"}, lambda model: remove_expert(model, 1), "only the last expert can be removed"),
        ({"router": "moiie"}, lambda model: remove_expert(model, 1), "group_fractions"),
        ({"num_experts": 2}, lambda model: remove_expert(model, 1), "num_experts"),
        ({"experts": "rank1_pairs", "r": 1}, lambda model: freeze_experts(model, [1]), "share their parameters"),
        (
            {"num_experts": 2, "num_experts_per_tok": 1, "target_overrides": ONE_ALONE},
            lambda model: remove_expert(model, 1),
            "'model.layers.0.self_attn.q_proj' of adapter 'default' has 1 experts of its own",
        ),
        (
            {"target_overrides": {"q_proj|v_proj|down_proj": {"num_experts": 3}}},
            lambda model: add_expert(model),
            "No target of adapter 'default' has the num_experts=4 experts",
        ),
    ],
)
def test_what_cannot_be_edited_is_refused_and_stays(llama, fields, edit, message):
    model = adapt(llama(), **fields)
    before = [stack.detach().clone() for stack in stacks(model)]
    config = copy.deepcopy(model.peft_config["default"])
    with pytest.raises(ValueError, match=message):
        edit(model)
    assert all(torch.equal(stack, was) for stack, was in zip(stacks(model), before, strict=True))
    assert model.peft_config["default"] == config


def test_experts_that_go_with_those_of_a_host_are_as_many(own_model, image_rows, randomise):
    model = adapt(own_model(), target_modules=["mlp.experts"], router="host", num_experts=4)
    randomise(model)
    for edit in (add_expert, lambda model: remove_expert(model, 3)):
        with pytest.raises(ValueError, match="is 'host': its experts go with those of the model"):
            edit(model)
    rename_expert(model, 3, "code")
    freeze_experts(model, ["code"])
    model.train()(**image_rows).loss.backward()
    assert not any(stack.grad[3].any() for stack in stacks(model)) and stacks(model)[1].grad[:3].any()


def test_another_method_has_no_experts(llama):
    model = get_peft_model(llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="no LoRA experts"):
        expert_names(model)
