"""Pictures and figures of an allocation, from a model with a slot budget."""

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.analysis.allocation import draw_importance, draw_slot_histogram, draw_virtual_share
from hf_moe.analysis.routing_statistics import RoutingStatistics


IMAGE = 39


@pytest.fixture
def routing():
    """Two rows of four patches and eight words; one word less in the second, which is padded."""
    torch.manual_seed(0)
    router = {"name": "anyexperts", "min_slots": 2, "max_slots": 6, "max_virtual_share": 0.5}
    config = HfMoeConfig(
        text_config=LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        image_token_id=IMAGE,
        initializer_range=0.3,
        moe_config={"num_experts": 8, "num_experts_per_tok": 4, "router": router},
    )
    model = HfMoeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for layer in model.moe_layers().values():
            layer.router.virtual_bias.fill_(0.5)
            layer.router.importance_out.mul_(5)
    ids = torch.randint(3, 30, (2, 12))
    ids[:, 1:5] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 16, 16), output_routing=True
        ).routing


@pytest.fixture
def statistics(routing):
    found = RoutingStatistics()
    found.update(routing)
    return found


def test_signals_and_slots_are_summed_over_real_tokens_by_modality(routing, statistics):
    found = statistics
    importance = routing.decisions[1].signals["importance"].view(2, 12)
    image = routing.modality_ids == 1
    text = ~image & routing.token_mask
    means = found.signal_means(1, "importance")
    assert means[0].item() == pytest.approx(importance[text].mean().item(), abs=1e-6)
    assert means[1].item() == pytest.approx(importance[image].mean().item(), abs=1e-6)
    histogram = found.slot_histograms[1]
    assert histogram.sum(-1).tolist() == [15, 8, 0, 0]
    slots = routing.decisions[1].signals["slots"].view(2, 12)[image]
    assert histogram[1].tolist() == torch.bincount(slots.long(), minlength=histogram.shape[1]).tolist()
    figures = found.figures()
    assert figures["image/early/importance"] == pytest.approx(found.signal_means(0, "importance")[1].item())
    assert found.to_dict()["1"]["image"]["signals"]["importance"] == pytest.approx(means[1].item())


def test_histograms_of_different_width_add_up(routing, statistics):
    before = statistics.slot_histograms[0].clone()
    routing.decisions[0].signals["slots"] = routing.decisions[0].signals["slots"] + 3
    statistics.update(routing)
    assert statistics.slot_histograms[0].sum() == 2 * before.sum()
    assert statistics.slot_histograms[0].shape[1] == before.shape[1] + 3


def test_the_pictures_are_written(routing, statistics, tmp_path):
    words = [f"word{index}" for index in range(12)]
    picture = Image.new("RGB", (40, 40), "red")
    drawn = draw_importance(routing, words, picture, tmp_path / "deep" / "importance.png", row=1)
    one = draw_importance(routing, words, picture, tmp_path / "one.png", layers=[1])
    slots = draw_slot_histogram(statistics, tmp_path / "slots.png")
    virtual = draw_virtual_share(statistics, tmp_path / "virtual.png")
    assert Image.open(drawn).size[1] > 1.5 * Image.open(one).size[1]
    assert all(Image.open(path).format == "PNG" for path in (slots, virtual))


def test_a_brighter_patch_is_a_more_important_one(routing, tmp_path):
    signal = routing.decisions[0].signals["importance"]
    words, picture = ["w"] * 12, Image.new("RGB", (40, 40), "black")
    pictures = []
    for patch in (1, 4):
        signal[:] = 0.0
        signal[patch] = 1.0
        pictures.append(Image.open(draw_importance(routing, words, picture, tmp_path / f"{patch}.png", layers=[0])))
    first, last = (torch.frombuffer(bytearray(item.convert("L").tobytes()), dtype=torch.uint8) for item in pictures)
    rows = (last.int() - first.int()).view(pictures[0].height, -1)
    panel = rows[:, : rows.shape[1] // 4]
    top, bottom = panel[: len(panel) // 2].sum(), panel[len(panel) // 2 :].sum()
    assert bottom > 0 > top


def test_what_cannot_be_drawn_is_refused(routing, tmp_path):
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="No layer reports 'dropped'"):
        draw_importance(routing, ["w"] * 12, picture, tmp_path / "x.png", signal="dropped")
    routing.modality_ids[0, 1] = 0
    with pytest.raises(ValueError, match="3 image tokens"):
        draw_importance(routing, ["w"] * 12, picture, tmp_path / "x.png")
    for draw in (draw_slot_histogram, draw_virtual_share):
        with pytest.raises(ValueError, match="slot budget|anyexperts"):
            draw(RoutingStatistics(), tmp_path / "x.png")
