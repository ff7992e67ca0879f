"""Losses on the mean routing of each modality, of LoRA experts and of a hosted model that sees."""

import pytest
import torch
from helpers.hosts.families import HOSTS
from peft import get_peft_model

from hf_moe import HfMoeForConditionalGeneration, MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers


FIELDS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router": {"name": "top_k", "modality_bias": "logits"},
    "objectives": {"smar": 1.0, "global_entropy": {"coef": 1.0, "min_experts": {"text": 4, "image": 4}}},
}


def adapted(host):
    targets = r".*language_model.*layers\.1\..*q_proj"
    model = get_peft_model(host, MoeLoraConfig(target_modules=targets, **FIELDS))
    (layer,) = tuner_layers(model)
    return model, layer.moe_lora_router["default"], layer.moe_lora_objectives["default"].by_name


def hosted(host):
    model = HfMoeForConditionalGeneration.from_host(host, moe_config={"layers": [1], **FIELDS})
    return model, model.moe_layers()[1].router, model.objectives.by_name


@pytest.mark.parametrize("made", [adapted, hosted])
def test_two_steps_tell_the_routing_of_text_from_that_of_images(made):
    torch.manual_seed(0)
    model, router, objectives = made(HOSTS["llava"].build())
    inputs = HOSTS["llava"].inputs()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**{**inputs, "labels": inputs["input_ids"]}).loss.backward()
        optimizer.step()
        gradients.append(router.modality_bias.grad.clone())
    # Nothing has moved, so what the second step adds is the gradient of the losses: they know a population by then.
    of_losses = gradients[1] - gradients[0]
    assert of_losses[:2].abs().amax(1).min() > 1e-3 and not of_losses[2:].any()
    for name in FIELDS["objectives"]:
        objective = objectives[name]
        sums = objective.get_buffer(next(key for key, _ in objective.named_buffers() if "population" in key))
        image = (inputs["input_ids"] == model.config.image_token_id).sum()
        assert sums[:, -1].tolist() == [inputs["attention_mask"].sum() - image, image, 0, 0]
