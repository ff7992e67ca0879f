"""The active parameters of every mechanism are what a FLOP counter finds."""

import math

import pytest
import torch
from helpers.mechanisms import CASES, build, make_rows
from torch.utils.flop_counter import FlopCounterMode

from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.configuration.configuration_hf_moe import MODALITIES
from hf_moe.hub.active_parameters import most_active_parameters


KINDS = ("router", "experts", "block", "attention", "layer")
# What differs by more than products that read no parameter, or parameters that are read without a product.
TOLERANCE = 0.025
MODEL = [(kind, key) for kind in KINDS for key, case in CASES[kind].items() if not case.place]


def onednn_flops(left, right, *others, out_shape=None, **options) -> int:
    return 2 * math.prod(left) * right[0]


def flops_per_token(model, rows) -> tuple[float, RoutingStatistics]:
    """Return half of the FLOPs of a token, without those of attention scores."""
    statistics = RoutingStatistics()
    products = {torch.ops.mkldnn._linear_pointwise: onednn_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=products) as counter:
        statistics.update(model(**rows, output_routing=True).routing)
    counts = counter.get_flop_counts()["Global"]
    flops = sum(count for operator, count in counts.items() if "scaled_dot_product" not in str(operator))
    return flops / 2 / rows["input_ids"].numel(), statistics


@pytest.mark.parametrize("kind, key", MODEL, ids=[f"{kind} {key}" for kind, key in MODEL])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_active_parameters_are_half_the_flops(kind, key, modality):
    model = build(kind, key)
    # The rows of a layer that skips tokens are filled up to the longest.
    count = 1 if kind == "layer" else 3
    rows = {name: value for name, value in make_rows(model, count).items() if name != "labels"}
    rows["mm_token_type_ids"] = torch.full_like(rows["input_ids"], MODALITIES.index(modality))
    found, statistics = flops_per_token(model, rows)
    active = active_parameters(model, statistics)
    assert list(active) == [modality]
    # The table of embeddings and vectors, such as those of norms, make no product of matrices.
    decoder = model.model.language_model
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2) + decoder.embed_tokens.weight.numel()
    expected = pytest.approx(active[modality] - vectors, rel=TOLERANCE)
    # Merging costs besides, once for a group of tokens; so do matrices that a forward makes of their factors.
    made = statistics.mixtures or key.startswith("mpoe")
    assert found == expected or (made and found > active[modality] - vectors)
    if modality == "text":
        assert active["text"] <= most_active_parameters(model)["text"] * (1 + TOLERANCE)


def test_what_stands_for_other_modalities_is_no_work():
    model = build("layer", "mot_transformers")
    copies = [name for name, _ in model.named_parameters() if ".image." in name]
    assert copies
    held = sum(p.numel() for name, p in model.named_parameters() if ".image." in name)
    total = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for layer in model.moe_layers().values() for p in layer.experts.parameters()) // 2
    assert most_active_parameters(model)["text"] == total - held - idle


def test_a_chain_passes_its_shared_experts_in_every_round():
    model = build("block", "chain_of_experts")
    shared = sum(p.numel() for layer in model.moe_layers().values() for p in layer.shared_expert.parameters())
    rounds = next(iter(model.moe_layers().values())).num_iterations
    once = most_active_parameters(model)["text"]
    for layer in model.moe_layers().values():
        layer.shared_runs = 1
    assert once - most_active_parameters(model)["text"] == (rounds - 1) * shared > 0
