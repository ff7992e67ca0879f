"""All tiny hosts by name, the selections of them that tests run over, and how they are made a MoE in place."""

import pytest
import torch

from helpers.hosts import audio, llava, qwen, text, vision
from helpers.hosts.native import IMAGE
from hf_moe import HfMoeForConditionalGeneration


MULTIMODAL = {**qwen.HOSTS, **llava.HOSTS, **vision.HOSTS, **audio.HOSTS}
HOSTS = {**MULTIMODAL, **text.HOSTS}
ALL = [name for name, host in HOSTS.items() if not host.is_broken]
DENSE = [name for name in ALL if not HOSTS[name].adopted]
ADOPTED = [name for name in ALL if HOSTS[name].adopted]
# One of every way in which a host differs from others: what CI runs where all of them would take too long.
FEW = ("qwen2_5_vl", "qwen2_5_omni_thinker", "gemma3", "smolvlm", "llava_onevision", "qwen2_audio", "qwen3_vl_moe")
MODALITY_GATES = {"name": "ming_multi_router", "modalities": ["text", "image", "video", "audio"]}


def fast_and_slow(names, fast=FEW):
    """Parameters of a test over hosts of which CI runs a few."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def in_place(name, moe_config=None, **options) -> HfMoeForConditionalGeneration:
    """Return a tiny host as a MoE, adopted or with experts that are copies of its feed-forward."""
    counted = HOSTS[name].adopted or "system" in options
    own = {} if counted else {"num_experts": 3, "num_experts_per_tok": 2}
    options = {"moe_config": {**own, **(moe_config or {})}, **options}
    return HfMoeForConditionalGeneration.from_host(HOSTS[name].build(), **options).eval()


@torch.no_grad()
def drift_apart(model, seed=1):
    """Move experts and gates away from each other, as training does: what a token uses shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.moe_layers().values():
        for parameter in [*layer.gate.parameters(), *layer.experts.parameters()]:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.15
    return model


def labels_of(inputs) -> torch.Tensor:
    """Learn every word, no placeholder, and not the first token of a row, which padding would have to foretell."""
    mask = inputs["attention_mask"]
    words = (mask.cumsum(-1) * mask > 1) & (inputs["input_ids"] < IMAGE)
    return inputs["input_ids"].masked_fill(~words, -100)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def routing_of(model, inputs):
    """Return the logits and the routing of a call."""
    with torch.no_grad():
        outputs = model(**inputs, output_routing=True)
    return outputs.logits, outputs.routing
