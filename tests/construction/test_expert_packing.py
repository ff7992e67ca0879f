"""Packed experts answer as the trained ones, in at most 2 bits a weight on disk and in memory."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.near import assert_near
from transformers import AutoModelForCausalLM

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.cli import main
from hf_moe.construction.conversion import convert_experts
from hf_moe.construction.in_place import from_host
from hf_moe.construction.packing import pack_experts
from hf_moe.hub.inspection import inspect_checkpoint


IDS = torch.arange(5, 25)[None]
# Wide enough that the scales weigh little: the hosts of tests have matrices of a thousand numbers.
KIND = {"experts": "mote_ternary", "num_experts": 4, "num_experts_per_tok": 2, "layers": [0, 2]}


def make_model(**fields):
    return from_host(small_host("llama"), moe_config={**KIND, **fields}, noise=0.3)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def stored(model):
    """Return the bytes of the routed experts in memory."""
    return sum(item.nbytes for layer in model.moe_layers().values() for item in layer.experts.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_computes_what_it_did(dtype):
    model = make_model().to(dtype)
    expected = logits(model)
    pack_experts(model)
    assert_near(logits(model), expected, 1e-5)
    assert not any(".experts." in name for name, _ in model.named_parameters())


def test_a_packed_checkpoint_opens_packed(tmp_path):
    model = make_model()
    pack_experts(model)
    model.save_pretrained(tmp_path)
    for opened in (
        HfMoeForConditionalGeneration.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert torch.equal(logits(opened), logits(model)) and stored(opened) == stored(model)


@torch.no_grad()
def test_weights_take_two_bits_and_are_counted_whole(tmp_path):
    model, counts, groups = make_model(), [], []
    for name in ("latent", "packed"):
        statistics = RoutingStatistics()
        statistics.update(model(input_ids=IDS, output_routing=True).routing)
        model.save_pretrained(tmp_path / name)
        found = inspect_checkpoint(tmp_path / name)
        counts.append((active_parameters(model, statistics), found["parameters_active"], found["parameters_total"]))
        counts[-1] += (found["layers"][0]["expert_width"],)
        groups.append(found["groups"]["routed experts"])
        if name == "latent":
            pack_experts(model)
    assert counts[0] == counts[1] and counts[0][0] == counts[0][1]
    assert groups[0]["bytes"] == 4 * groups[0]["parameters"] and groups[1]["parameters"] == groups[0]["parameters"]
    assert groups[1]["bytes"] == stored(model) and 8 * stored(model) <= 2 * groups[1]["parameters"]


def test_the_command_keeps_the_rest_and_states_the_bits(tmp_path, capsys):
    model = make_model()
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "notes.txt").write_text("kept")
    assert main(["pack", str(tmp_path / "trained"), "-o", str(tmp_path / "packed")]) == 0
    assert "32.00 bits" in capsys.readouterr().out
    opened = HfMoeForConditionalGeneration.from_pretrained(tmp_path / "packed")
    assert_near(logits(opened), logits(model), 1e-5)
    assert (tmp_path / "packed" / "notes.txt").read_text() == "kept"
    assert inspect_checkpoint(tmp_path / "packed")["problems"] == []
    assert main(["pack", str(tmp_path / "packed"), "-o", str(tmp_path / "twice")]) == 2
    assert "packed yet" in capsys.readouterr().err and not (tmp_path / "twice").exists()


def test_plain_experts_have_no_packed_form():
    with pytest.raises(ValueError, match="No experts of this model can be packed"):
        pack_experts(make_model(experts="ffn"))


@pytest.mark.parametrize("packed", [False, True])
def test_ternary_experts_become_plain_ones(packed):
    model = make_model(experts={"name": "mote_ternary", "activation_bits": None})
    expected = logits(model)
    if packed:
        pack_experts(model)
    convert_experts(model, "ffn")
    assert_near(logits(model), expected, 1e-5)
    with pytest.raises(ValueError, match="Packed experts have no weights"):
        convert_experts(model, "mote_ternary", packed=True)
