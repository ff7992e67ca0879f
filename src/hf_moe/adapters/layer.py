"""The layer that takes the place of a targeted linear layer."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..modeling.routing import ExpertAssignment, Router, RoutingContext
from .config import MoeLoraConfig
from .constant_routing import constant_gates
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
        # adapter -> the gates (E,) it was merged with, which take it out again.
        self.merged_gates: dict[str, torch.Tensor] = {}
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

    def deciding_router(self, adapter_name: str) -> Router:
        """Return the router of an adapter that decides for this target, its own or the shared one."""
        owner = self.router_owner[adapter_name] or self
        return owner.moe_lora_router[adapter_name]

    def get_delta_weight(self, adapter_name: str, gates: torch.Tensor) -> torch.Tensor:
        """Return what an adapter adds to the weight of a token with these gates (E,): (out, in) float32."""
        lora_a, lora_b = self.moe_lora_A[adapter_name].float(), self.moe_lora_B[adapter_name].float()
        scaled = lora_b * (gates.float() * self.scaling[adapter_name])[:, None, None]
        delta = scaled.transpose(0, 1).flatten(1) @ lora_a.flatten(0, 1)
        if adapter_name in self.moe_lora_shared_A:
            shared_a, shared_b = self.moe_lora_shared_A[adapter_name], self.moe_lora_shared_B[adapter_name]
            delta = delta + self.shared_scaling[adapter_name] * shared_b.float() @ shared_a.float()
        return delta

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        gates: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add adapters to the base weight.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: the adapters, the active ones when `None`.
            gates: adapter -> gates (E,), those of its router when absent.

        Raises:
            ValueError: if no gates are given and the router has none that hold for every token, if the base weight is
                quantised, or if the result is not finite.
        """
        base = self.get_base_layer()
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.moe_lora_A:
                continue
            if type(base) not in (nn.Linear, Conv1D) or type(base.weight.data) is not torch.Tensor:
                raise ValueError(
                    f"LoRA experts merge into plain weights, and a target is a {type(base).__name__} with a "
                    f"{type(base.weight.data).__name__}: load the base model unquantised and in one piece to merge."
                )
            own = constant_gates(self.deciding_router(adapter_name)) if gates is None else gates[adapter_name]
            merged = base.weight + self._as_stored(self.get_delta_weight(adapter_name, own))
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"Merging adapter {adapter_name!r} gives weights that are not finite.")
            base.weight.data = merged.data
            self.merged_gates[adapter_name] = own
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            delta = self.get_delta_weight(adapter_name, self.merged_gates.pop(adapter_name))
            self.get_base_layer().weight.data -= self._as_stored(delta).data

    def _as_stored(self, delta: torch.Tensor) -> torch.Tensor:
        """Return a delta (out, in) in the layout and dtype of the base weight."""
        base = self.get_base_layer()
        return (delta.T if isinstance(base, Conv1D) else delta).to(base.weight)


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
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
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
