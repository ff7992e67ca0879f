"""Routers of adapters: sequence level, by task, by modality; shared by a layer or by the model; and their logs."""

import pytest
import torch
from datasets import Dataset
from helpers.adapted import decisions, logits, with_cache
from helpers.near import assert_near
from peft import PeftModel, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_moe import MoeLoraConfig
from hf_moe.adapters import routing_inputs
from hf_moe.adapters.layer import tuner_layers
from hf_moe.training.logs import LogRouting


TARGETS = ["q_proj", "down_proj"]
END = 61


def adapt(model, **fields):
    return get_peft_model(model, MoeLoraConfig(**{"target_modules": TARGETS, **fields})).eval()


def routers(model):
    return [layer.moe_lora_router["default"] for layer in tuner_layers(model) if layer.moe_lora_router]


def watch(model):
    """Collect the gates (T, E) of every router, in the order of their decisions."""
    gates = []

    def record(router, args, decision):
        table = decision.expert_weight.new_zeros(len(decision.expert_index), router.spec.num_experts + 1)
        gates.append(table.scatter_add(1, decision.expert_index, decision.expert_weight)[:, :-1].detach())

    for router in routers(model):
        router.register_forward_hook(record)
    return gates


POOLED = [
    {"router": "sequence"},
    {"router": {"name": "sequence", "pooling": "sum"}},
    {"router": "sequence", "router_input": "model"},
    {"router": "sequence", "router_input": "target", "num_experts_per_tok": None},
    {"router": {"name": "sequence", "end_token_id": END}, "router_input": "model"},
]


@pytest.mark.parametrize("fields", POOLED, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_pooled_gate_sees_no_later_token_no_padding_and_no_other_row(llama, text, randomise, fields):
    model = adapt(llama(), **fields)
    randomise(model)
    text["input_ids"][:, 6] = END
    together = logits(model, text)
    later = {**text, "input_ids": text["input_ids"].clone()}
    later["input_ids"][:, 7:] = 5
    assert_near(logits(model, later)[:, :7], together[:, :7], 1e-6)
    alone = logits(model, {"input_ids": text["input_ids"][1:, 3:]})
    assert_near(together[1:, 3:], alone, 1e-5)


@pytest.mark.parametrize("fields", POOLED, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_pooled_gate_is_the_same_with_a_cache(llama, text, randomise, fields):
    model = adapt(llama(), **fields)
    randomise(model)
    text["input_ids"][:, 5] = END
    whole = logits(model, text)
    with torch.no_grad():
        cache, steps = {}, []
        for start, stop in ((0, 4), (4, 7), (7, 8), (8, 9)):
            output = model(
                input_ids=text["input_ids"][:, start:stop],
                attention_mask=text["attention_mask"][:, :stop],
                **cache,
                use_cache=True,
            )
            cache = with_cache(model, output)
            steps.append(output.logits)
    real = text["attention_mask"].bool()
    assert_near(torch.cat(steps, 1)[real], whole[real], 1e-5)
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(**inputs, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **options))


STATIC = [*POOLED[:2], POOLED[-1]]


@pytest.mark.parametrize("fields", STATIC, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_pooled_gate_is_the_same_with_a_cache_of_fixed_size(llama, text, randomise, fields, num_beams):
    model = adapt(llama(), **fields)
    randomise(model)
    text["input_ids"][:, 5] = END
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False, "eos_token_id": None}
    grown = model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
    for _ in range(2):  # the second call finds the cache of the first
        fixed = model.generate(
            **inputs, **options, cache_implementation="static", output_scores=True, return_dict_in_generate=True
        )
        assert torch.equal(fixed.sequences, grown.sequences)
        assert_near(torch.stack(fixed.scores), torch.stack(grown.scores), 1e-5)


@pytest.mark.parametrize("layer_types", [["sliding_attention", "full_attention"], ["sliding_attention"] * 2])
def test_a_pooled_gate_is_the_same_with_a_sliding_cache_of_fixed_size(text, randomise, layer_types):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64}
    config = Gemma3TextConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=layer_types,
        sliding_window=4,
        pad_token_id=0,
    )
    model = adapt(Gemma3ForCausalLM(config).eval(), router="sequence")
    randomise(model)
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    grown = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), grown)


def test_a_mask_that_does_not_tell_what_is_padding_is_refused_by_a_pooled_gate(llama, text):
    packed = torch.eye(9).bool()[None, None].expand(2, 1, 9, 9)
    with pytest.raises(ValueError, match="must know what is padding"):
        logits(adapt(llama(), router="sequence"), {"input_ids": text["input_ids"], "attention_mask": packed})


