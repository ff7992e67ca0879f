"""Encoders: what is known of rows and tokens in a ViT, DINOv2, a tower or BERT reaches the routers and objectives."""

import pytest
import torch
from helpers.adapted import decisions, logits
from helpers.hosts.families import HOSTS, pixels
from helpers.near import assert_near
from peft import get_peft_model
from transformers import MPNetConfig, MPNetModel, Trainer, TrainingArguments

from hf_moe import MoeLoraConfig
from hf_moe.training.logs import LogRouting


TASKS = torch.tensor([1, 0])
ENCODERS = ["vit", "dinov2", "siglip", "bert"]


def adapt(name, **fields):
    torch.manual_seed(0)
    host = HOSTS[name].build().eval()
    return get_peft_model(host, MoeLoraConfig(**{"target_modules": HOSTS[name].targets, **fields})).eval()


@pytest.mark.parametrize("router_input", ["decoder_layer", "model", "target"])
@pytest.mark.parametrize("name", ENCODERS)
def test_task_ids_pick_the_expert_of_a_row_also_in_a_recomputation(name, router_input, randomise):
    inputs, found = HOSTS[name].inputs(), []
    for checkpointing in (False, True):
        model = adapt(name, router={"name": "condition", "condition": "task"}, router_input=router_input)
        randomise(model)
        made = decisions(model)
        logits(model, inputs, task_ids=TASKS)
        for decision in made:
            assert torch.equal(decision.expert_index.view(2, -1)[:, 0], TASKS)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(**inputs, task_ids=TASKS).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    for key, gradient in found[0].items():
        assert_near(found[1][key], gradient, 1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_pooled_gate_reads_the_whole_of_a_row_and_no_other(name, randomise):
    model = adapt(name, router={"name": "sequence", "pooling": "sum"}, router_input="model")
    randomise(model)
    made = decisions(model)
    inputs = HOSTS[name].inputs()
    together = logits(model, inputs)
    gates = made[0].router_probs.view(2, -1, 4)
    torch.testing.assert_close(gates, gates[:, :1].expand_as(gates))
    assert (gates[0] - gates[1]).abs().max() > 1e-3
    alone = {key: value[1:] for key, value in inputs.items()}
    if name == "bert":  # without its padding
        alone = {key: value[:, :6] for key, value in alone.items() if key != "labels"}
    assert_near(logits(model, alone), together[1:], 1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_objectives_reach_the_loss_and_the_logs(name, randomise, tmp_path):
    inputs = HOSTS[name].inputs()
    fields = {"objectives": {"load_balance": 0.5, "router_z": 0.1}}
    plain, balanced = adapt(name), adapt(name, **fields)
    for model in (plain, balanced):
        randomise(model)
    assert balanced(**inputs).loss > plain(**inputs).loss + 0.3
    rows = [{key: value[row] for key, value in inputs.items()} for row in range(2)] * 2
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(balanced, arguments, train_dataset=rows, callbacks=[LogRouting()])
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    modality = "text" if name == "bert" else "image"
    assert logged[f"routing/{modality}/early/active"] == 2.0 and logged["objective/router_z"] > 0


def test_becotta_takes_a_gate_per_domain_in_a_vision_transformer(vit, randomise):
    config = MoeLoraConfig.from_system("becotta", modules_to_save=["classifier"])
    model = get_peft_model(vit(), config).eval()
    randomise(model)
    images = {"pixel_values": pixels()}
    assert not torch.equal(logits(model, images, domain_ids=TASKS), logits(model, images, domain_ids=TASKS.flip(0)))
    assert model(**images, labels=TASKS, domain_ids=TASKS).loss.isfinite()
    with pytest.raises(ValueError, match="reads the condition .domain."):
        logits(model, images)


def test_a_router_of_modalities_is_refused_in_a_tower_with_the_reason():
    for fields in ({"router": "modality", "num_experts": 2, "num_experts_per_tok": 1}, {"router": "moiie"}):
        with pytest.raises(ValueError, match="have but one"):
            adapt("vit", **fields)


def test_padded_images_whose_patches_are_not_told_are_refused():
    model = adapt("vit", router="condition")
    mask = torch.ones(2, 16, 16)
    with pytest.raises(ValueError, match="not the rows of the call"):
        logits(model, {"pixel_values": pixels()}, task_ids=TASKS, pixel_mask=mask)


def test_attention_that_returns_a_tuple_of_one_still_does_with_experts_around_it():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    host = MPNetModel(MPNetConfig(**sizes, vocab_size=64)).eval()
    inputs = {"input_ids": torch.randint(1, 60, (2, 5))}
    with torch.no_grad():
        expected = host(**inputs).last_hidden_state
        model = get_peft_model(host, MoeLoraConfig(target_modules=["attention"])).eval()
        assert_near(model(**inputs).last_hidden_state, expected, 1e-6)
