"""Towers and connectors of hosts take experts: step 0, whose row an image is, recomputation, and saving."""

import copy

import pytest
import torch
from helpers.hosts.audio import heard
from helpers.hosts.catalogue import ADOPTED, HOSTS, fast_and_slow, gradients, labels_of
from helpers.hosts.native import AUDIO, NativeHost, decoder
from helpers.near import assert_near
from transformers import AutoModelForImageTextToText

from hf_moe import HfMoeForConditionalGeneration


EXPERTS = {"num_experts": 3}
PACKED = "qwen2_vl qwen2_5_vl qwen3_vl qwen2_5_omni_thinker glm4v ernie4_5_vl_moe pixtral mistral3".split()
PLAIN = (
    "llava vipllava llava_next llava_onevision aya_vision internvl lfm2_vl aria idefics2 idefics3 smolvlm paligemma "
    "gemma3"
).split()
TOWERS = [name for name in (*PACKED, *PLAIN) if not HOSTS[name].is_broken]
CONNECTORS = ["qwen2_vl", "qwen2_5_vl", "llava", "llava_next", "llava_onevision", "pixtral", "idefics2"]
FEW = ("qwen2_5_vl", "llava_next", "smolvlm", "pixtral")


def with_experts(name, *places, losses=None, **fields):
    """Return a tiny host with experts in some places, and none in its decoder where that is dense."""
    moe_config = {"objectives": losses or {}} | ({} if name in ADOPTED else {"layers": []})
    given = {f"{place}_moe_config": {**EXPERTS, **fields} for place in places}
    return HfMoeForConditionalGeneration.from_host(HOSTS[name].build(), moe_config=moe_config, **given).eval()


@torch.no_grad()
def drifted(model):
    generator = torch.Generator().manual_seed(1)
    for block in model.moe_blocks().values():
        for parameter in block.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.15
    return model


def real_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, "vision") for name in TOWERS] + [(name, "connector") for name in CONNECTORS],
)
def test_copies_in_a_part_compute_what_the_host_does(name, place):
    model, inputs = with_experts(name, place), HOSTS[name].inputs()
    assert [site for site in model.moe_blocks() if str(site).startswith(place)]
    expected = real_logits(HOSTS[name].build(), inputs)
    assert_near(real_logits(model, inputs), expected, 2e-6)
    assert (real_logits(drifted(model), inputs) - expected).abs().max() > 1e-3, "the experts are not used"


