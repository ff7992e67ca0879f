"""Every host's parts: towers by kind, connectors wherever they lie, and the same names for them in place."""

import pytest
import torch
import transformers
from helpers.hosts.catalogue import ALL, HOSTS, MULTIMODAL, fast_and_slow, in_place
from torch import nn

from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.modeling.parts import PARTS, freeze_towers_in_eval, host_parts, part_of, text_decoder
from hf_moe.training.parts import train_only


VISUAL = "model.visual"
LLAVA = (("model.vision_tower",), ("model.multi_modal_projector",))
IDEFICS = (("model.vision_model",), ("model.connector",))
AUDIO = (("model.audio_tower",), ("model.multi_modal_projector",))
MERGED = ((VISUAL,), (f"{VISUAL}.merger",))
DEEPSTACK = ((VISUAL,), (f"{VISUAL}.deepstack_merger_list", f"{VISUAL}.merger"))
GLM = ((VISUAL,), (f"{VISUAL}.downsample", f"{VISUAL}.merger"))
# Name of the host to its towers and its connectors.
EXPECTED = {
    "qwen2_vl": MERGED,
    "qwen2_5_vl": MERGED,
    "qwen3_5": MERGED,
    "qwen3_5_moe": MERGED,
    "qwen3_vl": DEEPSTACK,
    "qwen3_vl_moe": DEEPSTACK,
    "glm4v": GLM,
    "glm4v_moe": GLM,
    "qwen2_5_omni_thinker": (
        ("model.audio_tower", VISUAL),
        ("model.audio_tower.proj", f"{VISUAL}.merger"),
    ),
    "qwen3_omni_moe_thinker": (
        ("model.audio_tower", VISUAL),
        ("model.audio_tower.proj1", "model.audio_tower.proj2", f"{VISUAL}.merger_list", f"{VISUAL}.merger"),
    ),
    "llava": LLAVA,
    "pixtral": LLAVA,
    "vipllava": LLAVA,
    "video_llava": (("model.video_tower", "model.image_tower"), ("model.multi_modal_projector",)),
    "llava_next": LLAVA,
    "llava_next_video": LLAVA,
    "llava_onevision": LLAVA,
    "gemma3": LLAVA,
    "paligemma": LLAVA,
    "internvl": LLAVA,
    "mistral3": LLAVA,
    "aya_vision": LLAVA,
    "aria": LLAVA,
    "lfm2_vl": LLAVA,
    "llama4": (("vision_model",), ("multi_modal_projector",)),
    "mllama": (("model.vision_model",), ("model.multi_modal_projector",)),
    "gemma4": (("model.vision_tower",), ("model.embed_vision",)),
    "ernie4_5_vl_moe": (("model.vision_tower",), ("model.resampler_model",)),
    "idefics2": IDEFICS,
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    # Its decoder holds the tower, and reads it in layers of cross-attention: there is no connector.
    "idefics": (("model.vision_model",), ()),
    "qwen2_audio": AUDIO,
    "voxtral": AUDIO,
    "audioflamingo3": AUDIO,
    "granite_speech": (("model.encoder",), ("model.projector",)),
}
CONNECTED = [name for name in MULTIMODAL if name != "idefics" and name in ALL]


def empty(name):
    with torch.device("meta"):
        return getattr(transformers, HOSTS[name].class_name)(HOSTS[name].make_config())


@pytest.mark.parametrize("name", MULTIMODAL)
def test_towers_and_connectors_are_found_by_structure(name):
    parts = host_parts(empty(name))
    assert (parts.towers, parts.connectors) == EXPECTED[name]
    assert set(parts.modalities) == {*parts.towers, *parts.connectors} and all(parts.modalities.values())


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_modalities_of_towers_are_those_of_the_rows(name):
    parts = host_parts(empty(name))
    served = {modality for path in parts.towers for modality in parts.modalities[path]}
    ids = set(HOSTS[name].modality_ids().flatten().tolist()) - {0}
    assert {("text", "image", "video", "audio")[number] for number in ids} <= served


@pytest.mark.parametrize("name", fast_and_slow(CONNECTED))
def test_what_enters_the_decoder_left_a_connector(name):
    """The last layer with weights that runs outside of the decoder is a connector's, and has the decoder's width."""
    model = HOSTS[name].build()
    parts, decoder = host_parts(model), text_decoder(model)
    ran: list[tuple[str, int]] = []

    def note(path):
        def hook(module, args, output):
            ran.append((part_of(path, parts), (output if isinstance(output, torch.Tensor) else output[0]).shape[-1]))

        return hook

    for path, module in model.named_modules():
        has_weights = any(True for _ in module.parameters(recurse=False))
        if has_weights and part_of(path, parts) in ("tower", "connector"):
            module.register_forward_hook(note(path))
    entered = []
    decoder.register_forward_pre_hook(lambda *_: entered.append(len(ran)))
    with torch.no_grad():
        model(**HOSTS[name].inputs())
    before = ran[: entered[0]]
    assert before[-1] == ("connector", decoder.config.hidden_size)
    assert "tower" in {part for part, _ in before}


@pytest.mark.parametrize("name", fast_and_slow(name for name in MULTIMODAL if name in ALL))
def test_a_host_in_place_has_the_same_parts_and_moe_layers(name):
    native, model = host_parts(empty(name)), in_place(name)
    parts = host_parts(model)
    assert (parts.decoder, parts.towers, parts.connectors) == (native.decoder, native.towers, native.connectors)
    assert len(parts.moe_layers) == len(model.moe_layers()) > 0
    expected = set(PARTS) if parts.connectors else set(PARTS) - {"connector"}
    assert {part_of(key, parts) for key, _ in model.named_parameters()} == expected


def modes(model, paths) -> set[bool]:
    return {model.get_submodule(path).training for path in paths}


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "gemma3"])
def test_frozen_towers_stay_in_eval_mode_and_connectors_train(name):
    model = in_place(name)
    parts = host_parts(model)
    train_only(model, ["connector", "experts"])
    model.train()
    assert modes(model, parts.towers) == {False} and modes(model, parts.connectors) == {True} and model.training


def test_only_towers_that_train_leave_eval_mode():
    model = in_place("qwen2_5_omni_thinker")
    train_only(model, ["tower/audio"])
    model.train()
    assert modes(model, ["model.audio_tower"]) == {True} and modes(model, [VISUAL]) == {False}
    assert modes(model, [f"{VISUAL}.merger"]) == {True}
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "idefics"])
def test_towers_and_connectors_are_no_active_parameters(name):
    model = in_place(name)
    statistics = RoutingStatistics()
    with torch.no_grad():
        statistics.update(model(**HOSTS[name].inputs(), output_routing=True).routing)
    active = active_parameters(model, statistics)
    parts = host_parts(model)
    for path in (*parts.towers, *parts.connectors):
        model.get_submodule(path).more = nn.Linear(8, 8)
    assert active_parameters(model, statistics) == active
    text_decoder(model).more = nn.Linear(8, 8)
    assert active_parameters(model, statistics) == {modality: count + 72 for modality, count in active.items()}


def test_a_native_model_keeps_its_towers_in_eval_mode_on_request():
    model = HOSTS["llava"].build().train()
    model.model.vision_tower.requires_grad_(False)
    model.model.vision_tower.vision_dropout = nn.Dropout(0.5)
    freeze_towers_in_eval(model)
    assert not model.model.vision_tower.vision_dropout.training and model.model.multi_modal_projector.training
