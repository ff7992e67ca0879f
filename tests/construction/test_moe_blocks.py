"""MoE blocks of Transformers, read by what they hold: the MoE layer computes the same."""

import pytest
import torch
from helpers.hosts.blocks import BLOCKS, HIDDEN, REFUSED, make_block, make_layer

from hf_moe.construction.block_checks import check_block
from hf_moe.construction.gate_forms import starting_options
from hf_moe.construction.moe_blocks import read_block
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing_context import ACTIVE_CONTEXT, RoutingContext


def outputs(block, layer):
    """Return both outputs (2, 12, d) on rows in which every third token is of an image."""
    hidden = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(1))
    kinds = (torch.arange(24).view(2, 12) % 3 == 0).long()
    token = ACTIVE_CONTEXT.set(RoutingContext(kinds, torch.ones_like(kinds, dtype=torch.bool)))
    try:
        with torch.no_grad():
            ours = layer(hidden)
            theirs = block(hidden, kinds) if layer.spec.banks else block(hidden)
    finally:
        ACTIVE_CONTEXT.reset(token)
    return [(item[0] if isinstance(item, tuple) else item).view(2, 12, -1) for item in (theirs, ours)]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_layer_of_a_block_computes_what_it_does(name):
    block, config = make_block(name)
    reading = read_block(block, config)
    layer = make_layer(block, reading, config)
    theirs, ours = outputs(block, layer)
    assert theirs.abs().max() > 0.05
    assert (theirs - ours).abs().max() <= 1e-6 * theirs.abs().max().clamp(min=1)
    check_block(layer, block, reading.branches)


@pytest.mark.parametrize("name", BLOCKS)
def test_anyexperts_starts_as_the_gate_of_every_host_but_llama_4(name):
    block, config = make_block(name)
    layer = make_layer(block, read_block(block, config), config)
    if name == "llama4":
        with pytest.raises(ValueError, match="'anyexperts' cannot start as this Llama4Router"):
            starting_options("anyexperts", layer.router, layer.spec)
        return
    options = {**starting_options("anyexperts", layer.router, layer.spec), "max_virtual_share": 0.5}
    router = build("router", get_mechanism("router", "anyexperts"), options, layer.spec).eval()
    torch.manual_seed(0)
    router.initialize(0.02)
    router.start_from(layer.router)
    layer.gate = router
    theirs, ours = outputs(block, layer)
    assert (theirs - ours).abs().max() <= 2e-6 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_without_memory_reads_the_same(name):
    block, config = make_block(name)
    reading = read_block(block, config)
    assert read_block(block.to("meta"), config) == reading


@pytest.mark.parametrize("name", BLOCKS)
def test_experts_are_taken_over_without_a_copy(name):
    block, config = make_block(name)
    tensors = block.state_dict()
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    state = read_block(block, config).state(tensors)
    copied = {key for key, tensor in state.items() if tensor.untyped_storage().data_ptr() not in storages}
    joined = {"gate.weight", "gate.e_score_correction_bias"} if name.startswith("ernie4_5_vl") else set()
    assert copied == joined


def test_only_the_layer_of_llama_4_unpacks_its_block():
    found = {name for name in BLOCKS if read_block(*make_block(name)).returns_tuple}
    assert found == {"llama4"}
    block, config = make_block("llama4")
    layer = make_layer(block, read_block(block, config), config)
    output, logits = layer(torch.zeros(2, 3, HIDDEN))
    assert output.shape == (2, 3, HIDDEN) and logits is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt_oss", "GptOssMLP cannot become a MoE layer: its experts are not stacked as"),
        ("muse_spark", r"MuseSparkMoE cannot be adopted: it holds .*post_expert_proj.weight.* besides"),
        ("inkling2", "Inkling2SparseMoeBlock cannot be adopted: its experts join .* by Inkling2SoftcappedSwiGLU"),
        ("inkling", r"InklingMoE cannot be adopted: .*'gammas'"),
    ],
)
def test_a_block_that_has_no_place_here_is_refused_by_name(name, reason):
    with pytest.raises(ValueError, match=reason):
        read_block(*make_block(name))
    assert name in REFUSED


def test_a_dense_feed_forward_is_no_block():
    block, config = make_block("glm4v_moe")
    assert read_block(block.shared_experts, config) is None
