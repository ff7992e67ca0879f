"""The narrow waist: the bases of routers, experts, objectives and connectors.

A router turns hidden states and a routing context into a decision; experts turn hidden states and a decision into
hidden states; objectives turn decisions into one value per row. Nothing else is shared, so everything else can be
swapped. Shapes, throughout the library: B sequences, S positions, T = B * S tokens (padding included), d hidden width,
E routed experts, K slots per token, f expert width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .clamped_unit import ClampedUnit
from .decisions import Decision, ExpertAssignment, ParameterMixture, SlotMixture
from .dispatch import Dispatch, mix_slots, run_rows
from .layer_spec import MoELayerSpec, Site
from .routing_context import NUM_MODALITIES, RoutingContext
from .running_statistics import KeepsBufferTypes


class SharedPart(nn.Module):
    """Base of what the routers of all layers share: a module of the model, which routers find in `context.shared`.

    It is no parameter that is tied from layer to layer: hooks of sharding and offloading run at the borders of
    modules, and a tied parameter comes apart where every layer is sharded by itself.
    """

    # Whether one layer runs it for all of them.
    runs_once = False

    def initialize(self, std: float) -> None:
        """Initialise the part's own parameters; `std` is the model's `initializer_range`."""


class Router(KeepsBufferTypes):
    """Base of the routers: `forward(hidden (T, d), context) -> decision`.

    Options are the keyword arguments of the constructor after `spec`, typed, with the paper's defaults.
    """

    # What the decision depends on: "hidden_states", "input_ids", "modality", "condition" or "call", that of the host's
    # experts. One that depends on less than all of them says so, and can be merged for what it does depend on.
    reads: frozenset[str] = frozenset({"hidden_states"})

    # The condition of the rows that it reads, and how many ids of it it tells apart, or how many features it takes.
    condition: str | None = None
    num_conditions: int = 0
    num_condition_features: int = 0

    # Whether a decision depends on later tokens, which no token of a causal layer may know.
    looks_ahead = False

    # Whether it mixes tokens in slots, at least while training: then experts must take a `SlotMixture`.
    mixes_slots = False

    # The mean number of slots that a router with a budget of them aims at; it then has `min_slots`, `max_slots` and
    # `check_budget`.
    target_slots: float | None = None

    # How many experts a bank for text and one for vision hold, for routers that keep them apart.
    bank_sizes: list[int] | None = None

    # The width r of the `latents` in its decisions, for a router that begins the work of its experts.
    latent_size: int | None = None

    # The gate that serves each modality, for routers with several.
    gate_of_modality: Sequence[int] = (0,) * NUM_MODALITIES

    def __init__(self, spec: MoELayerSpec):
        super().__init__()
        self.spec = spec

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> Decision:
        raise NotImplementedError(f"{type(self).__name__} must define forward(hidden_states, context).")

    def initialize(self, std: float) -> None:
        """Initialise the router's own parameters and buffers; `std` is the model's `initializer_range`."""

    @classmethod
    def shared_part(cls, routers: Sequence["Router"]) -> SharedPart | None:
        """Return the module that the routers of this class share, if any; they are those of one place of a model."""
        return None

    @property
    def shared_name(self) -> str:
        """The name of that module in `context.shared`."""
        name: str = self.mechanism_name
        return f"{self.spec.place}_{name}" if self.spec.place else name

    def shared(self, context: RoutingContext) -> Any:
        """Return that module.

        Raises:
            ValueError: if the call is not one of a model that holds it.
        """
        if self.shared_name not in context.shared:
            raise ValueError(
                f"The router {self.shared_name!r} of layer {self.spec.layer_idx} is in part a module of the model, "
                "and this call has none: call the whole model, not a layer alone."
            )
        return context.shared[self.shared_name]

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
    """Base of the expert kinds: `forward(hidden (T, d), decision) -> (T, d)`.

    A kind defines `compute`, which is handed its tokens sorted by expert, or a `forward` of its own.
    """

    num_experts: int
    # Whether `forward(hidden, index (T, K), weight (T, K))` does the same for an assignment: the signature of
    # Transformers' experts, which its parallel plans wrap.
    takes_index_and_weight = False
    # The gated unit of the shared branch beside these experts.
    shared_unit = ClampedUnit()
    # Parts that run besides the experts of a decision, and the signals that count their runs for every token.
    runs_by_signal: Mapping[str, str] = {}
    # The width r of the `latents` that they go on from, where they do: the router has the same `latent_size`.
    latent_size: int | None = None
    # Whether they read the tokens of a row in their order, with a state of their own: they must run once on the tokens
    # of a decoder layer.
    reads_rows = False
    # Whether they have a smaller form for after training, see [`~Experts.pack`].
    can_be_packed = False

    @property
    def takes_dispatch(self) -> bool:
        """Whether `forward` takes `dispatch`, for callers that have sorted the slots."""
        return type(self).forward is Experts.forward

    def compute(self, tokens: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """Return what each expert makes of its tokens, by row.

        Args:
            tokens (`torch.Tensor` of shape `(T, d)`): in the dtype of the products.
            dispatch (`Dispatch`): tells the rows of every expert.

        Returns:
            `torch.Tensor` of shape `(M, d)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute(tokens, dispatch), or forward.")

    def forward(
        self, hidden_states: torch.Tensor, decision: Decision, *, dispatch: Dispatch | None = None
    ) -> torch.Tensor:
        """Run the experts on the tokens (T, d).

        Args:
            dispatch (`Dispatch`, *optional*): the slots of these experts among those of the decision.

        Raises:
            ValueError: if the decision merges experts, which only stacked ones can.
        """
        if isinstance(decision, SlotMixture):
            mixture = (decision.dispatch, decision.combine, decision.num_experts, decision.order)
            return mix_slots(self.compute, hidden_states, *mixture)
        if isinstance(decision, ParameterMixture):
            raise ValueError(
                f"{type(self).__name__} cannot be merged into one expert, as this router asks: choose the experts "
                "'ffn', or a router that assigns experts."
            )
        if dispatch is None:
            dispatch = Dispatch(decision.expert_index, decision.num_experts)
        return run_rows(self.compute, hidden_states, dispatch, decision.expert_weight)

    def beside(self) -> dict[str, "Experts"]:
        """Return the parts of `runs_by_signal`, by their signals."""
        return {signal: getattr(self, name) for name, signal in self.runs_by_signal.items()}

    def parameters_per_run(self) -> list[float]:
        """Return how many parameters a token is multiplied with in a run of each expert.

        By default all experts have equal shares of what the experts hold.
        """
        count = sum(parameter.numel() for parameter in self.parameters())
        return [(count - self.parameters_per_token()) / self.num_experts] * self.num_experts

    def parameters_per_token(self) -> int:
        """Return how many parameters every token is multiplied with, whichever its experts."""
        return 0

    def initialize(self, std: float) -> None:
        """Initialise the experts' own parameters."""

    @property
    def widths(self) -> list[int]:
        """How many inner neurons each expert has, for kinds that can start as feed-forwards."""
        raise self._starts_fresh()

    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        """Start as feed-forwards, one for each expert in order, and of the width in [`~Experts.widths`].

        Args:
            states: `gate_up_proj` (2f, d) with the gate first, or `up_proj` (f, d), and `down_proj` (d, f), each with
                `_bias` where it has biases. They may be made one at a time: hold no more of them than needed.
            inputs (`torch.Tensor` of shape `(T, d)`, *optional*): tokens that reach the layer; kinds that approximate
                feed-forwards do so for these.

        Returns:
            Whether every expert computes what its feed-forward does.
        """
        raise self._starts_fresh()

    def _starts_fresh(self) -> ValueError:
        return ValueError(
            f"Experts of the kind {self.mechanism_name!r} cannot start as feed-forwards: choose 'ffn', or build a "
            "fresh model, from the fields of a config."
        )

    def states(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield every expert as a feed-forward, in the form of [`~Experts.take`]."""
        raise ValueError(
            f"Experts of the class {type(self).__name__} are no feed-forwards that others could start from."
        )

    def pack(self) -> None:
        """Put a smaller form, that does not learn, in the place of the weights; the experts compute what they did."""
        raise NotImplementedError(f"{type(self).__name__} has no packed form.")

    @property
    def packed_weights(self) -> int:
        """How many weights are packed in buffers, and so are no parameters."""
        return 0

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

    # What the loss reads besides decisions: "outputs", those of the experts in `context.outputs`, or "gate_overlap", a
    # signal that routers give where it is wanted.
    reads: frozenset[str] = frozenset()
    # How the layers' values are joined, `"mean"` or `"sum"`; an entry of every objective in the config.
    layer_reduction = "mean"
    # Whether a layer has a value of its own, which can be joined with others'.
    values_by_layer = True
    # The modalities of the tokens that it counts, all when absent; an entry of every objective in the config.
    modalities: Sequence[str] | None = None

    def __init__(self, specs: list[MoELayerSpec], coef: float):
        super().__init__()
        if coef < 0:
            raise ValueError(f"The coefficient of {type(self).__name__} must be >= 0, got {coef}.")
        self.specs = specs
        self.coef = coef

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(decisions, context).")

    def initialize(self, std: float) -> None:
        """Initialise the objective's own parameters and buffers."""

    def applies_to(self, decision: Decision) -> bool:
        """Whether this loss can read a decision."""
        return isinstance(decision, ExpertAssignment) and decision.router_probs is not None

    def assignments(self, decisions: dict[Site, Decision]) -> dict[Site, ExpertAssignment]:
        """Return the decisions this loss applies to.

        Raises:
            ValueError: if there is none.
        """
        usable: Any = {site: decision for site, decision in decisions.items() if self.applies_to(decision)}
        if not usable:
            kinds = sorted({type(decision).__name__ for decision in decisions.values()})
            raise ValueError(
                f"{type(self).__name__} needs an ExpertAssignment with router_probs, but the routers of layers "
                f"{list(decisions)} returned {' and '.join(kinds) or 'nothing'} without: choose another router, or "
                "remove this objective."
            )
        return usable

    def reduce_layers(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Return the mean over layers of the rows' values (B,), or their sum, on the device of the first layer."""
        stacked = torch.stack([value.to(values[0].device) for value in values])  # (layers, B)
        return stacked.sum(0) if self.layer_reduction == "sum" else stacked.mean(0)

    def accumulate(self, decisions: dict[Site, Decision], context: RoutingContext) -> None:
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


def at_least_float32(part: Router | SharedPart) -> Any:
    """Return a part of the routing in float32 where models are built in less: so it is when they are loaded."""
    return part.float() if torch.finfo(torch.get_default_dtype()).bits < 32 else part
