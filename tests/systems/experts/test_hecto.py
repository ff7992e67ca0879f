"""Hecto: a recurrent expert beside feed-forwards, chosen by the sequence."""

import pytest
import torch
from helpers.layers import make_layer, run
from helpers.mechanisms import TEXT
from helpers.near import assert_near
from helpers.router_cases import text_context
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig

from hf_moe import HfMoeForConditionalGeneration, from_system
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.routing_context import ACTIVE_CONTEXT


PAIR = {"experts": 2, "slots": 1}
ROUTER = {"name": "sequence", "temperature": 1.5}


@pytest.fixture
def experts():
    return make_layer(16, 24, 3, 1, kind={"name": "hecto", "recurrent_size": 12, "num_recurrent": 2}).experts


def recurrent_output(experts, hidden, used):
    """Return the output for tokens (B, S, d) of which those in `used` have the last expert, and others none."""
    index = torch.where(used, 2, 3).reshape(-1, 1)
    token = ACTIVE_CONTEXT.set(text_context(*used.shape))
    try:
        return experts(hidden.flatten(0, 1), ExpertAssignment(index, (index < 3).float(), 3)).view(hidden.shape)
    finally:
        ACTIVE_CONTEXT.reset(token)


@torch.no_grad()
def make_model() -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    model = HfMoeForConditionalGeneration(from_system("hecto", text_config=LlamaConfig(**TEXT))).eval()
    for layer in model.moe_layers().values():
        layer.gate.weight.normal_()
        for parameter in layer.experts.parameters():
            parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def test_a_recurrent_expert_reads_its_own_tokens_in_order(experts):
    hidden, used = torch.randn(3, 9, 16), torch.rand(3, 9) < 0.5
    used[1], (_, expert) = True, experts.recurrent
    found = recurrent_output(experts, hidden, used)
    for row in range(3):
        states, _ = expert.cell(expert.in_proj(hidden[row, used[row]]))
        assert_near(found[row, used[row]], expert.write(states), 1e-6)
        assert not found[row, ~used[row]].any()


def test_cost_follows_the_tokens_that_have_the_recurrent_expert(experts):
    sizes, (_, expert) = [], experts.recurrent
    expert.cell.register_forward_hook(lambda _, args, output: sizes.append(args[0].shape[:2]))
    used = torch.zeros(5, 6, dtype=torch.bool)
    used[1, 2:], used[3, :2] = True, True
    recurrent_output(experts, torch.randn(5, 6, 16), used)
    output = recurrent_output(experts, torch.randn(5, 6, 16), ~used & False)
    assert sizes == [(2, 4), (1, 1)], "nothing at all is no input of a GRU"
    output.sum().backward()
    assert not output.any() and all(not p.grad.any() for p in expert.parameters()), "and all have a gradient"


def test_by_default_it_is_about_as_large_as_a_feed_forward():
    feed_forward, recurrent = make_layer(64, 96, **PAIR, kind="hecto").experts.parameters_per_run()
    assert 0.9 * feed_forward < recurrent < 1.05 * feed_forward


@torch.no_grad()
def test_packed_documents_are_read_one_by_one():
    model = make_model()
    one, two = torch.tensor([[5, 9, 11]]), torch.tensor([[8, 7, 33, 21]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    found = model(input_ids=torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    assert_near(found, torch.cat([model(input_ids=ids).logits for ids in (one, two)], 1), 1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@torch.no_grad()
def test_generation_carries_the_state(options):
    model = make_model()
    ids = torch.tensor([[0, 0, 5, 9, 11], [8, 7, 5, 33, 21], [4, 4, 60, 2, 1]])
    rows = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 12, "do_sample": False}
    routing = model(input_ids=ids, output_routing=True).routing.decisions.values()
    assert {1, 0} <= {int(index) for decision in routing for index in decision.expert_index.flatten()}
    assert torch.equal(model.generate(**rows, **options), model.generate(**rows, **options, use_cache=False))


@pytest.mark.parametrize(
    "moe, match",
    [
        ({"block": "chain_of_experts"}, "need the block 'moe' in a decoder, without expert_banks"),
        ({"router": "meo"}, "choose a router that assigns experts"),
        ({"experts": {"name": "hecto", "num_recurrent": 2}}, "leaves no feed-forward"),
    ],
)
def test_what_breaks_the_order_of_tokens_is_refused(moe, match):
    given = {"objectives": {}, "num_experts_per_tok": 2, **moe}
    with pytest.raises(ValueError, match=match):
        config = from_system("hecto", text_config=LlamaConfig(**TEXT), moe_config=given)
        HfMoeForConditionalGeneration(config).eval()(input_ids=torch.arange(8)[None])


def trained_on_two_tasks(kind: str, steps: int = 400) -> tuple[float, float, float]:
    """Return the accuracy, and the shares of expert 1 in rows whose task needs the order and of expert 0 in others."""
    layer = make_layer(16, 24, **PAIR, kind=kind, router=ROUTER)
    embedding, head, length = nn.Embedding(4, 16), nn.Linear(16, 2), 8
    parts = (layer, embedding, head)
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=1e-2)

    def batch(rows):
        bits, ordered = torch.randint(2, (rows, length)), torch.rand(rows) < 0.5
        target = torch.where(ordered, bits[:, -2:].sum(1) % 2, bits.sum(1) > length // 2).long()
        hidden = embedding(bits + 2 * ordered.long()[:, None])
        hidden = hidden + hidden.cumsum(1) / torch.arange(1, length + 1)[:, None]  # the bag of the tokens so far
        output, context = run(layer, hidden)
        return head((hidden + output)[:, -1]), target, ordered, context.decisions[1]

    for _ in range(steps):
        logits, target, _, decision = batch(64)
        shares = F.one_hot(decision.expert_index[:, 0], 2).float().mean(0)
        loss = F.cross_entropy(logits, target) + 0.2 * (shares * decision.router_probs.mean(0)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits, target, ordered, decision = batch(1000)
    chosen = decision.expert_index.view(1000, length)[:, -1]
    right = (logits.argmax(-1) == target).float().mean()
    return right.item(), (chosen[ordered] == 1).float().mean().item(), (chosen[~ordered] == 0).float().mean().item()


def test_order_goes_to_the_recurrent_expert_and_bags_do_not():
    right, order, bag = trained_on_two_tasks("hecto")
    assert order > 0.8 and bag > 0.6
    assert right > trained_on_two_tasks("ffn")[0] + 0.1
