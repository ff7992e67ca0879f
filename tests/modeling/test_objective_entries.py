"""What every entry of `moe_config.objectives` may say, and the objective that takes a router's own signal."""

from types import SimpleNamespace

import pytest
import torch
from test_objectives import assign, make_context, make_spec

from hf_moe.modeling.auxiliary import AuxiliaryLosses


LOGITS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])


def values(objectives: dict, mask=None, **signals: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the objectives of a layer are worth in two rows, by label."""
    losses = AuxiliaryLosses(SimpleNamespace(moe_config=SimpleNamespace(objectives=objectives)), [make_spec()])
    context = make_context(2, 4, modality=IMAGE.tolist(), mask=mask)
    context.decisions[0] = assign(LOGITS.argmax(-1), LOGITS, signals=signals)
    return losses(context, torch.tensor([4, 4])).values


def test_two_entries_of_a_kind_count_tokens_of_their_modalities():
    both = {"name": "router_z", "coef": 0.1}
    found = values({"all": both, "seen": {**both, "modalities": ["image", "video"]}})
    squares = LOGITS.logsumexp(-1).square().view(2, 4)
    torch.testing.assert_close(found["all"], squares.mean(1))
    torch.testing.assert_close(found["seen"], torch.stack([squares[0, 1:3].mean(), torch.tensor(0.0)]))


def test_modalities_do_not_make_padding_count():
    mask = [[True, True, False, True], [True] * 4]
    found = values({"seen": {"name": "router_z", "coef": 0.1, "modalities": ["image"]}}, mask)
    torch.testing.assert_close(found["seen"][0], LOGITS[1].logsumexp(-1).square())


def test_an_unknown_modality_is_refused():
    with pytest.raises(ValueError, match=r"objectives\['seen'\]: modalities"):
        values({"seen": {"name": "router_z", "coef": 0.1, "modalities": ["smell"]}})


def test_a_signal_is_its_mean_over_the_tokens_of_a_row():
    price = torch.arange(8.0)
    found = values({"price": {"name": "signal", "coef": 1.0, "signal": "price"}}, price=price)["price"]
    torch.testing.assert_close(found, torch.tensor([1.5, 5.5]))


def test_a_signal_that_no_router_reports_is_refused():
    with pytest.raises(ValueError, match=r"No router reports the signal 'price', only \['cost'\]"):
        values({"price": {"name": "signal", "coef": 1.0, "signal": "price"}}, cost=torch.ones(8))
