"""Targets that are not linear layers: modules, layers as a whole, and the stacked weights of a MoE model's experts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..modeling.dispatch import Dispatch, compute_dtype, run_stacks, stack_linear
from .config import TargetSettings
from .host_router import index_and_weight
from .hosts import input_name, is_expert_stack
from .layer import MoeLoraLayer
from .low_rank import SharedAssignment, add_experts
from .stacks import Target, Weights


class WholeModule(nn.Module, MoeLoraLayer):
    """A module with experts around it; its first argument and its (first) result are hidden states of this `width`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, width: int, **kwargs: Any):
        nn.Module.__init__(self)
        self.width = width
        MoeLoraLayer.__init__(self, base_layer, adapter_name, **kwargs)

    def widths(self) -> tuple[int, int]:
        return self.width, self.width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        given = bool(args)
        hidden_states = args[0] if given else kwargs["hidden_states"]
        others: tuple | None = None

        def call(inputs: torch.Tensor) -> torch.Tensor:
            nonlocal others
            if given:
                output = self.base_layer(inputs, *args[1:], **kwargs)
            else:
                output = self.base_layer(**{**kwargs, "hidden_states": inputs})
            if isinstance(output, tuple):
                output, others = output[0], output[1:]
            return output

        output = self.adapted(call, hidden_states, args[1:])
        return output if others is None else (output, *others)

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()


class LayerOutput(nn.Module):
    """Stands for what a layer returns, as the target of experts after the whole of it.

    The layer itself stays where it is, for models read attributes of their layers.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        # Empty; where it is and its dtype are what adapters take from the weight of a target.
        like = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
        self.register_buffer("weight", like.new_empty(0), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


# PEFT finds the wrapper of a parameter by the name of this class.
class ParamWrapper(nn.Module, MoeLoraLayer):
    """The stack of a MoE model's experts, with a mixture of LoRA experts on one of its stacked weights.

    Expert h of the host computes `W_h x + s * sum_i g_i B_ih A_ih x` with the gates g of the token; A is stored as
    (E, H, r, in) and B as (E, H, out, r) for H host experts. Two weights of one stack have two wrappers around each
    other; the outer one computes both. The stack is called with hidden states (T, d), expert index (T, K) and weight
    (T, K).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, **kwargs: Any):
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        MoeLoraLayer.__init__(self, base_layer, adapter_name, **kwargs)

    def widths(self) -> tuple[int, int]:
        host = self.get_base_layer()
        weight = getattr(host, self.parameter_name)
        if not is_expert_stack(host) or self.parameter_name not in (input_name(host), "down_proj"):
            raise ValueError(
                f"{type(host).__name__}.{self.parameter_name}, {tuple(weight.shape)}, is no stacked weight of experts "
                "as Transformers' MoE models store them: target_parameters takes 'gate_up_proj' (or 'up_proj') and "
                "'down_proj' of these. Linear layers go in target_modules."
            )
        first, second = weight.shape[1:]
        return (first, second) if host.is_transposed else (second, first)

    @property
    def num_host_experts(self) -> int:
        """H."""
        return getattr(self.get_base_layer(), self.parameter_name).shape[0]

    def target(self, name: str, settings: TargetSettings, init_zero: bool) -> Target:
        if settings.experts["name"] != "lora" or settings.router["name"] == "host":
            raise ValueError(
                f"{name!r} is a stacked weight, which takes the experts 'lora' with a router of their own, not "
                f"{settings.experts['name']!r} with {settings.router['name']!r}. For one LoRA per expert of the host, "
                "take the router 'constant' with num_experts=1. To leave it out: "
                f"exclude_modules=['experts', 'experts.{name}']."
            )
        per_expert = super().target(name, settings, init_zero)
        ranks = tuple(rank for rank in per_expert.ranks for _ in range(self.num_host_experts))
        host = self.num_host_experts
        return replace(per_expert, num_experts=len(ranks), ranks=ranks, num_host_experts=host)

    def takes_mixed_slots(self, adapter_name: str) -> bool:
        return False  # a slot is no token, of which the host knows the experts

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (-1, self.num_host_experts)) if tensor.dim() > 2 else tensor

    def mergeable_weight(self) -> torch.Tensor:
        return getattr(self.get_base_layer(), self.parameter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the host's experts, with all wrappers around them merged if asked."""
        for wrapper in self._wrappers() if merge else ():
            wrapper.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def _as_stored(self, delta: torch.Tensor) -> torch.Tensor:
        return (delta.mT if self.get_base_layer().is_transposed else delta).to(self.mergeable_weight())

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = (*args, *kwargs.values())  # index and weight, which some hosts give by name
        for wrapper in self._wrappers() if self.disable_adapters else ():
            wrapper.unmerge()  # the outer one alone is called
        host = self.get_base_layer()
        wrappers = {wrapper.parameter_name: wrapper for wrapper in self._wrappers()}
        if (
            self.disable_adapters
            or self.merged
            or not any(adapter in wrapper.experts for wrapper in wrappers.values() for adapter in self.active_adapters)
        ):
            return host(hidden_states, *args)
        found = index_and_weight(args)
        if found is None:
            raise ValueError(
                "LoRA experts on stacked weights need a host that assigns experts to tokens, and this one calls its "
                f"experts with {[type(item).__name__ for item in args]}."
            )
        index, weight = found
        dispatch = Dispatch(index, self.num_host_experts)

        def project(host: Any, name: str, rows: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
            output = stack_linear(host, name, rows, dispatch)
            return wrappers[name].add(output, rows, hidden_states, dispatch) if name in wrappers else output

        tokens = hidden_states.to(compute_dtype(hidden_states))
        return dispatch.combine(run_stacks(host, tokens, dispatch, project), weight).to(hidden_states.dtype)

    def _wrappers(self) -> Iterator["ParamWrapper"]:
        wrapper: Any = self
        while isinstance(wrapper, ParamWrapper):
            yield wrapper
            wrapper = wrapper.base_layer

    def add(
        self, output: torch.Tensor, rows: torch.Tensor, hidden_states: torch.Tensor, dispatch: Dispatch
    ) -> torch.Tensor:
        """Add the experts of the active adapters to what the host's experts computed of `rows` (M, in)."""
        self.has_acted = True
        hosts, ends = self.num_host_experts, dispatch.offsets
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        host_expert = torch.arange(hosts, device=ends.device).repeat_interleave(counts)  # (M,)
        for adapter in self.active_adapters:
            if adapter in self.experts:
                made: Any = self.decision(adapter, hidden_states, ())
                index = dispatch.rows(made.expert_index) * hosts + host_expert[:, None]  # (M, K)
                lora_a, lora_b = self.stacks(adapter)  # (E * H, r, in), (E * H, out, r)
                total = len(lora_a)
                own = SharedAssignment(index.clamp(max=total), dispatch.rows(made.expert_weight), total)
                output = add_experts(output, self.prepare(adapter, rows), Weights(lora_a, lora_b), own)
        return output

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()
