"""The narrow waist: what routers, experts, objectives and connectors share, and nothing else.

A router turns hidden states and a routing context into a decision; experts turn hidden states and a decision into
hidden states; objectives turn decisions into one value per row. Shapes, throughout the library: B sequences, S
positions, T = B * S tokens (padding included), d hidden width, E routed experts, K slots per token, f expert width.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..configuration.configuration_hf_moe import MODALITIES
from .overrides import RoutingOverrides


# Population statistics keep one row for each.
NUM_MODALITIES = len(MODALITIES)


class RoutingContext:
    """What a router may know of a forward pass besides the hidden states.

    A plain class on purpose: FSDP2 rebuilds dataclasses, dicts and tuples on their way into a layer, and what a layer
    writes into such a copy would be lost.

    Args:
        modality_ids (`torch.Tensor` of shape `(B, S)`): 0 text, 1 image, 2 video, 3 audio.
        token_mask (`torch.Tensor` of shape `(B, S)`, bool): True where a token is real.
        input_ids (`torch.Tensor` of shape `(B, S)`, *optional*): the tokens, for routers that look at the word.
        condition_ids: name -> `(B,)` task, domain or language ids, where the data names them.
        progress: how far training is, 0 to 1; 1 at inference.
        overrides: test-time control, see [`RoutingOverrides`].
    """

    def __init__(
        self,
        modality_ids: torch.Tensor,
        token_mask: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        condition_ids: dict[str, torch.Tensor] | None = None,
        progress: float = 1.0,
        overrides: RoutingOverrides | None = None,
    ):
        self.modality_ids = modality_ids
        self.token_mask = token_mask
        self.input_ids = input_ids
        self.condition_ids = condition_ids or {}
        self.progress = progress
        self.overrides = overrides
        # State that runs from layer to layer, for shared and recurrent routers.
        self.carry: dict[str, Any] = {}
        # Keyed by layer, so that a layer which is recomputed in the backward pass overwrites its own entry.
        self.decisions: dict[int, Decision] = {}
        # The routed experts' output (B, S, d) of every layer, kept for objectives that read it.
        self.keep_outputs = False
        # Whether an objective reads how much the rows of the gates overlap, which only a router can tell.
        self.keep_gate_overlap = False
        self.outputs: dict[int, torch.Tensor] = {}
        # Of a model called without its head: the token of the context variable, and whether router logits are asked.
        self.call: tuple[Any, bool | None] | None = None

    @classmethod
    def all_text(cls, hidden_states: torch.Tensor) -> "RoutingContext":
        """Return the context of a call that came without one: real text tokens only."""
        shape = hidden_states.shape[:-1]
        return cls(
            modality_ids=torch.zeros(shape, dtype=torch.long, device=hidden_states.device),
            token_mask=torch.ones(shape, dtype=torch.bool, device=hidden_states.device),
        )

    def tokens(self, name: str, device: torch.device) -> torch.Tensor:
        """Return `modality_ids` or `token_mask` flattened to (T,), on the device of the layer that asks."""
        return getattr(self, name).reshape(-1).to(device)

    def row_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of per-token `values` (T,) over the real tokens of each row, (B,) float32."""
        mask = self.token_mask.to(values.device)
        per_row = values.float().view(mask.shape).masked_fill(~mask, 0.0)  # (B, S)
        return per_row.sum(-1) / mask.sum(-1).clamp(min=1)


Running = TypeVar("Running")


class TraceableVariable(Generic[Running]):
    """What the layer that is running knows: a context variable, which threads do not share.

    `torch.compile` cannot trace a `ContextVar`; while it traces, a plain attribute stands in.
    """

    def __init__(self, name: str) -> None:
        self.variable: ContextVar[Running | None] = ContextVar(name, default=None)
        self.traced: Running | None = None

    def get(self) -> Running | None:
        # A compiled part of a layer (one MoE block, say) finds nothing traced and reads the variable, which breaks the
        # graph but is right.
        if torch.compiler.is_compiling() and self.traced is not None:
            return self.traced
        found = self.variable.get()
        # Nor does a part that is not compiled find another than the traced one, in a layer whose graph breaks there.
        return self.traced if found is None else found

    def set(self, context: Running | None) -> Any:
        if torch.compiler.is_compiling():
            previous, self.traced = self.traced, context
            return previous
        return self.variable.set(context)

    def reset(self, token: Any) -> None:
        if isinstance(token, Token):  # where a graph broke, the other of the two calls may have been traced
            self.variable.reset(token)
        else:
            self.traced = token


