"""Multi-head mixture of experts: sub-tokens are routed by themselves."""

import pytest
import torch
from helpers.layers import fitted, make_layer, run


BARE = {"name": "mh_moe", "num_heads": 1, "head_layer": False, "merge_layer": False, "parity": False}


def test_one_head_without_maps_is_the_plain_layer():
    plain, one = make_layer(num_shared_experts=1), make_layer(block=BARE, num_shared_experts=1)
    one.load_state_dict(plain.state_dict())
    hidden = torch.randn(2, 5, 16)
    assert torch.equal(one(hidden), plain(hidden))


@pytest.mark.parametrize(
    ("hidden", "width", "experts", "slots"), [(128, 512, 8, 2), (96, 256, 16, 4), (64, 384, 16, 1)]
)
@pytest.mark.parametrize("heads", [2, 4])
def test_parity_keeps_total_and_active_parameters(hidden, width, experts, slots, heads):
    with torch.device("meta"):
        plain = make_layer(hidden, width, experts, slots)
        cut = make_layer(hidden, width, experts, slots, block={"name": "mh_moe", "num_heads": heads})

    def parameters(layer):
        stacks = sum(stack.numel() for stack in layer.experts.parameters())
        maps = sum(part.weight.numel() for part in layer.children() if isinstance(part, torch.nn.Linear))
        rows = heads if maps else 1
        return maps + stacks, maps + stacks * rows * slots / layer.router.spec.num_experts

    for ours, theirs in zip(parameters(cut), parameters(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


@torch.no_grad()
def test_a_sub_token_is_routed_by_its_own_slice():
    layer = make_layer(16, experts=32, slots=1, block="multi_head_moe")
    hidden = torch.randn(1, 8, 16)
    changed = layer.head(hidden)
    changed[..., 4:8] = -changed[..., 4:8]  # the second of four sub-tokens
    other = torch.linalg.solve(layer.head.weight, changed.mT).mT
    before, after = (run(layer, item)[1].parts["split_4"].decisions[1].router_logits for item in (hidden, other))
    moved = ((before - after).abs().amax(-1) > 1e-3).view(8, 4)
    assert moved[:, 1].all() and not moved[:, [0, 2, 3]].any()


def test_a_token_reaches_more_experts_than_it_has_slots():
    layer, plain = make_layer(16, experts=32, slots=1, block="multi_head_moe"), make_layer(16, experts=32, slots=1)
    hidden = torch.randn(1, 8, 16)
    cut, whole = (run(item, hidden)[1] for item in (layer, plain))
    index = cut.parts["split_4"].decisions[1].expert_index.view(8, 4)
    assert max(len(set(row)) for row in index.tolist()) > 1
    assert len(index.unique()) > len(whole.decisions[1].expert_index.unique())


def test_sub_tokens_of_a_token_part_in_training():
    layer = make_layer(16, slots=1, block={"name": "mh_moe", "parity": False})
    maps = torch.randn(16, 16)

    def batch():
        inputs = torch.randn(64, 16)
        return inputs, torch.tanh(inputs @ maps)

    fitted(layer, batch, 200)
    index = run(layer, batch()[0][None])[1].parts["split_2"].decisions[1].expert_index.view(64, 2)
    assert (index[:, 0] != index[:, 1]).float().mean() > 0.3


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads=3 must divide hidden_size=16 of layer 1"):
        make_layer(block={"name": "mh_moe", "num_heads": 3})
