"""MoV: vectors that a soft router merges, on tasks that nobody names."""

import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers


WIDTH, TASKS = 16, 4


class Toy(nn.Module):
    """One frozen linear layer, whose last inputs show the task."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH + TASKS, WIDTH, bias=False)

    def forward(self, x):
        return self.linear(x)


def test_four_vectors_learn_four_rescalings_that_one_cannot_and_tasks_route_apart():
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(TASKS, WIDTH, generator=generator)
    base = Toy().linear.weight.detach()

    def batch(size):
        task = torch.randint(0, TASKS, (size,), generator=generator)
        x = torch.cat([torch.randn(size, WIDTH, generator=generator), 2.0 * F.one_hot(task, TASKS)], dim=-1)
        return x, scales[task] * F.linear(x, base), task

    losses = {}
    for count in (1, 4):
        config = MoeLoraConfig.from_system(
            "mov_molora", variant="mov", num_experts=count, target_modules=["linear"], router_input="target"
        )
        torch.manual_seed(0)
        model = get_peft_model(Toy(), config)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(150):
            x, y, _ = batch(128)
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        made = []
        router = next(tuner_layers(model)).moe_lora_router["default"]
        router.register_forward_hook(lambda module, args, decision, made=made: made.append(decision.router_probs))
        with torch.no_grad():
            x, y, task = batch(400)
            losses[count] = F.mse_loss(model(x), y).item()
    means = torch.stack([made[0][task == number].mean(0) for number in range(TASKS)])  # (tasks, 4)
    distance = (means[:, None] - means).abs().sum(-1) + 2 * torch.eye(TASKS)
    assert losses[4] < 0.5 * losses[1] and distance.min() > 0.2
