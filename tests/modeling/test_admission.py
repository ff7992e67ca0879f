"""Admission by priority, against a loop."""

import pytest
import torch

from hf_moe.modeling.admission import capped, group_sizes, take_best


def admitted(scores: torch.Tensor, group: torch.Tensor, capacity: torch.Tensor) -> list[bool]:
    result = [False] * len(scores)
    for number in group.unique():
        members = [token for token in range(len(scores)) if group[token] == number]
        members.sort(key=lambda token: (-scores[token].item(), token))
        for token in members[: int(capacity[members[0]])]:
            result[token] = True
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_the_best_of_every_group_get_in(scale, dtype):
    torch.manual_seed(0)
    scores = (torch.randn(60, 3) * scale).to(dtype)
    scores[::7] = float("-inf")
    scores[::5] = scores[4]  # equal ones get in by their order
    group = torch.randint(-2, 4, (60,)) * 2**28
    capacity = torch.tensor([0, 3, 100, 1, 4, 2])[group // 2**28 + 2]
    found = take_best(scores, group, capacity)
    for column in range(3):
        assert found[:, column].tolist() == admitted(scores[:, column], group, capacity)
    assert torch.equal(take_best(scores[:, 0], group, capacity), found[:, 0])


def test_a_token_knows_the_size_of_its_group():
    assert group_sizes(torch.tensor([5, -1, 5, 0, 5, -1])).tolist() == [3, 2, 3, 1, 3, 2]


def test_a_cap_moves_the_choice_to_tokens_with_fewer_places():
    torch.manual_seed(0)
    scores, group = torch.randn(512, 64).softmax(-1), torch.arange(512) // 256
    capacity = torch.full((512,), 8.0)
    free = take_best(scores, group, capacity)
    found = take_best(capped(scores, group, capacity, most=2), group, capacity)
    assert torch.equal(found.view(2, 256, 64).sum(1), free.view(2, 256, 64).sum(1))
    over = [(chosen.sum(-1) > 2).float().mean() for chosen in (free, found)]
    assert over[0] > 0.25 and over[1] < 0.12
    assert (scores * found).sum() > 0.96 * (scores * free).sum()
