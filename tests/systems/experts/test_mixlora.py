"""MixLoRA: its three strategies and their losses by formula, and its claim, that experts keep tasks apart."""

from functools import partial

import pytest
import torch
from helpers.near import assert_near
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers
from hf_moe.adapters.low_rank import SharedAssignment
from hf_moe.modeling.routing_context import RoutingContext


TASKS, WIDTH, INNER, RANK = 4, 16, 32, 1
TARGETS = ["gate_proj", "up_proj", "down_proj"]
RATES = (0.01, 0.02, 0.04)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp = LlamaMLP(config)

    def forward(self, hidden_states):
        return self.mlp(hidden_states)


class Host(nn.Module):
    """One decoder layer that is a feed-forward; a token carries its task as a one-hot vector behind its features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = LlamaConfig(hidden_size=WIDTH + TASKS, intermediate_size=INNER, num_attention_heads=1)
        self.layers = nn.ModuleList([Layer(self.config)])

    def forward(self, hidden_states):
        return self.layers[0](hidden_states)


def tasks(seed):
    """Return a function that draws tokens and what the task of each makes of them: all three matrices changed."""
    draw = partial(torch.randn, generator=(generator := torch.Generator().manual_seed(seed)))
    mlp, width = Host().layers[0].mlp, WIDTH + TASKS

    def change(outputs, inputs):
        return 2 * draw(TASKS, outputs, RANK) @ draw(TASKS, RANK, inputs) / (inputs * RANK) ** 0.5

    gate, up, down = change(INNER, width), change(INNER, width), change(width, INNER)

    def changed(linear, changes, task, x):
        return linear(x) + torch.einsum("toi,ti->to", changes[task], x)

    @torch.no_grad()
    def batch(size):
        task = torch.randint(TASKS, (size,), generator=generator)
        x = torch.cat([draw(size, WIDTH), 2 * F.one_hot(task, TASKS)], dim=1)
        inner = F.silu(changed(mlp.gate_proj, gate, task, x)) * changed(mlp.up_proj, up, task, x)
        return x, changed(mlp.down_proj, down, task, inner)

    return batch


def error(config, seed, learning_rate):
    """Return the error of a trained adapter over that of the base, on fresh tokens."""
    batch = tasks(seed)
    x, y = batch(1000)
    base = F.mse_loss(Host()(x), y)
    torch.manual_seed(seed)
    model = get_peft_model(Host(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(300):
        x, y = batch(128)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        x, y = batch(1000)
        return (F.mse_loss(model(x), y) / base).item()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_experts_keep_tasks_apart_that_one_lora_of_equal_rank_mixes_up(seed):
    """Both with the best of three learning rates; seeds 3 and 4 agree.

    It holds where a task changes every matrix of the feed-forward by a rank that one expert has, 1 here, and tokens
    show their task. With rank 2 instead, MixLoRA was behind on one seed of three. At low learning rates the single
    LoRA, which every token trains, is ahead in the same number of steps.
    """
    options = {"variant": "top_k", "num_experts": TASKS, "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0}
    mixed = MoeLoraConfig.from_system("mixlora", **options, objectives={}, target_modules=TARGETS)
    single = LoraConfig(r=TASKS * RANK, lora_alpha=2 * TASKS * RANK, target_modules=TARGETS)
    best = [min(error(config, seed, rate) for rate in RATES) for config in (mixed, single)]
    assert best[0] < 0.95 * best[1], best


@pytest.mark.parametrize(
    "variant, expected",
    [
        ("top_k", [[0.55 / 0.75, 0.2 / 0.75, 0, 0], [0, 0, 0.05 / 0.95, 0.9 / 0.95]]),
        ("top_p", [[0.55 / 0.88, 0.2 / 0.88, 0.13 / 0.88, 0], [0, 0, 0, 1]]),  # 0.55 + 0.2 is not enough, 0.9 is
        ("switch", [[0.55, 0, 0, 0], [0, 0, 0, 0.9]]),
    ],
)
def test_a_strategy_chooses_and_weighs_by_its_formula(variant, expected):
    config = MoeLoraConfig.from_system("mixlora", variant=variant, num_experts=4)
    settings = config.settings("gate_proj")
    router = config.build_router(config.spec(0, 4, settings), settings).eval()
    router.weight.data = torch.eye(4)
    hidden = torch.tensor([[0.55, 0.2, 0.13, 0.12], [0.02, 0.03, 0.05, 0.9]]).log()
    decision = router(hidden, RoutingContext.all_text(hidden[None]))
    torch.testing.assert_close(SharedAssignment.of(decision).gates, torch.tensor(expected).float())


@pytest.mark.parametrize("variant, slots, has_z", [("top_k", 2, False), ("switch", 1, True)])
def test_the_balance_of_a_strategy_and_its_z_loss_are_in_the_loss(llama, text, randomise, variant, slots, has_z):
    losses, logits = [], []
    for fields in ({}, {"objectives": {}}):
        model = get_peft_model(llama(), MoeLoraConfig.from_system("mixlora", variant=variant, num_experts=4, **fields))
        randomise(model.eval())
        for layer in tuner_layers(model):
            for router in layer.moe_lora_router.values():
                router.register_forward_hook(lambda module, args, decision: logits.append(decision.router_logits))
        # With gradients: a loss that is only measured is the language loss alone.
        losses.append(model(**text).loss.detach())
    per_layer = [item.detach().view(2, 9, 4) for item in logits if item is not None and item.shape[-1] == 4][:2]
    share = (text["labels"][:, 1:] != -100).sum(1) / (text["labels"][:, 1:] != -100).sum()
    expected = 0.0
    for row, real in enumerate(text["attention_mask"].bool()):
        for own in (layer[row, real] for layer in per_layer):
            probs = own.softmax(-1)
            chosen = F.one_hot(probs.topk(slots).indices, 4).sum((0, 1)) / (len(own) * slots)  # (E,)
            value = 4 * (chosen * probs.mean(0)).sum() + has_z * own.logsumexp(-1).square().mean()
            expected = expected + share[row] * 0.01 * value / len(per_layer)
    assert_near(losses[0] - losses[1], expected, 1e-4)
