"""The parameters that `inspect` and a card count on a host are those of the model and of its routing."""

import re

import pytest
import torch
from helpers.hosts.catalogue import ALL, HOSTS, fast_and_slow
from helpers.hub.hosted import hosted_model

from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.hub.card import write_card
from hf_moe.hub.contents import encoder_parameters
from hf_moe.hub.host_facts import modalities, placeholders
from hf_moe.hub.inspection import inspect_checkpoint
from hf_moe.modeling.parts import host_parts


# Towers within decoders, one tower for pictures and videos, and buffers that are saved.
FAST = [
    "qwen2_5_vl",
    "qwen2_5_omni_thinker",
    "idefics",
    "internvl",
    "gemma4",
    "qwen2_audio",
    "ernie4_5_vl_moe",
    "llama",
]


@pytest.mark.parametrize("name", fast_and_slow(ALL, FAST))
def test_inspect_and_card_count_what_the_model_holds(tmp_path, name):
    model = hosted_model(name)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    parts, groups = host_parts(model), found["groups"]
    assert found["host"] == HOSTS[name].class_name and found["problems"] == []
    assert found["parts"] == {
        "decoder": parts.decoder,
        "towers": list(parts.towers),
        "connectors": list(parts.connectors),
    }
    assert found["parameters_total"] == sum(parameter.numel() for parameter in model.parameters())
    held = sum(p.numel() for layer in model.moe_layers().values() for p in layer.experts.parameters())
    assert groups["routed experts"]["parameters"] == held
    taken = modalities(model.config)
    assert ("vision tower" in groups) == ("image" in taken) and ("audio tower" in groups) == ("audio" in taken)
    assert [kind for kind, count in found["parameters_encoding"].items() if count] == list(taken[1:])
    at_most = re.search(
        r"^\| decoder, at most \| (.*) \|$", write_card(tmp_path, model=model, report={}).read_text(), re.M
    )
    assert at_most[1].split(" | ") == [f"{count:,}" for count in found["parameters_active"].values()]
    assert list(found["parameters_active"]) == list(taken)


@pytest.mark.parametrize("name", fast_and_slow(ALL, FAST))
def test_active_parameters_are_those_of_the_routing(tmp_path, name):
    model = hosted_model(name)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)["parameters_active"]
    statistics = RoutingStatistics()
    with torch.no_grad():
        statistics.update(model(**HOSTS[name].inputs(), output_routing=True).routing)
    measured = active_parameters(model, statistics)
    # Idefics reads pictures by cross-attention, without tokens of their own.
    assert len(measured) > 1 or not placeholders(model.config)
    assert measured == {kind: count for kind, count in found.items() if kind in measured}


def test_towers_count_for_what_they_encode(tmp_path):
    model = hosted_model("qwen2_5_omni_thinker")
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)["parameters_encoding"]
    eyes = sum(parameter.numel() for parameter in model.model.visual.parameters())
    ears = sum(parameter.numel() for parameter in model.model.audio_tower.parameters())
    assert found == {"text": 0, "image": eyes, "video": eyes, "audio": ears}


def test_frames_of_a_video_go_through_the_tower_of_pictures():
    # InternVL has no code for videos: its processor gives their frames as pictures.
    model = hosted_model("internvl")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = encoder_parameters(shapes, host_parts(model), model.config)
    assert found["video"] == found["image"] > 0 == found["text"]