# The context of the layer that is running, and of the call of the whole model.
ACTIVE_CONTEXT: TraceableVariable[RoutingContext] = TraceableVariable("hf_moe_routing_context")
CALL_CONTEXT: TraceableVariable[RoutingContext] = TraceableVariable("hf_moe_call_context")


@dataclass
class ExpertAssignment:
    """Which experts each token uses, and how much of each.

    Attributes:
        expert_index (`torch.Tensor` of shape `(T, K)`, int64): the value `num_experts` marks an empty slot.
        expert_weight (`torch.Tensor` of shape `(T, K)`): 0 at empty slots.
        num_experts: E.
        router_logits (`torch.Tensor` of shape `(T, C)`, float32): C >= E candidates, the real experts first; -inf
            where a token may not choose a candidate.
        router_probs (`torch.Tensor` of shape `(T, C)`, float32): the same as probabilities; rows sum to 1.
        gate_index (`torch.Tensor` of shape `(T,)`, *optional*): which of several gates decided, in
            [0, NUM_MODALITIES). Every gate is a population of its own in the balance losses.
        chosen_index (`torch.Tensor` of shape `(T, K)`, *optional*): `expert_index` before a capacity emptied slots.
            The balance statistics count these: a full expert must not look less wanted than it is.
        input_scale (`torch.Tensor` of shape `(T,)`, *optional*): multiplies what the experts see.
        identity_weight (`torch.Tensor` of shape `(T,)`, *optional*): weight of experts that return their input; they
            cost no matrix work and take no index.
        signals: named per-token values of shape `(T,)`, for logs, pictures and objectives (importance, slots, ...).
    """

    expert_index: torch.Tensor
    expert_weight: torch.Tensor
    num_experts: int
    router_logits: torch.Tensor | None = None
    router_probs: torch.Tensor | None = None
    gate_index: torch.Tensor | None = None
    chosen_index: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    identity_weight: torch.Tensor | None = None
    signals: dict[str, torch.Tensor] = field(default_factory=dict)

    def drop(self, dropped: torch.Tensor) -> "ExpertAssignment":
        """Return the assignment with every slot of the `dropped` (T,) bool tokens emptied."""
        self.expert_index = self.expert_index.masked_fill(dropped[:, None], self.num_experts)
        self.expert_weight = self.expert_weight.masked_fill(dropped[:, None], 0.0)
        return self

    def slot_counts(self, group: torch.Tensor, num_groups: int, token_mask: torch.Tensor) -> torch.Tensor:
        """Count the chosen slots of real tokens, (num_groups, E) int64, detached."""
        return self.slot_table(group, num_groups, token_mask)[:, : self.num_experts]

    def slot_table(self, group: torch.Tensor, num_groups: int, token_mask: torch.Tensor) -> torch.Tensor:
        """Count the slots of real tokens, (num_groups, E + 1) int64; the last column counts those without a choice."""
        width = self.num_experts + 1
        index = self.expert_index if self.chosen_index is None else self.chosen_index
        cell = group[:, None] * width + index.clamp(max=self.num_experts)  # (T, K)
        weight = token_mask[:, None].expand_as(cell).long()
        table = torch.zeros(num_groups * width, dtype=torch.long, device=cell.device)
        return table.scatter_add(0, cell.reshape(-1), weight.reshape(-1)).view(num_groups, width)


@dataclass
class SlotMixture:
    """Mixed slots within one sequence, as in Soft MoE.

    Attributes:
        dispatch (`torch.Tensor` of shape `(B, S, N)`): weights of the tokens in each of the N = E * slots inputs.
        combine (`torch.Tensor` of shape `(B, S, N)`): weights of the slot outputs in each token.
        num_experts: E.
    """

    dispatch: torch.Tensor
    combine: torch.Tensor
    num_experts: int
    router_logits: torch.Tensor | None = None
    signals: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class ParameterMixture:
    """Experts are merged into one before use.

    Attributes:
        expert_weight (`torch.Tensor` of shape `(G, E)`): the share of every expert in the merged one of a group.
        group_index (`torch.Tensor` of shape `(T,)`): the group of every token.
        num_experts: E.
    """

    expert_weight: torch.Tensor
    group_index: torch.Tensor
    num_experts: int
    router_logits: torch.Tensor | None = None
    signals: dict[str, torch.Tensor] = field(default_factory=dict)


Decision = ExpertAssignment | SlotMixture | ParameterMixture


