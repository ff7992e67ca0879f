"""Training LoRA experts: checkpointing, autocast, objectives, Trainer."""

import pytest
import torch
from datasets import Dataset
from helpers.near import assert_near
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_moe import MoeLoraConfig


TARGETS = ["q_proj", "v_proj", "down_proj"]
OBJECTIVES = {"load_balance": 0.1, "router_z": 0.01}


def adapt(model, **fields):
    fields = {"target_modules": TARGETS, "objectives": OBJECTIVES, **fields}
    return get_peft_model(model, MoeLoraConfig(**fields)).train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def close(first, second, atol=1e-6):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(
            gradient, second[name], atol=atol, rtol=1e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("router_input", ["decoder_layer", "target"])
@pytest.mark.parametrize("num_experts", [4, 24])
def test_checkpointing_is_exact_with_two_forwards_and_one_backward(llama, text, randomise, num_experts, router_input):
    other = {name: value.flip(1) for name, value in text.items()}
    found = []
    for checkpointing in (False, True):
        model = adapt(llama(), num_experts=num_experts, router_input=router_input)
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        (model(**text).loss - model(**other).loss).backward()
        found.append(gradients(model))
    assert any(gradient.abs().max() > 1e-3 for gradient in found[0].values())
    close(*found)


def test_reentrant_checkpointing_is_refused_where_it_would_cut_the_objectives(llama, text):
    model = adapt(llama())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**text)


def test_objectives_enter_the_loss_by_the_formula(llama, own_model, text, randomise):
    for build in (llama, own_model):
        options = {"exclude_modules": r".*vision_tower.*"}
        plain = adapt(build(), objectives={}, **options)
        balanced = adapt(build(), objectives={"router_z": 0.5}, **options)
        randomise(plain)
        randomise(balanced)
        logits = []

        def record(module, args, output, logits=logits):
            logits.append(output.router_logits)

        for module in balanced.modules():
            if hasattr(module, "moe_lora_router") and module.moe_lora_router:
                module.moe_lora_router["default"].register_forward_hook(record)
        loss = balanced(**text, num_items_in_batch=40).loss
        mask = text["attention_mask"].bool()
        expected = 0.0
        for layer_logits in logits:
            square = layer_logits.logsumexp(-1).square().view(mask.shape).masked_fill(~mask, 0.0)
            labels = (text["labels"][:, 1:] != -100).sum(-1)
            expected = expected + (labels / 40 * square.sum(-1) / mask.sum(-1)).sum() / len(logits)
        assert len(logits) == 2
        torch.testing.assert_close(loss - plain(**text, num_items_in_batch=40).loss, 0.5 * expected)


@pytest.mark.parametrize("router", [{"name": "top_k"}, {"name": "deepseek_v3", "bias_update_rate": 0.5}])
def test_router_gradients_do_not_depend_on_how_rows_are_split(llama, text, randomise, router):
    found = []
    for rows in (2, 1):
        model = adapt(llama(), router=router)
        randomise(model)
        total = (text["labels"][:, 1:] != -100).sum()
        for step in range(2):  # the second step balances against the population of the first
            model.zero_grad()
            for start in range(0, 2, rows):
                part = {name: value[start : start + rows] for name, value in text.items()}
                model(**part, num_items_in_batch=total).loss.backward()
            assert step == 1 or gradients(model)
        found.append(gradients(model))
    close(*found)


def test_a_disabled_adapter_adds_no_objective_and_a_call_without_labels_works(llama, text):
    model = adapt(llama())
    reference = llama()(**text).loss
    assert model(**text).loss > reference
    with model.disable_adapter():
        torch.testing.assert_close(model(**text).loss, reference)
    assert model(input_ids=text["input_ids"]).loss is None


def test_a_loss_that_cannot_be_reached_is_an_error(llama, text):
    with pytest.raises(ValueError, match="return_dict"):
        adapt(llama())(**text, return_dict=False)


@pytest.mark.parametrize("num_experts", [4, 24])
def test_bfloat16_autocast_trains_close_to_float32(llama, text, randomise, num_experts):
    found = []
    for enabled in (False, True):
        model = adapt(llama(), num_experts=num_experts, num_experts_per_tok=num_experts - 1)
        randomise(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(**text).loss
        loss.backward()
        found.append((loss, gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], atol=0.1, rtol=0.02)
    for name, gradient in found[0][1].items():
        assert F.cosine_similarity(gradient.flatten(), found[1][1][name].flatten(), dim=0) > 0.9, name


def test_a_bfloat16_base_keeps_the_adapter_in_float32(llama, text):
    model = adapt(llama().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model(**text)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"experts": "ia3", "router": "sequence", "router_input": "model", "target_modules": ["v_proj", "down_proj"]},
        {"ffn_experts": True, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    ],
    ids=["lora", "ia3", "ffn"],
)
def test_trl_trains_the_experts_and_nothing_else(llama, tmp_path, fields):
    words = {word: index for index, word in enumerate("<pad> <unk> <s> </s> a b c d".split())}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    rows = Dataset.from_list([{"text": "a b c d a"}, {"text": "b c d"}] * 2)
    arguments = SFTConfig(
        tmp_path, max_steps=2, learning_rate=0.05, save_strategy="no", report_to="none", use_cpu=True, bf16=False
    )
    config = MoeLoraConfig(**{"target_modules": TARGETS, **fields})
    trainer = SFTTrainer(llama(), arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, start[name]) != ("moe_lora_" in name), name


@pytest.mark.parametrize("experts", ["lora", "ia3", "bottleneck"])
def test_trainer_resumes_to_the_same_adapter(llama, tmp_path, experts):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 60, (8, 6), generator=generator).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])

    def run(folder, resume=None):
        torch.manual_seed(5)
        targets = ["v_proj", "down_proj"]
        model = adapt(llama(), experts=experts, router={"name": "deepseek_v3"}, target_modules=targets)
        arguments = TrainingArguments(
            tmp_path / folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            save_steps=2,
            learning_rate=0.01,
            gradient_checkpointing=True,
            bf16=True,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in model.state_dict().items() if "moe_lora_" in name}

    whole = run("whole")
    resumed = run("resumed", tmp_path / "whole" / "checkpoint-2")
    assert any("e_score_correction_bias" in name and value.abs().max() > 0 for name, value in whole.items())
    assert any("population" in name and value.sum() > 0 for name, value in whole.items())
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert_near(resumed[name], value, 1e-6)
