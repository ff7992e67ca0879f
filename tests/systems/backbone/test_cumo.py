"""CuMo: tower, connector and decoder upcycled at once from a trained dense model."""

from types import SimpleNamespace

import pytest
import torch
from helpers.image_rows import collate, labels_of, row
from helpers.near import assert_near
from helpers.router_cases import make_context, make_spec
from transformers import CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.objectives.load_balance import LoadBalance
from hf_moe.training.constructions import construct_stage


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {**SIZES, "hidden_size": 24, "image_size": 16, "patch_size": 8}
BALANCE = {"coef": 0.1, "scope": "sequence", "shares": "first_choices"}
SITES = [0, 1, "vision.0", "vision.1", "connector.0"]


@pytest.fixture
def dense():
    """A dense model, as after the second stage."""
    torch.manual_seed(0)
    config = HfMoeConfig(
        text_config=LlamaConfig(**SIZES, vocab_size=96),
        vision_config=CLIPVisionConfig(**TOWER),
        moe_config={"layers": []},
        image_token_id=95,
        initializer_range=0.15,
    )
    return HfMoeForConditionalGeneration(config).eval()


@pytest.fixture
def batch():
    rows = collate([row(1, 6, 0), row(0, 9, 1), row(3, 4, 2)])
    return {**rows, "labels": labels_of(rows)}


def upcycled(dense, **options):
    stage = SimpleNamespace(construct={"upcycle": {"system": "cumo", **options}}, objectives=None)
    return construct_stage(dense, stage, None, seed=0)


def test_upcycled_parts_compute_what_the_dense_model_does(dense, batch):
    model = upcycled(dense)
    assert sorted(model.moe_blocks(), key=str) == sorted(SITES, key=str) and model.config.system == "cumo"
    with torch.no_grad():
        found, expected = model(**batch), dense(**batch)
    real = batch["attention_mask"].bool()
    assert_near(found.logits[real], expected.logits[real], 2e-6)
    vision = upcycled(dense, moe_config={"layers": []})
    assert sorted(vision.moe_blocks()) == ["connector.0", "vision.0", "vision.1"]


def test_every_part_reports_its_losses(dense, batch):
    model = upcycled(dense)
    output = model(**batch, output_routing=True)
    parts = output.routing.contexts()
    assert sorted((site for part in parts for site in part.decisions), key=str) == sorted(SITES, key=str)
    for name, entry in {"load_balance": BALANCE, "router_z": {"coef": 0.01}}.items():
        single = []
        for place in ("decoder", "vision", "connector"):
            own = upcycled(dense, moe_config={"objectives": {name: {**entry, "places": [place]}}})
            own.load_state_dict(model.state_dict(), strict=False)
            single.append(own(**batch).objective_values[name])
        assert_near(sum(single), output.objective_values[name], 1e-5)
        assert all(value > 0.1 for value in single)
    silent = upcycled(dense, moe_config={"objectives": {"load_balance": 0.0, "router_z": 0.0}})
    with torch.no_grad():
        assert_near(silent(**batch).loss, dense(**batch).loss, 1e-6)


@pytest.mark.parametrize(("logits", "value"), [(0.0, 1.0), (50.0, 8.0)])
def test_balance_counts_first_choices(logits, value):
    """1 for a uniform router, E for tokens that all go to one expert first, for any number of slots."""
    spec, context = make_spec(causal=False), make_context()
    objective = LoadBalance([spec], 0.1, scope="sequence", shares="first_choices")
    tokens = context.token_mask.numel()
    scores = torch.zeros(tokens, 8)
    scores[:, 3] = logits
    index = torch.tensor([[3, 5]]).expand(tokens, 2)
    decision = ExpertAssignment(index, torch.full((tokens, 2), 0.5), 8, scores, scores.softmax(-1))
    assert_near(objective({1: decision}, context), torch.full((3,), value), 1e-5)


def train(model, batches, rate=3e-3):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return sum(model.eval()(**batch).loss.item() for batch in batches[-8:]) / 8


def captions(steps, seed=0):
    """Pictures of one colour, and its name after them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        colour = torch.randint(0, 8, (8,), generator=generator)
        pixels = torch.zeros(8, 3, 16, 16)
        for channel in range(3):
            pixels[:, channel] = ((colour >> channel) & 1).float()[:, None, None] * 2 - 1
        pixels += 0.3 * torch.randn(pixels.shape, generator=generator)
        ids = torch.cat([torch.full((8, 4), 95), colour[:, None] + 10], 1)
        labels = ids.masked_fill(ids == 95, -100)
        yield {"input_ids": ids, "pixel_values": pixels, "labels": labels}


def test_upcycled_experts_learn_faster_than_fresh_ones(dense):
    train(dense, list(captions(60)))
    model = upcycled(dense.eval())
    torch.manual_seed(1)
    fresh = HfMoeForConditionalGeneration(HfMoeConfig.from_dict(model.config.to_dict()))
    later = list(captions(30, seed=1))
    assert train(model, later) < 0.9 * train(fresh, later)