@dataclass(frozen=True)
class MoELayerSpec:
    """The resolved facts of one MoE layer, handed to every mechanism that is built for it.

    Attributes:
        layer_idx: index of the decoder layer.
        hidden_size: d.
        num_experts: E, over all banks.
        num_experts_per_tok: K.
        expert_intermediate_size: f of a single bank.
        hidden_act: name of the activation, as in Transformers' `ACT2FN`.
        gated: whether an expert is `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        bias: whether an expert's projections have biases.
        banks: (name, number of experts, width) of every isolated bank; empty for the usual single bank.
        returns_tuple: whether the host's layer unpacks what its feed-forward returns, as Llama 4's does.
    """

    layer_idx: int
    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    expert_intermediate_size: int
    hidden_act: str = "silu"
    gated: bool = True
    bias: bool = False
    banks: tuple[tuple[str, int, int], ...] = ()
    returns_tuple: bool = False


class KeepsBufferTypes(nn.Module):
    """Base of what keeps statistics in buffers: these keep their type, whatever the model is cast to.

    A count in bf16 stops at 256, one in fp16 overflows at 65,504, and a bias of 0.3 does not see a step of 0.001.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "KeepsBufferTypes":
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            owner, _, own_name = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self.get_submodule(owner), own_name, buffer.to(moved.device))
        return self


class Router(KeepsBufferTypes):
    """Base of the routers: `forward(hidden (T, d), context) -> decision`.

    Options are the keyword arguments of the constructor after `spec`, typed, with the paper's defaults.
    """

    # What the decision depends on: "hidden_states", "input_ids", "modality", "condition" or "call", that of the host's
    # experts. One that depends on less than all of them says so, and can be merged for what it does depend on.
    reads: frozenset[str] = frozenset({"hidden_states"})

    # The gate that serves each modality, for routers with several.
    gate_of_modality: Sequence[int] = (0,) * NUM_MODALITIES

    def __init__(self, spec: MoELayerSpec):
        super().__init__()
        self.spec = spec

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> Decision:
        raise NotImplementedError(f"{type(self).__name__} must define forward(hidden_states, context).")

    def initialize(self, std: float) -> None:
        """Initialise the router's own parameters and buffers; `std` is the model's `initializer_range`."""

    def gate_rows(self) -> torch.Tensor | None:
        """Return the rows of the linear gate that scores the experts for each modality, (NUM_MODALITIES, E, d).

        The base takes the parameter `weight`, (E, d) or one such gate for each of `gate_of_modality`. `None` where the
        scores are no linear map of the hidden states.
        """
        weight = getattr(self, "weight", None)
        shape = (max(self.gate_of_modality) + 1, self.spec.num_experts, self.spec.hidden_size)
        if weight is None or weight.shape not in (shape, shape[1:]):
            return None
        return weight.view(shape)[list(self.gate_of_modality)]

    @torch.no_grad()
    def start_from(self, old: "Router") -> None:
        """Start as another router of the same layer, whose gate is trained; what has no counterpart there stays fresh.

        A router of the same class hands over all that fits. From another class come the gate's rows: every gate takes
        those of the first modality that it serves. Override it where more can be taken over.
        """
        if isinstance(old, type(self)):
            own, theirs = self.state_dict(keep_vars=True), old.state_dict()
            for name in own.keys() & theirs.keys():
                if own[name].shape == theirs[name].shape:
                    own[name].copy_(theirs[name])
            return
        own_rows, rows = self.gate_rows(), old.gate_rows()
        if own_rows is not None and rows is not None:
            self._write_gates(self.weight, rows)

    def _write_gates(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Write `values` (NUM_MODALITIES, ...) of each modality into the stacked gates of `target`."""
        gates = target.view(-1, *values.shape[1:])
        for gate in range(len(gates)):
            gates[gate] = values[self.gate_of_modality.index(gate)]

    def most_experts_per_tok(self) -> int:
        """Return how many experts a token uses at most."""
        return min(self.spec.num_experts_per_tok, self.spec.num_experts)

    def idle_parameters(self) -> int:
        """Return how many of its parameters do no work on a token, such as the networks of other modalities."""
        return 0

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        """Add a micro-batch to the router's statistics; called once per training forward, when its backward runs."""

    def end_step(self) -> None:
        """Turn the statistics into an update (bias balancing), after an optimizer step in which some were counted."""


