"""Drop-Upcycling: what its experts keep of the dense feed-forward, what is drawn anew, and that they differ."""

import pytest
import torch
from helpers.hosts.small import small_host
from torch.nn import functional as F

from hf_moe.analysis.experts import mean_similarity, output_similarity
from hf_moe.construction.expert_sources import build_source
from hf_moe.construction.in_place import from_host


def dense_state(width=48, hidden=32):
    generator = torch.Generator().manual_seed(0)
    gate_up = 0.02 + 0.1 * torch.randn(2 * width, hidden, generator=generator)
    return {"gate_up_proj": gate_up, "down_proj": 0.3 * torch.randn(hidden, width, generator=generator) - 0.1}


def kept(expert, dense):
    """Return which neurons of an expert are neurons of the dense feed-forward, (m,) bool, and those they are."""
    rows, own = (torch.cat([*s["gate_up_proj"].chunk(2), s["down_proj"].T], dim=1) for s in (dense, expert))
    same = (own[:, None] == rows[None]).all(-1)  # (m, f)
    assert same.sum(1).max() <= 1
    return same.any(1), set(same.nonzero()[:, 1].tolist())


def test_without_new_neurons_it_is_the_dense_model():
    checks = []
    source = {"name": "drop_upcycling", "reinit_ratio": 0.0}
    model = from_host(small_host("llama"), system="drop_upcycling", source=source, on_check=checks.append)
    assert checks[0].exact and checks[0].logit_difference < 1e-5
    first, second = model.moe_layers()[0].experts.down_proj[:2]
    assert not torch.equal(first, second), "neurons are permuted"


def test_half_of_the_neurons_of_every_expert_are_new():
    dense, source = dense_state(), build_source("drop_upcycling", seed=1)
    found = [kept(source.expert([dense], number, 48), dense) for number in range(4)]
    assert all(mask.sum() == 24 for mask, _ in found)
    assert len({frozenset(neurons) for _, neurons in found}) == 4
    narrow, neurons = kept(source.expert([dense], 0, 20), {**dense, "down_proj": dense["down_proj"] * (48 / 20)})
    assert narrow.sum() == 10 and len(neurons) == 10


def test_new_entries_have_the_statistics_of_the_old_ones():
    dense = dense_state(width=600)
    expert = build_source({"name": "drop_upcycling", "reinit_ratio": 1.0}).expert([dense], 0, 600)
    assert not kept(expert, dense)[0].any()
    for name in dense:
        for old, new in zip(dense[name].chunk(2), expert[name].chunk(2), strict=True):
            assert new.mean().item() == pytest.approx(old.mean().item(), abs=0.05 * old.std().item())
            assert new.std().item() == pytest.approx(old.std().item(), rel=0.05)


def test_experts_stay_further_apart_after_training():
    similarity = {}
    for ratio in (0.0, 0.5):
        source = {"name": "drop_upcycling", "reinit_ratio": ratio}
        fields = {"num_experts": 4, "layers": [0]}
        layer = from_host(small_host("llama"), system="drop_upcycling", source=source, moe_config=fields)
        layer = layer.moe_layers()[0].train()
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(32, 32, generator=generator) / 6
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        for _ in range(300):
            hidden = torch.randn(1, 64, 32, generator=generator)
            F.mse_loss(layer(hidden), torch.tanh(hidden @ target)).backward()
            optimizer.step()
            optimizer.zero_grad()
        similarity[ratio] = mean_similarity(output_similarity(layer, hidden[0]))
    assert similarity[0.5] < similarity[0.0] - 0.2
