"""What other tools look for in a model: names, fields and behaviour that TRL, PEFT, accelerate and vLLM rely on."""

import copy

import pytest
import torch
from accelerate import infer_auto_device_map
from helpers.near import assert_near
from peft import LoraConfig, get_peft_model
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def test_text_config_has_the_fields_that_trl_reads(tiny_config):
    text = tiny_config().get_text_config()
    assert (text.num_experts, text.num_experts_per_tok) == (4, 2)
    assert text.output_router_logits is False
    assert text.router_aux_loss_coef == 0.0


def test_base_model_returns_router_logits_that_stack(tiny_model, training_batch):
    model = tiny_model()
    labels = training_batch.pop("labels")
    outputs = model.base_model(**training_batch, output_router_logits=True)
    assert model.get_output_embeddings()(outputs.last_hidden_state).shape == (*labels.shape, 96)
    balance = load_balancing_loss_func(outputs.router_logits, 4, 2, training_batch["attention_mask"])
    assert 1.5 < balance.item() < 8.0
    balance.backward()
    assert model.moe_layers()[1].gate.weight.grad.abs().max() > 0


def test_trl_sft_trainer_trains_every_moe_parameter(tiny_model, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{index}": index for index in range(96)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w3")), pad_token="w0", eos_token="w2"
    )
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 90, (8 + n,), generator=generator).tolist()} for n in range(8)]
    model = tiny_model(tower=False)
    before = copy.deepcopy(model.state_dict())
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        router_aux_loss_coef=0.1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    assert "aux_loss" in {key for entry in trainer.state.log_history for key in entry}
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_image_inputs_are_named_as_generate_expects(tiny_model):
    assert {"pixel_values", "pixel_attention_mask", "mm_encoder_outputs"} < set(
        MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
    )
    assert tiny_model()._supports_mm_encoder_outputs()


def test_class_name_selects_the_causal_loss(tiny_model):
    model = tiny_model()
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert model.loss_function.__name__ == "ForCausalLMLoss"
    assert model.can_generate()


def peft_model(model, **fields):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **fields))


def step(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(**batch).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("implementation", ["eager", "ragged"])
def test_peft_adapts_stacked_experts_and_the_gate_and_merges(tiny_model, training_batch, implementation):
    model = tiny_model()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        original = model(**training_batch).logits
    targets = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    adapted = peft_model(model, target_modules=["q_proj"], target_parameters=targets)
    names = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len([name for name in names if ".mlp." in name]) == 2 * 2 * 3
    with torch.no_grad():
        assert_near(adapted(**training_batch).logits, original)  # a fresh adapter changes nothing
    step(adapted.train(), training_batch)
    adapted.eval()
    with torch.no_grad():
        trained = adapted(**training_batch).logits
        assert (trained - original).abs().max() > 1e-3
        merged = adapted.merge_and_unload()
        assert_near(merged(**training_batch).logits, trained, 1e-4)
    assert merged.moe_layers()[1].experts.gate_up_proj.shape == (4, 96, 32)


def test_peft_may_train_a_whole_moe_block(tiny_model, training_batch, tmp_path):
    model = tiny_model(moe_config={"router": {"name": "moiie"}, "objectives": {"load_balance": 0.1}})
    with torch.no_grad():
        original = model(**training_batch, output_routing=True)
    adapted = peft_model(model, target_modules=["q_proj"], modules_to_save=["mlp"])
    with torch.no_grad():
        wrapped = adapted(**training_batch, output_routing=True)
    assert_near(wrapped.logits, original.logits)
    assert torch.equal(wrapped.routing.decisions[1].expert_index, original.routing.decisions[1].expert_index)
    step(adapted.train(), training_batch)
    adapted.save_pretrained(tmp_path)
    from peft import PeftModel

    base = tiny_model(moe_config={"router": {"name": "moiie"}, "objectives": {"load_balance": 0.1}})
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert_near(loaded(**training_batch).logits, adapted.eval()(**training_batch).logits)


def test_device_maps_keep_decoder_layers_whole(tiny_model):
    model = tiny_model()
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer"} <= set(model._no_split_modules)
    layer = sum(parameter.numel() * 4 for parameter in model.model.language_model.layers[1].parameters())
    device_map = infer_auto_device_map(
        model,
        max_memory={0: layer * 5 // 2, "cpu": 10**9},
        no_split_module_classes=model._no_split_modules,
    )
    assert set(device_map.values()) == {0, "cpu"}
    assert [name for name in device_map if ".mlp" in name or ".self_attn" in name] == []


def test_moe_blocks_have_one_class_to_name_in_wrapping_policies(tiny_model):
    blocks = [module for module in tiny_model().modules() if type(module).__name__ == "MoELayer"]
    assert len(blocks) == 2
    assert [sorted(name for name, _ in block.named_children()) for block in blocks] == [["experts", "gate"]] * 2


def test_expert_parameters_have_the_names_that_loaders_and_plans_match(tiny_model):
    names = {name for name, _ in tiny_model().named_parameters() if ".mlp." in name and ".layers.1." in name}
    prefix = "model.language_model.layers.1.mlp."
    language = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    assert language == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    plain = {name for name, _ in tiny_model("gpt_neox").moe_layers()[1].experts.named_parameters()}
    assert plain == {"up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}
