"""Gates between a model and local experts, fitted to what lowers the loss of a row.

    target of row r and expert e = [loss of r with e < loss of r without any]
    min over w, b of   mean over rows of BCE(sigmoid(w x_r + b), target_r) + RIDGE |w|^2

The rows are a mix of the user's data and of generic data; x_r is what the gate reads of a row.

Source: A Mixture of Expert Approach for Low-Cost Customization of Deep Neural Networks, arXiv:1811.00056.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F

from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.routers.ge_le_gate import OPEN, GeLeGateRouter
from .layer import tuner_layers


# What keeps the weights finite where the rows can be told apart without error.
RIDGE = 1e-3


@dataclass(frozen=True)
class GateReport:
    """What a gate was fitted to, and how well.

    Attributes:
        rows: how many rows were compared.
        better: of every expert, the share of the rows whose loss is lower with it.
        agreement: of every expert, the share of the rows in which the gate decides for the lower loss.
    """

    rows: int
    better: list[float]
    agreement: list[float]


@torch.no_grad()
def fit_gate(model: PeftModel, batches: Iterable[dict[str, Any]], adapter_name: str = "default") -> GateReport:
    """Fit the gate of an adapter whose router is `ge_le_gate`; nothing else is changed.

    Args:
        model (`PeftModel`): with trained local experts.
        batches: keyword arguments of the model, with `labels`: as many rows of generic data as of the users'. They run
            once without the adapter, and once with every expert.
        adapter_name (`str`, *optional*, defaults to `"default"`): the adapter.

    Raises:
        ValueError: if the adapter has another router, or not one for the whole model, or no row has labels and a
            decision.
    """
    router, batches = _gate(model, adapter_name), list(batches)
    before = router.weight.clone(), router.bias.clone()
    read: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = router.register_forward_hook(lambda module, args, decision: read.append(router.read(*args)))
    try:
        with evaluation_mode(model):
            with model.disable_adapter():
                without = _losses(model, batches)  # (N,)
            losses = []
            router.weight.zero_()
            for expert in range(router.spec.num_experts):
                read.clear()
                router.bias.fill_(-OPEN)
                router.bias[expert] = OPEN
                losses.append(_losses(model, batches))
    finally:
        hook.remove()
        router.weight.copy_(before[0])
        router.bias.copy_(before[1])
    inputs, decided = (torch.cat(parts) for parts in zip(*read, strict=True))  # (N, d), (N,)
    counted = decided & without.isfinite()
    if not counted.any():
        raise ValueError("fit_gate needs rows with labels, in which the gate has read what it decides by: none has.")
    targets = (torch.stack(losses, -1) < without[:, None])[counted].float()  # (n, E)
    inputs = inputs[counted]
    weight, bias = _classify(inputs, targets)
    router.weight.copy_(weight)
    router.bias.copy_(bias)
    agreed = (((inputs @ weight.T + bias).sigmoid() > router.threshold) == targets.bool()).float()
    return GateReport(len(targets), targets.mean(0).tolist(), agreed.mean(0).tolist())


def _gate(model: PeftModel, adapter_name: str) -> GeLeGateRouter:
    layers = [layer for layer in tuner_layers(model) if adapter_name in layer.experts]
    routers = {layer.deciding_router(adapter_name) for layer in layers}
    gate = next(iter(routers), None)
    if len(routers) != 1 or not isinstance(gate, GeLeGateRouter):
        found = sorted({type(router).__name__ for router in routers})
        raise ValueError(
            f"fit_gate fits the one gate of an adapter, and {adapter_name!r} has {len(routers)} routers, {found}: "
            "make it with router='ge_le_gate' and router_input='model'."
        )
    return gate


def _losses(model: PeftModel, batches: list[dict[str, Any]]) -> torch.Tensor:
    """Return the sum of the loss over the labels of every row, (N,) float32; not finite where there are none."""
    losses = []
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = model(**batch).logits[:, :-1].float()  # (B, S - 1, V)
        loss = F.cross_entropy(logits.transpose(1, 2), labels.to(logits.device), reduction="none").sum(1)
        losses.append(loss.masked_fill((labels == -100).all(1).to(loss.device), float("nan")))
    return torch.cat(losses)


@torch.enable_grad()
def _classify(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (E, d) and bias (E,) of the logistic regression of targets (N, E) on inputs (N, d)."""
    middle = inputs.mean(0)
    weight = inputs.new_zeros(targets.shape[1], inputs.shape[1]).requires_grad_()
    bias = inputs.new_zeros(targets.shape[1]).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (inputs - middle) @ weight.T + bias
        loss = F.binary_cross_entropy_with_logits(logits, targets) + RIDGE * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return weight, bias - weight @ middle
