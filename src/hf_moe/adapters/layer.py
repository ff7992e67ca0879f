"""The layer that takes the place of a targeted linear layer."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..modeling.decisions import SlotMixture
from ..modeling.routing import Router
from .config import MoeLoraConfig, TargetSettings
from .constant_routing import constant_gates
from .contexts import LayerCall, active_call
from .deciding import check_gradient, decide, decision_of_target, shared
from .experts import ExpertKind, TargetCall, build_kind
from .experts.lora import LoraExperts
from .host_router import HostRouter
from .hosts import computes_linear
from .low_rank import SharedAssignment
from .stacks import Stacks, Target, UnequalRanks, Weights, low_rank_pair


class MoeLoraLayer(BaseTunerLayer):
    """What every target holds for each adapter: the experts' stacks and, in the target that owns it, the router."""

    adapter_layer_names = (
        "moe_lora_A",
        "moe_lora_B",
        "moe_lora_vector",
        "moe_lora_shared_A",
        "moe_lora_shared_B",
        "moe_lora_router",
    )
    other_param_names = (
        "r",
        "lora_alpha",
        "scaling",
        "shared_scaling",
        "experts",
        "containers",
        "router_owner",
        "router_group",
        "frozen_experts",
        "key",
        "layer_name",
        "ffn_experts",
        "moe_lora_ranks",
        "moe_lora_dropout",
        "moe_lora_objectives",
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any):
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.shared_scaling: dict[str, float] = {}
        self.experts: dict[str, ExpertKind] = {}
        # Which tensors the kind of an adapter's experts has here, `("A", "B")` or `("vector",)`.
        self.containers: dict[str, tuple[str, ...]] = {}
        self.moe_lora_A = Stacks()  # (E, r, in), or (R, in) of experts of unequal rank
        self.moe_lora_B = Stacks()  # (E, out, r), or (out, R)
        self.moe_lora_vector = Stacks()  # (E, width)
        self.moe_lora_ranks = nn.ModuleDict()  # of experts of unequal rank
        self.moe_lora_shared_A = Stacks()  # (shared_r, in)
        self.moe_lora_shared_B = Stacks()  # (out, shared_r)
        self.moe_lora_dropout: dict[str, float] = {}
        self.moe_lora_router = nn.ModuleDict()
        # The objectives of an adapter live in its first target, where PEFT saves them.
        self.moe_lora_objectives = nn.ModuleDict()
        # The target whose router decides for this one, referenced only; `None` where the target decides for itself.
        self.router_owner: dict[str, MoeLoraLayer | None] = {}
        # The name of the target in the model, by which the config sets its own ranks and overrides.
        self.key: dict[str, str] = {}
        self.layer_name: dict[str, str | None] = {}  # of the decoder layer around the target
        self.ffn_experts: dict[str, bool] = {}  # whether the feed-forward around the target mixes whole experts
        self.router_group: dict[str, str] = {}  # what targets must have in common to share a router
        self.frozen_experts: dict[str, Any] = {}  # see `frozen.py`
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Whether the target has been called: a host may read its weight, and leave its forward and the experts out.
        self.has_acted = False
        self.head_dim: int | None = None  # of the attention around the target
        self.merged_gates: dict[str, torch.Tensor] = {}  # (E,), which take a merged adapter out again
        self.in_features, self.out_features = self.widths()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def widths(self) -> tuple[int, int]:
        """Return the widths of what the target reads and returns."""
        return _get_in_out_features(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        config: MoeLoraConfig,
        settings: TargetSettings,
        key: str,
        layer_name: str | None,
        router: Router | None,
        owner: "MoeLoraLayer | None",
        head_dim: int | None = None,
    ) -> None:
        """Add the experts of an adapter.

        `settings` is what of its `config` holds for this target, `key` the target's name in the model, `layer_name`
        and `head_dim` those of the layer and the attention around it. `router` is given to the target that holds it;
        `owner` is the target that holds the shared one.
        """
        self.head_dim = head_dim
        target = self.target(key.rpartition(".")[2], settings, config.init_lora_weights)
        kind = build_kind(settings.experts, target)
        self.key[adapter_name] = key
        self.lora_alpha[adapter_name] = settings.lora_alpha
        self.set_experts(adapter_name, config, kind, {name: self.stored(t) for name, t in kind.tensors().items()})
        self.moe_lora_dropout[adapter_name] = config.lora_dropout
        if config.shared_r:
            self.shared_scaling[adapter_name] = config.scaling(settings.lora_alpha, config.shared_r)
            pair = low_rank_pair(replace(target, num_experts=1, ranks=(config.shared_r,)))
            self.moe_lora_shared_A[adapter_name] = nn.Parameter(pair["A"].squeeze(0))
            self.moe_lora_shared_B[adapter_name] = nn.Parameter(pair["B"].squeeze(0))
        if config.freeze_experts:
            experts = tuple(name for name in self.adapter_layer_names if name != "moe_lora_router")
            self.frozen_peft_weight_names[adapter_name] = experts
        if router is not None:
            self.moe_lora_router[adapter_name] = router
        self.router_owner[adapter_name] = owner
        self.layer_name[adapter_name] = layer_name
        self.ffn_experts[adapter_name] = config.ffn_experts
        self.router_group[adapter_name] = settings.router_group
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def target(self, name: str, settings: TargetSettings, init_zero: bool) -> Target:
        """Return the facts of this target that its experts are built from."""
        ranks = settings.ranks
        facts = (name, self.in_features, self.out_features, settings.num_experts, ranks, init_zero)
        return Target(*facts, head_dim=self.head_dim)

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the experts, as they create it, in the shape that it is stored in."""
        return tensor

    def set_experts(
        self, adapter_name: str, config: MoeLoraConfig, kind: ExpertKind, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Hold an adapter's experts, in place of those before, with these trainable tensors by container."""
        self.experts[adapter_name] = kind
        self.r[adapter_name] = kind.target.rank
        self.scaling[adapter_name] = config.scaling(self.lora_alpha[adapter_name], kind.target.rank)
        self.containers[adapter_name] = tuple(tensors)
        for container, tensor in tensors.items():
            getattr(self, f"moe_lora_{container}")[adapter_name] = nn.Parameter(tensor)
        if adapter_name in self.moe_lora_ranks:
            del self.moe_lora_ranks[adapter_name]
        if "A" in tensors and kind.target.unequal_ranks:
            self.moe_lora_ranks[adapter_name] = UnequalRanks(kind.target, 0.5 if config.use_rslora else 1.0)

    def num_experts(self, adapter_name: str) -> int:
        """Return how many experts an adapter has here."""
        target = self.experts[adapter_name].target
        return target.num_experts // target.num_host_experts

    def takes_mixed_slots(self, adapter_name: str) -> bool:
        """Whether an adapter's experts run on mixed slots here."""
        return self.experts[adapter_name].takes_mixed_slots

    def scaled_b(self, adapter_name: str) -> torch.Tensor:
        """Return the B of an adapter, as it is stored, times its scaling."""
        lora_b, scaling = self.moe_lora_B(adapter_name), self.scaling[adapter_name]
        if adapter_name in self.moe_lora_ranks:
            scaling = (scaling * self.moe_lora_ranks[adapter_name].scaling).to(lora_b.dtype)
        elif scaling == 1:
            return lora_b
        return lora_b * scaling

    def stacks(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (E, r, in) and the scaled B (E, out, r) of an adapter, zero beyond an expert's own rank."""
        lora_a, lora_b = self.moe_lora_A(adapter_name), self.scaled_b(adapter_name)
        if adapter_name in self.moe_lora_ranks:
            return self.moe_lora_ranks[adapter_name].pad(lora_a, lora_b)
        return lora_a.flatten(0, -3), lora_b.flatten(0, -3)

    def adapted(self, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, args: tuple = ()) -> torch.Tensor:
        """Return what the target, `call`, computes of x (..., in) with its active adapters; `args` go with x."""
        if not self.has_acted:
            self.has_acted = True
        for adapter_name in self.active_adapters:
            if adapter_name in self.experts:
                call = partial(self._adapt, adapter_name, call, args)
        return call(x)

    def _adapt(
        self, adapter_name: str, run: Callable[[torch.Tensor], torch.Tensor], args: tuple, x: torch.Tensor
    ) -> torch.Tensor:
        weights, decision = self.weights(adapter_name), self.decision(adapter_name, x, args)
        call = TargetCall(run, x, partial(self.prepare, adapter_name), weights, decision)
        result = self.experts[adapter_name].forward(call)
        if adapter_name in self.shared_scaling:
            inner = F.linear(call.prepare(x), self.moe_lora_shared_A(adapter_name) * self.shared_scaling[adapter_name])
            result = result + F.linear(inner, self.moe_lora_shared_B(adapter_name)).to(result.dtype)
        return result

    def weights(self, adapter_name: str) -> Weights:
        """Return the tensors of an adapter's experts."""
        # Not by attribute: a module looks those up in three places, which costs as much as a product of one token.
        held: Any = self._modules
        if "vector" in self.containers[adapter_name]:
            return Weights(vector=held["moe_lora_vector"](adapter_name))
        a, b = held["moe_lora_A"](adapter_name), held["moe_lora_B"](adapter_name)
        scaling, ranks = self.scaling[adapter_name], held["moe_lora_ranks"]._modules.get(adapter_name)
        if ranks is not None:
            b, scaling = b * (scaling * ranks.scaling).to(b.dtype), 1.0
        return Weights(a, b, None, scaling, ranks)

    def prepare(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Return what the experts of an adapter read of `x`: in their dtype, after dropout."""
        held: Any = self._modules
        dtype = held[f"moe_lora_{self.containers[adapter_name][0]}"].without_hook(adapter_name).dtype
        x = x if x.dtype == dtype else self._cast_input_dtype(x, dtype)
        dropout = self.moe_lora_dropout[adapter_name]
        return F.dropout(x, dropout, self.training) if dropout else x

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        parameter = next(base_layer.parameters(), None)
        if device is None and parameter is not None:  # a module without a weight of its own
            device, dtype = parameter.device, parameter.dtype
        return device, dtype

    def decision(self, adapter_name: str, x: torch.Tensor, args: tuple) -> SharedAssignment | SlotMixture:
        """Return the decision for the tokens of `x`, the shared one if a sibling has not made it yet."""
        call = active_call()
        owner = self.router_owner[adapter_name]
        if owner is None:
            router = self.moe_lora_router[adapter_name]
            if isinstance(router, HostRouter):
                return SharedAssignment.of(router.from_call(*args))
            return decide(router, x, call, adapter_name)
        if call is None:
            raise RuntimeError(
                "A layer of LoRA experts whose router reads the input of the decoder layer was called outside of one: "
                "call the model, or set router_input='target'."
            )
        key = adapter_name, owner
        made = call.shared.get(key)
        if made is None:
            made = call.shared[key] = self._shared_decision(owner, adapter_name, call, x.device)
        if x.shape[:-1] == call.shape and x is not call.encoder_hidden_states:
            return made
        target = f"{type(self.get_base_layer()).__name__}({self.in_features}, {self.out_features})"
        return decision_of_target(call, made, (adapter_name, owner.moe_lora_router[adapter_name].spec.site), x, target)

    def _shared_decision(
        self, owner: "MoeLoraLayer", adapter_name: str, call: LayerCall, device: torch.device
    ) -> SharedAssignment | SlotMixture:
        """Return the decision of a shared router: its own layer makes it, other layers take it from the context."""
        router = owner.moe_lora_router[adapter_name]
        if self.layer_name[adapter_name] == owner.layer_name[adapter_name]:
            return decide(router, call.hidden_states, call, adapter_name)
        call.check_told(f"A {type(router).__name__} that all layers share")
        decision = call.of(adapter_name).decisions[router.spec.site]
        check_gradient(decision, router)
        # Of its own: what a layer derives from the decision must come back in its recomputation.
        return shared(decision, device)

    def deciding_router(self, adapter_name: str) -> Router:
        """Return the router of an adapter that decides for this target, its own or the shared one."""
        return (self.router_owner[adapter_name] or self).moe_lora_router[adapter_name]

    def get_delta_weight(self, adapter_name: str, gates: torch.Tensor) -> torch.Tensor:
        """Return what an adapter adds to the weight of a token with these gates (E,), float32.

        The shape is (out, in), or (H, out, in) on the stacked weight of H host experts.
        """
        kind = self.experts[adapter_name]
        if not isinstance(kind, LoraExperts) or self.ffn_experts[adapter_name]:
            found = "whole feed-forwards" if self.ffn_experts[adapter_name] else type(kind).__name__
            raise ValueError(
                f"Only LoRA experts on single weights can be merged; those of adapter {adapter_name!r} are {found}."
            )
        if adapter_name in self.frozen_experts:
            self.frozen_experts[adapter_name].hold(self)  # an optimizer may have moved them since the last forward
        lora_a, lora_b = (self.stored(stack).float() for stack in self.stacks(adapter_name))
        delta = torch.einsum("e,e...or,e...ri->...oi", gates.float(), lora_b, lora_a)
        if adapter_name in self.moe_lora_shared_A:
            shared_a, shared_b = self.moe_lora_shared_A(adapter_name), self.moe_lora_shared_B(adapter_name)
            delta = delta + self.shared_scaling[adapter_name] * shared_b.float() @ shared_a.float()
        return delta

    def mergeable_weight(self) -> torch.Tensor:
        """Return the weight that adapters can be merged into, which is neither quantised nor distributed."""
        base = self.get_base_layer()
        weight = base.weight if isinstance(base, (nn.Linear, Conv1D)) else None
        if weight is None or type(weight.data) is not torch.Tensor or not computes_linear(base):
            raise ValueError(
                f"LoRA experts merge into the plain weight of a linear layer, and a target is a {type(base).__name__}"
                f"{'' if weight is None else f' with a {type(weight.data).__name__}'}: keep the adapter, or load the "
                "base model unquantised and in one piece."
            )
        return weight

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        gates: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add adapters to the base weight, the active ones when `None`, with gates (E,) of the router when absent."""
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.experts:
                continue
            own = constant_gates(self.deciding_router(adapter_name)) if gates is None else gates[adapter_name]
            merged = self.merged_weight(adapter_name, own)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"Merging adapter {adapter_name!r} gives weights that are not finite.")
            self.mergeable_weight().data = merged
            self.merged_gates[adapter_name] = own
            self.merged_adapters.append(adapter_name)

    def merged_weight(self, adapter_name: str, gates: torch.Tensor) -> torch.Tensor:
        """Return what the base weight becomes with an adapter of these gates (E,) in it."""
        return self.mergeable_weight().data + self._as_stored(self.get_delta_weight(adapter_name, gates)).data

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            delta = self.get_delta_weight(adapter_name, self.merged_gates.pop(adapter_name))
            self.mergeable_weight().data -= self._as_stored(delta).data

    def _as_stored(self, delta: torch.Tensor) -> torch.Tensor:
        """Return a delta (..., out, in) in the layout and dtype of the base weight."""
        return (delta.mT if isinstance(self.get_base_layer(), Conv1D) else delta).to(self.mergeable_weight())


def tuner_layers(model: nn.Module) -> Iterator[MoeLoraLayer]:
    """Yield the layers with LoRA experts, in the order of the model."""
    # Every forward looks for them: not inside of them, where most modules of an adapted model are.
    seen, left = set(), [model]
    while left:
        module = left.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if isinstance(module, MoeLoraLayer):
            yield module
            left.append(module.base_layer)
        else:
            left.extend(reversed(module._modules.values()))


class Linear(nn.Module, MoeLoraLayer):
    """A linear layer with experts beside it: `nn.Linear`, one of its quantised forms, or Transformers' `Conv1D`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any):
        nn.Module.__init__(self)
        MoeLoraLayer.__init__(self, base_layer, adapter_name, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self._modules["base_layer"]
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return base(x, *args, **kwargs)
        return self.adapted(partial(base, *args, **kwargs) if args or kwargs else base, x)

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()