def test_a_pooled_gate_reads_images_in_our_own_models_with_a_cache(own_model, image_rows, randomise):
    model = adapt(own_model(), target_modules=r".*language_model.*(q_proj|v_proj)", router="sequence")
    randomise(model)
    image_rows["attention_mask"][:] = 1
    whole = logits(model, image_rows)
    with torch.no_grad():
        first = {name: image_rows[name][:, :8] for name in ("input_ids", "attention_mask")}
        cache = with_cache(model, model(**first, pixel_values=image_rows["pixel_values"], use_cache=True))
        last = model(
            input_ids=image_rows["input_ids"][:, 8:],
            attention_mask=image_rows["attention_mask"],
            **cache,
        ).logits
    assert_near(last, whole[:, 8:], 1e-5)


def test_a_cache_without_the_memory_of_a_pooled_router_is_refused(llama, text):
    model = adapt(llama(), router="sequence")
    with torch.no_grad(), model.disable_adapter():
        cache = with_cache(model, model(input_ids=text["input_ids"], use_cache=True))
    with pytest.raises(ValueError, match="start from an empty cache"):
        model(input_ids=text["input_ids"][:, :1], **cache)


def test_a_pooled_gate_refuses_a_cache_that_went_on_without_it(llama, text):
    model = adapt(llama(), router="sequence")
    model.add_adapter("other", MoeLoraConfig(target_modules=TARGETS))
    step = {"input_ids": text["input_ids"][:, :2]}
    with torch.no_grad():
        cache = with_cache(model, model(**step, use_cache=True))
        assert [type(item).__name__ for item in cache.values()] == ["DynamicCache"]
        model.set_adapter("other")
        model(**step, **cache)
        model.set_adapter("default")
        with pytest.raises(ValueError, match="holds 4, of which 2 were computed without"):
            model(**step, **cache)


@pytest.mark.parametrize("fields", POOLED, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_pooled_gate_generates_the_same_with_candidates_that_are_taken_back(llama, text, randomise, fields):
    model = adapt(llama(), **fields)
    randomise(model, 1)
    inputs = {name: text[name][1:, 3:] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**inputs, **options)
    torch.manual_seed(0)
    assistant = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1})).eval()
    assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), plain)
    looked_up = model.generate(**inputs, **options, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert torch.equal(looked_up, plain)


def test_an_instruction_level_gate_pools_the_named_modalities_up_to_its_end(own_model, image_rows, randomise):
    router = {"name": "sequence", "modalities": ["text"], "end_token_id": END}
    model = adapt(own_model(), target_modules=r".*language_model.*q_proj", router=router, router_input="model")
    randomise(model)
    image_rows["attention_mask"][:] = 1
    image_rows["input_ids"][1, :3] = 7
    image_rows["input_ids"][:, 2] = END
    gates = watch(model)
    logits(model, image_rows)
    logits(model, {**image_rows, "pixel_values": image_rows["pixel_values"].flip(0) + 1})
    assert len(gates) == 2
    torch.testing.assert_close(gates[0], gates[1], atol=0, rtol=0)
    per_row = gates[0].view(2, 9, 4)
    assert (per_row[:, 3:] == per_row[:, 2:3]).all() and not torch.equal(per_row[:, 2], per_row[:, 1])
    image_rows["input_ids"][:, 1] = 9
    logits(model, image_rows)
    assert not torch.equal(gates[2], gates[0])


@pytest.mark.parametrize("router", ["top_k", "sequence", "moiie"])
def test_one_router_for_the_model_decides_once_also_in_a_recomputation(llama, text, randomise, router):
    found = []
    for checkpointing in (False, True):
        model = adapt(llama(), router=router, router_input="model", rank_pattern={"1.self_attn.q_proj": 64})
        randomise(model)
        assert len(routers(model)) == 1
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        gates = watch(model)
        logits(model, text)
        assert len(gates) == 1
        other = {name: value.flip(1) for name, value in text.items()}
        (model.train()(**text).loss - model(**other).loss).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient, 1e-5)
    assert any("router" in name and gradient.any() for name, gradient in found[0].items())


def test_the_tower_of_a_model_for_text_cannot_share_one_router_with_all_layers(own_model):
    with pytest.raises(ValueError, match="passes nothing from layer to layer"):
        adapt(own_model(), target_modules=r".*vision.*q_proj", router_input="model")


def test_task_ids_pick_the_expert_of_a_row(llama, text, randomise, tmp_path):
    model = adapt(llama(), router={"name": "condition", "condition": "task"}, num_experts=2)
    randomise(model)
    task = torch.tensor([1, 0])
    gates = watch(model)
    found = logits(model, text, task_ids=task)
    expected = torch.eye(2)[task].repeat_interleave(9, 0)
    expected[9:12] = 0  # padding
    assert len(gates) == 2 and all(torch.equal(item * text["attention_mask"].view(-1, 1), expected) for item in gates)
    torch.testing.assert_close(logits(model, text, condition_ids={"task": task}), found)
    with routing_inputs(task=task):
        torch.testing.assert_close(logits(model, text), found)
        inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
        model.generate(**inputs, max_new_tokens=2, num_beams=2, pad_token_id=0)
    base = logits(llama(), text)
    assert_near(logits(model, text, task_ids=torch.tensor([-1, -1])), base, 1e-6)
    with pytest.raises(ValueError, match="reads the condition .task."):
        logits(model, text)
    assert not any(parameter.numel() for router in routers(model) for parameter in router.parameters())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_near(logits(loaded, text, task_ids=task), found, 1e-6)


