"""Training loops of every order, each with what it must count: the steps, and the forward passes of the last one."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, MoeLoraConfig


STEPS = 5
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
ROUTER = {"name": "deepseek_v3", "bias_update_rate": 0.125}


@dataclass
class Subject:
    """A model in training, the router and the objective that are watched, and the slots of one forward pass."""

    model: nn.Module
    router: nn.Module
    objective: nn.Module
    slots: int
    closed: list[int]

    @property
    def population(self) -> int:
        return next(buffer for name, buffer in self.objective.named_buffers() if "population" in name).sum().item()

    @property
    def left(self) -> int:
        """Slots that have counted and are not closed."""
        accumulated = next(buffer for name, buffer in self.objective.named_buffers() if "accumulated" in name)
        assert self.router.load.sum() == accumulated.sum()
        return accumulated.sum().item()

    def loss(self) -> torch.Tensor:
        return self.model(**batch()).loss

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def batch() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": input_ids}


def watch(model: nn.Module, router: nn.Module, objective: nn.Module) -> Subject:
    closed: list[int] = []
    end_step = router.end_step

    def record() -> None:
        closed.append(int(router.load.sum()))
        end_step()

    router.end_step = record
    return Subject(model, router, objective, 2 * int(batch()["attention_mask"].sum()), closed)


def own_model(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    moe = {"layers": [1], "num_experts": 4, "router": ROUTER, "objectives": {"load_balance": 0.1}, **fields}
    return HfMoeForConditionalGeneration(HfMoeConfig(text_config=LlamaConfig(**SIZES), moe_config=moe)).train()


def own() -> Subject:
    model = own_model()
    return watch(model, model.moe_layers()[1].router, model.objectives.by_name["load_balance"])


def adapted() -> Subject:
    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "num_experts": 4}
    config = MoeLoraConfig(**targets, router=ROUTER, objectives={"load_balance": 0.1})
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config).train()
    layer = next(module for module in model.modules() if getattr(module, "moe_lora_objectives", None))
    return watch(model, layer.moe_lora_router["default"], layer.moe_lora_objectives["default"].by_name["load_balance"])


SUBJECTS = {"own": own, "adapters": adapted}


def sgd(subject: Subject) -> torch.optim.Optimizer:
    return torch.optim.SGD(subject.parameters(), lr=0.01)


def zero_first(subject: Subject, **options: Any) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        optimizer.zero_grad(**options)
        subject.loss().backward()
        optimizer.step()
    return 1


def zero_to_zeros(subject: Subject) -> int:
    return zero_first(subject, set_to_none=False)


def zero_before_backward(subject: Subject) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        loss = subject.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 1


def zero_last(subject: Subject) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        subject.loss().backward()
        optimizer.step()
        subject.model.zero_grad()
    return 1


def never_cleared(subject: Subject) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        subject.loss().backward()
        optimizer.step()
    return 1


def accumulation(subject: Subject) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        for _ in range(3):
            subject.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return 3


def cleared_between_micro_batches(subject: Subject) -> int:
    """As under FSDP2 without gradient sync: the parameters hold no gradient between micro-batches."""
    optimizer = sgd(subject)
    for _ in range(STEPS):
        for _ in range(3):
            optimizer.zero_grad()
            subject.loss().backward()
        optimizer.step()
    return 3


def two_forwards_one_backward(subject: Subject) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (subject.loss() + subject.loss()).backward()
        optimizer.step()
    return 2


def an_extra_forward(subject: Subject) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        optimizer.zero_grad()
        subject.loss()
        loss = subject.loss()
        subject.loss()
        loss.backward()
        subject.loss()
        optimizer.step()
        subject.loss()
    return 1


def two_backwards_of_one_forward(subject: Subject) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = subject.loss()
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
    return 1


def logits_alone(subject: Subject) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        optimizer.zero_grad()
        subject.model(**batch()).logits.square().mean().backward()
        optimizer.step()
    return 1


def closure(subject: Subject) -> int:
    optimizer = torch.optim.LBFGS(subject.parameters(), lr=1e-3, max_iter=3, tolerance_grad=0, tolerance_change=0)

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = subject.loss()
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(evaluate)
    return 3


def fused(subject: Subject) -> int:
    optimizer = torch.optim.AdamW(subject.parameters(), fused=True)
    for _ in range(STEPS):
        optimizer.zero_grad()
        subject.loss().backward()
        optimizer.step()
    return 1


def two_optimizers(subject: Subject) -> int:
    first, second = subject.parameters()[::2], subject.parameters()[1::2]
    optimizers = [torch.optim.SGD(first, lr=0.01), torch.optim.AdamW(second)]
    for _ in range(STEPS):
        subject.loss().backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return 1


def of_one_parameter(subject: Subject) -> int:
    optimizer = torch.optim.SGD(subject.parameters()[-1:], lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        subject.loss().backward()
        optimizer.step()
    return 1


def with_accelerate(subject: Subject) -> int:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(subject.model, sgd(subject))
    for _ in range(2 * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch()).loss)
            optimizer.step()
            optimizer.zero_grad()
    return 2


def in_the_backward(subject: Subject) -> int:
    """Every parameter is stepped by an optimizer of its own, as soon as its gradient is there."""
    for parameter in subject.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.01)

        def step(parameter: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(STEPS):
        subject.loss().backward()
    return 1


def of_another_model(subject: Subject) -> int:
    """Two models, each with an optimizer of its own; the other one is stepped three times as often."""
    other = nn.Linear(2, 2)
    optimizer, theirs = sgd(subject), torch.optim.SGD(other.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(3):
            (subject.loss() + other(torch.ones(2)).sum()).backward()
            theirs.step()
        optimizer.step()
    return 3


def checkpointed(subject: Subject) -> int:
    subject.model.gradient_checkpointing_enable({"use_reentrant": False})
    subject.model.enable_input_require_grads()
    return zero_first(subject)


def evaluated_between(subject: Subject) -> int:
    optimizer = sgd(subject)
    for _ in range(STEPS):
        optimizer.zero_grad()
        subject.loss().backward()
        subject.model.eval()
        subject.loss().backward()
        subject.model.train()
        with torch.no_grad():
            subject.loss()
        optimizer.step()
    return 1


def copied(subject: Subject) -> int:
    """A copy is trained; the model itself is not."""
    optimizer = sgd(subject)
    other = copy.deepcopy(subject.model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        other(**batch()).loss.backward()
        subject.loss().backward()
        optimizer.step()
    return 1


def without_an_optimizer(subject: Subject) -> int:
    """Only here the next forward tells, so one more of it closes the last step."""
    for _ in range(STEPS):
        subject.loss().backward()
        for parameter in subject.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.01 * parameter.grad
            parameter.grad = None
    subject.loss()
    return 1


LOOPS = [
    zero_first,
    zero_to_zeros,
    zero_before_backward,
    zero_last,
    never_cleared,
    accumulation,
    cleared_between_micro_batches,
    two_forwards_one_backward,
    an_extra_forward,
    two_backwards_of_one_forward,
    logits_alone,
    closure,
    fused,
    two_optimizers,
    of_one_parameter,
    with_accelerate,
    in_the_backward,
    of_another_model,
    checkpointed,
    evaluated_between,
    copied,
    without_an_optimizer,
]
