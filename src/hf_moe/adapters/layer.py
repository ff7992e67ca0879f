"""The layer that takes the place of a targeted linear layer."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from torch.nn import functional as F

from ..modeling.routing import ExpertAssignment, Router, RoutingContext
from .config import MoeLoraConfig
from .low_rank import ExpertSlots, add_experts
from .routing import ACTIVE_LAYER, AdapterContext, LayerRun, TokenlessContext


class MoeLoraLayer(BaseTunerLayer):
    """What every target holds for each adapter: the experts' stacks and, in the target that owns it, the router."""

    adapter_layer_names = ("moe_lora_A", "moe_lora_B", "moe_lora_shared_A", "moe_lora_shared_B", "moe_lora_router")
    other_param_names = (
        "r",
        "lora_alpha",
        "scaling",
        "shared_scaling",
        "router_owner",
        "moe_lora_dropout",
        "moe_lora_objectives",
    )

    def __init__(self, base_layer: nn.Module):
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.shared_scaling: dict[str, float] = {}
        self.moe_lora_A = nn.ParameterDict()  # (E, r, in)
        self.moe_lora_B = nn.ParameterDict()  # (E, out, r)
        self.moe_lora_shared_A = nn.ParameterDict()  # (shared_r, in)
        self.moe_lora_shared_B = nn.ParameterDict()  # (out, shared_r)
        self.moe_lora_dropout = nn.ModuleDict()
        self.moe_lora_router = nn.ModuleDict()
        # The objectives of an adapter live in its first target, where PEFT saves them.
        self.moe_lora_objectives = nn.ModuleDict()
        # The target whose router decides for this one, referenced only; `None` where the target decides for itself.
        self.router_owner: dict[str, MoeLoraLayer | None] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        config: MoeLoraConfig,
        rank: int,
        alpha: int,
        router: Router | None,
        owner: "MoeLoraLayer | None",
    ) -> None:
        """Add the experts of an adapter.

        Args:
            adapter_name: the adapter.
            config: its configuration.
            rank, alpha: r and lora_alpha of this target.
            router: the router, if this target holds it.
            owner: the target that holds the shared router; this one if the router is shared and its own.
        """
        self.r[adapter_name] = rank
        self.lora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = config.scaling(alpha, rank)
        self.moe_lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.moe_lora_A[adapter_name] = nn.Parameter(torch.empty(config.num_experts, rank, self.in_features))
        self.moe_lora_B[adapter_name] = nn.Parameter(torch.zeros(config.num_experts, self.out_features, rank))
        self._initialise(self.moe_lora_A[adapter_name], self.moe_lora_B[adapter_name], config)
        if config.shared_r:
            self.shared_scaling[adapter_name] = config.scaling(alpha, config.shared_r)
            shared_a = nn.Parameter(torch.empty(config.shared_r, self.in_features))
            shared_b = nn.Parameter(torch.zeros(self.out_features, config.shared_r))
            self._initialise(shared_a, shared_b, config)
            self.moe_lora_shared_A[adapter_name], self.moe_lora_shared_B[adapter_name] = shared_a, shared_b
        if config.freeze_experts:
            experts = tuple(name for name in self.adapter_layer_names if name != "moe_lora_router")
            self.frozen_peft_weight_names[adapter_name] = experts
        if router is not None:
            self.moe_lora_router[adapter_name] = router
        self.router_owner[adapter_name] = owner
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initialise(self, lora_a: nn.Parameter, lora_b: nn.Parameter, config: MoeLoraConfig) -> None:
        """Start A as `nn.Linear` starts, which is how LoRA starts; B is zero already."""
        nn.init.uniform_(lora_a, -(self.in_features**-0.5), self.in_features**-0.5)
        if not config.init_lora_weights:
            nn.init.normal_(lora_b, std=lora_b.shape[-1] ** -0.5)

    def _slots(self, adapter_name: str, x: torch.Tensor) -> ExpertSlots:
        """Return the decision for the tokens of `x`, the shared one if a sibling has not made it yet."""
        run = ACTIVE_LAYER.get()
        owner = self.router_owner[adapter_name]
        if owner is None:
            return decide(self.moe_lora_router[adapter_name], x, run, adapter_name)
        if run is None:
            raise RuntimeError(
                "A layer of LoRA experts whose router reads the input of the decoder layer was called outside of one: "
                "call the model, or set router_input='target'."
            )
        if adapter_name not in run.shared:
            router = owner.moe_lora_router[adapter_name]
            run.shared[adapter_name] = decide(router, run.hidden_states, run, adapter_name)
        slots = run.shared[adapter_name]
        if len(slots.index) != x[..., 0].numel():
            raise ValueError(
                f"The router of this layer decided for the {len(slots.index)} tokens that enter the layer, and a "
                f"target, {type(self.get_base_layer()).__name__}({self.in_features}, {self.out_features}), got "
                f"{x[..., 0].numel()}: set router_input='target', or leave this target out."
            )
        return slots

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        raise ValueError(MERGE_REFUSED)


MERGE_REFUSED = (
    "LoRA experts cannot be merged into the base weights: which experts a token uses depends on the token, and one "
    "matrix cannot hold that. Keep the adapter, or call unload() for the base model without it."
)


class Linear(nn.Module, MoeLoraLayer):
    """A linear layer with LoRA experts beside it.

    Args:
        base_layer: the layer itself, `nn.Linear`, one of its quantised forms, or Transformers' `Conv1D`.
        adapter_name: the first adapter; the rest of the arguments as in `update_layer`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any):
        nn.Module.__init__(self)
        MoeLoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter_name in self.active_adapters:
            if adapter_name in self.moe_lora_A:
                lora_a, lora_b = self.moe_lora_A[adapter_name], self.moe_lora_B[adapter_name]
                slots = self._slots(adapter_name, x)
                inputs = self.moe_lora_dropout[adapter_name](self._cast_input_dtype(x, lora_a.dtype))
                result = add_experts(result, inputs, lora_a, lora_b * self.scaling[adapter_name], slots)
                if adapter_name in self.moe_lora_shared_A:
                    inner = F.linear(inputs, self.moe_lora_shared_A[adapter_name] * self.shared_scaling[adapter_name])
                    result = result + F.linear(inner, self.moe_lora_shared_B[adapter_name]).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()


def decide(router: Router, hidden_states: torch.Tensor, run: LayerRun | None, adapter_name: str) -> ExpertSlots:
    """Return a router's decision for hidden states (..., d), and record it for the objectives."""
    root: AdapterContext | None = None if run is None else run.context
    context: RoutingContext
    if root is not None and root.tokens.token_mask.shape == hidden_states.shape[:-1]:
        context = root.tokens
    else:
        root, context = None, TokenlessContext(hidden_states)
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, d)
    decision = router(tokens, context)
    check_decision(decision)
    decision = decision.drop(~context.tokens("token_mask", tokens.device))
    if root is not None:
        root.decisions.setdefault(adapter_name, {})[router.spec.layer_idx] = decision
    return ExpertSlots(decision)


def check_decision(decision: Any) -> None:
    """Refuse what LoRA experts on a linear layer cannot run.

    Raises:
        ValueError: if the router mixes tokens or parameters in place of assigning experts, or uses identity experts.
    """
    if not isinstance(decision, ExpertAssignment):
        raise ValueError(
            f"LoRA experts need a router that assigns experts to tokens, this one returns a {type(decision).__name__}."
        )
    if decision.identity_weight is not None:
        raise ValueError(
            "LoRA experts cannot run a router with experts that return their input: the input and the output of a "
            "linear layer differ in width. Choose another router."
        )