def test_task_ids_train_as_a_column_with_trainer(llama, tmp_path):
    model = adapt(llama(), router="condition", num_experts=3)
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "task_ids": n % 2} for n in range(4)])
    arguments = TrainingArguments(
        tmp_path, max_steps=1, learning_rate=0.1, remove_unused_columns=False, report_to="none", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    moved = next(tuner_layers(model)).moe_lora_B["default"].detach().abs().sum((1, 2)) > 0
    assert moved.tolist() == [True, True, False]


def test_modality_ids_pick_the_expert_of_a_token(own_model, image_rows, randomise):
    model = adapt(
        own_model(),
        target_modules=r".*language_model.*q_proj",
        router={"name": "modality", "modalities": ["image", "text"]},
        num_experts=2,
        num_experts_per_tok=1,
    )
    gates = watch(model)
    logits(model, image_rows)
    image = (image_rows["input_ids"] == 60).flatten()
    assert torch.equal(gates[0][image], torch.tensor([[1.0, 0.0]]).expand(8, 2))
    assert (gates[0][~image & image_rows["attention_mask"].flatten().bool()] == torch.tensor([0.0, 1.0])).all()
    with pytest.raises(ValueError, match="one expert per modality"):
        MoeLoraConfig(target_modules=["q_proj"], router="modality", num_experts=3)


def test_top_p_uses_as_many_experts_as_it_takes(llama, text, randomise):
    model = adapt(llama(), router={"name": "dynamic_moe_top_p", "top_p_threshold": 0.6}, num_experts=6)
    randomise(model)
    gates = watch(model)
    logits(model, text)
    used = (gates[0] > 0).sum(-1)[text["attention_mask"].flatten().bool()]
    assert used.min() >= 1 and used.max() > used.min()


def test_slots_that_mix_all_tokens_are_refused_in_causal_layers(llama, vit):
    fields = {"experts": "bottleneck", "target_modules": ["mlp"], "router_input": "target"}
    with pytest.raises(ValueError, match="hides later tokens"):
        adapt(llama(), router="soft_moe", **fields)
    with pytest.raises(ValueError, match="SlotMixture"):
        adapt(vit(), router="soft_moe", router_input="target", target_modules=["q_proj"], experts="ia3")


def test_the_objectives_of_routers_of_several_kinds_reach_the_loss(llama, text, randomise):
    fields = {
        "router_input": "model",
        "objectives": {"load_balance": 0.5},
        "target_overrides": {"q_proj": {"router": "constant", "num_experts": 1, "num_experts_per_tok": 1}},
    }
    for router in ("top_k", "sequence"):
        plain, balanced = (
            adapt(llama(), router=router, **{**fields, "objectives": {}}),
            adapt(llama(), router=router, **fields),
        )
        for model in (plain, balanced):
            randomise(model)
        assert balanced(**text).loss > plain(**text).loss + 0.1


def test_an_evaluation_logs_the_objectives_as_those_of_our_models(llama, tmp_path):
    model = adapt(llama(), objectives={"router_z": 0.01})
    rows = [{"input_ids": [5 + i, 6, 7, 8], "labels": [5 + i, 6, 7, 8]} for i in range(3)]
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    options |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.0}
    rows = Dataset.from_list(rows)
    given = {"train_dataset": rows, "eval_dataset": rows, "callbacks": [LogRouting()]}
    trainer = Trainer(model, TrainingArguments(tmp_path, **options), **given)
    trainer.train()
    logged = [entry["eval_objective/router_z"] for entry in trainer.state.log_history if "eval_loss" in entry]
    with torch.no_grad():
        decided = decisions(model)
        for row in rows:
            model.eval()(input_ids=torch.tensor([row["input_ids"]]))
    expected = torch.stack([item.router_logits.logsumexp(-1).square().mean() for item in decided]).mean()
    assert len(logged) == 2 and logged == pytest.approx([float(expected)] * 2, rel=1e-4)
    assert not any("eval_objective/router_z" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_routing_and_objectives_are_logged_by_name_in_any_trainer(llama, tmp_path):
    model = adapt(llama(), objectives={"load_balance": 0.1, "router_z": 0.01})
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[LogRouting()])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry in logged:
        assert entry["routing/text/early/active"] == 2.0
        assert 0.9 < entry["objective/load_balance"] < 4 and entry["objective/router_z"] > 0
    assert not [h for h in model.base_model.model._forward_hooks.values() if getattr(h, "__self__", None)]