@pytest.mark.parametrize("name", fast_and_slow(TOWERS, FEW))
@pytest.mark.parametrize("router", ["top_k", "soft_moe"])
def test_an_image_counts_in_its_row(name, router):
    """A row by itself has the logits and the objectives that it has in a batch."""
    objectives = {"load_balance": {"coef": 0.1, "scope": "sequence"}, "router_z": 0.1} if router == "top_k" else {}
    model = drifted(with_experts(name, "vision", losses=objectives, router=router))
    rows = range(len(HOSTS[name].rows))
    whole = HOSTS[name].inputs()
    alone = [HOSTS[name].inputs(row) for row in rows]
    logits = [real_logits(model, inputs) for inputs in alone]
    assert_near(real_logits(model, whole), torch.cat(logits), 1e-5)
    if objectives:
        with torch.no_grad():
            context = model(**whole, output_routing=True).routing
            together = model.objectives(context, torch.ones(len(rows))).rows
            single = [model(**inputs, output_routing=True).routing for inputs in alone]
        assert_near(together, torch.cat([model.objectives(item, torch.ones(1)).rows for item in single]), 1e-5)
        assert together.unique().numel() > 1


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next"])
def test_recomputed_towers_have_the_same_gradients(name):
    objectives = {"load_balance": 0.1, "router_z": {"coef": 0.1, "places": ["vision"]}}
    model, inputs = with_experts(name, "vision", "connector", losses=objectives).train(), HOSTS[name].inputs()
    other, runs = copy.deepcopy(model), []
    other.gradient_checkpointing_enable()
    other.moe_blocks()["vision.0"].register_forward_pre_hook(lambda *_: runs.append(1))
    for item in (model, other):
        item(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
    found, expected = gradients(other), gradients(model)
    assert found.keys() == expected.keys()
    assert_near(list(found.values()), list(expected.values()), 1e-5)
    assert len(runs) == 2 * sum(name in inputs for name in ("pixel_values", "pixel_values_videos"))


def test_experts_learn_in_a_frozen_tower():
    model = with_experts("smolvlm", "vision", losses={"load_balance": 0.1})
    tower = model.model.vision_model
    tower.requires_grad_(False)
    blocks = list(model.moe_blocks().values())
    for block in blocks:
        block.requires_grad_(True)
    inputs = HOSTS["smolvlm"].inputs()
    model.train()
    assert all(block.training for block in blocks) and not tower.encoder.layers[0].layer_norm1.training
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    assert all((parameter.grad is not None) == (id(parameter) in inside) for parameter in tower.parameters())
    assert all(parameter.grad.abs().max() > 0 for block in blocks for parameter in block.gate.parameters())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_experts_of_parts_are_saved_with_their_code(name, tmp_path):
    model = drifted(with_experts(name, "vision", "connector", losses={"router_z": 0.1}))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert list(loaded.moe_blocks()) == list(model.moe_blocks())
    inputs = HOSTS[name].inputs()
    assert torch.equal(real_logits(loaded, inputs), real_logits(model, inputs))


HEARING = NativeHost(
    "GlmAsrForConditionalGeneration",
    {
        "model_type": "glmasr",
        "text_config": decoder("llama"),
        "audio_config": {
            "model_type": "glmasr_encoder",
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_mel_bins": 8,
        },
        "audio_token_id": AUDIO,
    },
    rows=([5, *[AUDIO] * 8, 6, 7], [9, AUDIO, 6, 8]),
    media=(
        lambda: heard(64, 64, seed=0, mask="input_features_mask"),
        lambda: heard(64, 10, seed=1, mask="input_features_mask"),
    ),
)


def test_a_tower_of_sounds_takes_experts():
    host, inputs = HEARING.build(), HEARING.inputs()
    objectives = {"router_z": {"coef": 0.1, "places": ["audio"]}}
    moe_config = {"layers": [], "objectives": objectives}
    model = HfMoeForConditionalGeneration.from_host(host, moe_config=moe_config, audio_moe_config=EXPERTS)
    assert list(model.moe_blocks()) == ["audio.0", "audio.1"]
    assert_near(real_logits(model, inputs), real_logits(host, inputs), 2e-6)
    assert model(**inputs, labels=labels_of(inputs)).aux_loss > 0
    context = model(**inputs, output_routing=True).routing.parts["audio.0"]
    # The second sound, of one placeholder to the other's eight, is the one of its row.
    assert context.row_index.tolist() == [0, 1] and (context.modality_ids == 3).all()


def test_text_alone_counts_no_image():
    model = with_experts("llava", "vision", losses={"load_balance": 0.1}).train()
    ids = torch.arange(3, 19)[None]
    output = model(input_ids=ids, labels=ids, output_routing=True)
    assert output.routing.parts == {} and output.aux_loss == 0


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("mllama", "vision", "global_transformer.layers"),
        ("video_llava", "vision", "model.video_tower and model.image_tower"),
        ("idefics", "vision", r"the placeholders \[\]"),
        ("qwen2_audio", "vision", "has none"),
        ("qwen2_audio", "audio", "layers with a feed-forward under"),
        ("qwen3_vl", "connector", "deepstack_merger_list and"),
        ("smolvlm", "connector", "none of its parts is two linear layers"),
    ],
)
def test_parts_without_a_place_for_experts_are_refused(name, place, message):
    with pytest.raises(ValueError, match=message):
        with_experts(name, place)


def test_objectives_of_a_part_are_those_of_the_decoder():
    with pytest.raises(ValueError, match="vision_moe_config holds objectives"):
        with_experts("llava", "vision", objectives={"router_z": 0.1})