class Experts(nn.Module):
    """Base of the expert kinds: `forward(hidden (T, d), decision) -> (T, d)`."""

    # Whether `forward(hidden, index (T, K), weight (T, K))` does the same for an assignment: the signature of
    # Transformers' experts, which its parallel plans wrap.
    takes_index_and_weight = False

    @property
    def runs_sorted_slots(self) -> bool:
        """Whether `forward` takes `slots`, those of its experts sorted by the caller (`dispatch.SortedSlots`)."""
        return False

    def forward(self, hidden_states: torch.Tensor, decision: Decision) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(hidden_states, decision).")

    def initialize(self, std: float) -> None:
        """Initialise the experts' own parameters."""

    def parallel_plans(self) -> dict[str, dict[str, str]]:
        """Return how Transformers splits these experts: by their width in `"tp_plan"`, by their number in `"ep_plan"`.

        Each maps a parameter's name, or `""` for the module, to a style of Transformers'. Empty: they stay whole.
        """
        return {"tp_plan": {}, "ep_plan": {}}


class Objective(KeepsBufferTypes):
    """Base of the auxiliary losses: `forward(decisions, context) -> (B,)`, float32.

    One value per row, the mean over layers (or their sum, where the config asks for it), from real tokens only. The
    model adds `coef * sum_r (n_r / N) * value_r` with n_r the labels of row r and N the labels of the optimizer step,
    so a value must be linear in the tokens of its row. A population statistic (a load over the whole batch) therefore
    comes from a buffer that holds the previous optimizer step; `accumulate` and `end_step` keep it.

    Args:
        specs: the MoE layers of the model.
        coef: coefficient of the loss, >= 0.
    """

    # Whether the loss reads `context.outputs`, which is kept for it.
    reads_outputs = False
    # Whether the loss reads the signal `gate_overlap`, which routers then give.
    reads_gate_overlap = False
    # How the layers' values are joined, `"mean"` or `"sum"`; an entry of every objective in the config.
    layer_reduction = "mean"

    def __init__(self, specs: list[MoELayerSpec], coef: float):
        super().__init__()
        if coef < 0:
            raise ValueError(f"The coefficient of {type(self).__name__} must be >= 0, got {coef}.")
        self.specs = specs
        self.coef = coef

    def forward(self, decisions: dict[int, Decision], context: RoutingContext) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(decisions, context).")

    def initialize(self, std: float) -> None:
        """Initialise the objective's own parameters and buffers."""

    def assignments(self, decisions: dict[int, Decision]) -> dict[int, ExpertAssignment]:
        """Return the decisions this loss applies to.

        Raises:
            ValueError: if there is none.
        """
        usable = {
            layer: decision
            for layer, decision in decisions.items()
            if isinstance(decision, ExpertAssignment) and decision.router_probs is not None
        }
        if not usable:
            kinds = sorted({type(decision).__name__ for decision in decisions.values()})
            raise ValueError(
                f"{type(self).__name__} needs an ExpertAssignment with router_probs, but the routers of layers "
                f"{sorted(decisions)} returned {' and '.join(kinds) or 'nothing'} without: choose another router, or "
                "remove this objective."
            )
        return usable

    def reduce_layers(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Return the mean over layers of the rows' values (B,), or their sum, on the device of the first layer."""
        stacked = torch.stack([value.to(values[0].device) for value in values])  # (layers, B)
        return stacked.sum(0) if self.layer_reduction == "sum" else stacked.mean(0)

    def accumulate(self, decisions: dict[int, Decision], context: RoutingContext) -> None:
        """Add a micro-batch to the statistics of the current optimizer step, when its backward runs."""

    def end_step(self) -> None:
        """Make the accumulated statistics the population of the next optimizer step, if any were accumulated."""


class Connector(nn.Module):
    """Base of the connectors: `forward(features (N, P, C)) -> (N, P', d)` for N images of P patches.

    Args:
        feature_size: C, the width of the tower's features.
        hidden_size: d, the width of the decoder.
    """

    def __init__(self, feature_size: int, hidden_size: int):
        super().__init__()
        self.feature_size = feature_size
        self.hidden_size = hidden_size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(features).")

    def num_tokens(self, num_patches: int) -> int:
        """Return P' for P = `num_patches`."""
        return num_patches


def sum_over_ranks(counts: torch.Tensor) -> torch.Tensor:
    """Return `counts` summed over the processes of a distributed run, or `counts` itself in a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts = counts.clone()
        torch.distributed.all_reduce(counts)
    return counts


def finite(sums: torch.Tensor) -> torch.Tensor:
    """Return the sums of a micro-batch, or zeros where it overflowed: `GradScaler` skips its step, and a population
    that is not finite would make every later loss so."""
    return torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))


def refuse_mixture(decision: Decision) -> ValueError:
    """Return the error of a mixture of experts of which this process holds a part."""
    return ValueError(
        f"A {type(decision).__name__} needs whole experts in every process, and a parallel plan has split them: pass "
        "`tp_plan={}` or `ep_size=1` in `DistributedConfig`, or choose a router that assigns experts."
    )
