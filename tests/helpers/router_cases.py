"""What the tests of the routers share: small layers, contexts and experts, and a loop that trains them."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from hf_moe.configuration.names import without_alias
from hf_moe.modeling.auxiliary import AuxiliaryLosses
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing import Router
from hf_moe.modeling.routing_context import RoutingContext


HIDDEN, EXPERTS, SLOTS = 32, 8, 2
EAGER = SimpleNamespace(_experts_implementation="eager")


def make_spec(**kwargs) -> MoELayerSpec:
    fields = {
        "layer_idx": 1,
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": SLOTS,
        "expert_intermediate_size": 16,
    }
    return MoELayerSpec(**{**fields, **kwargs})


def make_router(name: str, options: dict | None = None, spec: MoELayerSpec | None = None) -> Router:
    options = without_alias("router", {"name": name, **(options or {})})
    router = build("router", get_mechanism("router", options.pop("name")), options, spec or make_spec())
    router.initialize(0.2)
    return router.eval()


def make_context(rows: int = 3, positions: int = 10, **kwargs) -> RoutingContext:
    """Rows of text with an image in the middle, the first row left-padded."""
    modality = torch.zeros(rows, positions, dtype=torch.long)
    modality[:, 3:7] = 1
    mask = torch.ones(rows, positions, dtype=torch.bool)
    mask[0, :2] = False
    return RoutingContext(**{"modality_ids": modality, "token_mask": mask, **kwargs})


def make_hidden(context: RoutingContext, width: int = HIDDEN) -> torch.Tensor:
    return torch.randn(context.token_mask.numel(), width)


def text_context(rows: int, positions: int) -> RoutingContext:
    return RoutingContext.all_text(torch.empty(rows, positions, 1))


def make_experts(spec: MoELayerSpec, std: float = 0.2):
    experts = build("experts", get_mechanism("experts", "ffn"), {}, EAGER, spec)
    experts.initialize(std)
    return experts


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def copy_experts(spec: MoELayerSpec, source: nn.Module):
    experts = build("experts", get_mechanism("experts", "ffn"), {}, EAGER, spec)
    experts.load_state_dict(source.state_dict())
    return experts


def weight_table(decision) -> torch.Tensor:
    """Return the weight of every expert for every token, (T, E)."""
    table = decision.expert_weight.new_zeros(len(decision.expert_index), decision.num_experts + 1)
    return table.scatter_add(1, decision.expert_index, decision.expert_weight)[:, :-1]


def collapsed(router: Router, expert: int = 0) -> Router:
    """Send every token whose first feature is positive to one expert."""
    router.weight.data.zero_()
    router.weight.data[..., expert, 0] = 100.0
    return router


def fit(forward, parameters, batch, steps: int, lr: float = 1e-2) -> float:
    """Train with Adam and return the mean loss of the last 20 steps."""
    optimizer, losses = torch.optim.Adam(parameters, lr=lr), []
    for _ in range(steps):
        inputs, targets = batch()
        loss = F.mse_loss(forward(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def moe(router: Router, experts, context: RoutingContext):
    return lambda hidden: experts(hidden, router(hidden, context))


def make_losses(objectives: dict, spec: MoELayerSpec) -> AuxiliaryLosses:
    """Return the objectives of a model with one MoE layer."""
    config = SimpleNamespace(moe_config=SimpleNamespace(objectives=objectives))
    losses = AuxiliaryLosses(config, [spec])
    for objective in losses.by_name.values():
        objective.initialize(0.02)
    return losses


def train_on(losses: AuxiliaryLosses, router: Router, batch, steps: int, lr: float = 1e-2) -> None:
    """Train a router with Adam on auxiliary losses alone; a step is one batch, all of whose tokens are labels.

    Args:
        batch: returns a context and the hidden states of its tokens.
    """
    optimizer = torch.optim.Adam(router.parameters(), lr=lr)
    for _ in range(steps):
        context, hidden = batch()
        decision = context.decisions[router.spec.site] = router(hidden, context)
        loss = losses(context, context.token_mask.sum(-1)).total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.accumulate(context)
        router.accumulate(decision, context)
        losses.end_step()
        router.end_step()
