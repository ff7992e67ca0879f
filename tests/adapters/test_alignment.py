"""Embedding rows of new tokens found by geometry alone."""

import pytest
import torch
from helpers.near import assert_near

from hf_moe.construction.alignment import gromov_wasserstein_init, gromov_wasserstein_plan


def test_a_hidden_permutation_of_a_turned_point_cloud_is_found():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(40, 6, generator=generator) * torch.linspace(2.0, 0.5, 6) + torch.eye(6)[0]
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    order = torch.randperm(40, generator=generator)
    text = (points @ turn)[order]
    plan = gromov_wasserstein_plan(points, text)
    assert_near(plan.sum(1), torch.full((40,), 1 / 40).double(), 1e-4)
    assert (order[plan.argmax(1)] == torch.arange(40)).float().mean() > 0.95
    rows = gromov_wasserstein_init(points, text)
    matched = torch.nn.functional.cosine_similarity(rows, points @ turn)
    drawn = torch.nn.functional.cosine_similarity(0.02 * torch.randn(40, 6, generator=generator), points @ turn)
    assert matched.mean() > 0.95 > drawn.mean()


def test_only_so_many_text_embeddings_are_read():
    rows = gromov_wasserstein_init(torch.randn(5, 3), torch.randn(50, 4).to(torch.bfloat16), max_samples=20)
    assert rows.shape == (5, 4) and rows.dtype == torch.bfloat16 and rows.isfinite().all()
    with pytest.raises(ValueError, match="greater than 0"):
        gromov_wasserstein_plan(torch.randn(5, 3), torch.randn(6, 3), epsilon=0.0)
