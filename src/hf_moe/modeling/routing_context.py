"""The routing context: what a router may know of a forward pass, and how the layer that runs finds it."""

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..configuration.configuration_hf_moe import MODALITIES
from .decisions import Decision, ExpertAssignment
from .documents import packed_documents
from .layer_spec import Site
from .memory import TokenMemory
from .overrides import RoutingOverrides


# Population statistics keep one row for each.
NUM_MODALITIES = len(MODALITIES)

# The inputs of a call that a context keeps, for who asks for the documents or labels of a row, or the real patches.
KEPT_INPUTS = ("labels", "position_ids", "seq_idx", "cu_seq_lens_q", "pixel_attention_mask")

Made = TypeVar("Made")


def is_one_of(ids: torch.Tensor, values: Iterable[int]) -> torch.Tensor:
    """Return which of the `ids` are among a few `values`, bool; these need not be copied to the ids' device."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for value in values:
        found = found | (ids == value)
    return found


class made_once(Generic[Made]):  # noqa: N801
    """As `functools.cached_property`, without the lock of Python 3.11, at which `torch.compile` breaks the graph."""

    def __init__(self, make: Callable[[Any], Made]):
        self.make = make
        self.__doc__ = make.__doc__

    def __get__(self, owner: Any, cls: type) -> Any:
        if owner is None:
            return self
        value = self.make(owner)
        setattr(owner, self.make.__name__, value)  # found from now on in place of this
        return value


class RoutingContext:
    """What a router may know of a forward pass besides the hidden states.

    A plain class on purpose: FSDP2 rebuilds dataclasses, dicts and tuples on their way into a layer, and what a layer
    writes into such a copy would be lost.

    Args:
        modality_ids (`torch.Tensor` of shape `(B, S)`): 0 text, 1 image, 2 video, 3 audio; or what returns
            them, called when a router first asks, which raises where they are unknown.
        token_mask (`torch.Tensor` of shape `(B, S)`, bool): True where a token is real.
        input_ids (`torch.Tensor` of shape `(B, S)`, *optional*): the tokens, for routers that look at the word.
        condition_ids: name -> `(B,)` or `(B, S)` task, domain or language ids, where the data names them; `None` where
            the rows of the call are not those of these tokens. Tokens after a prompt have the id of its last one.
        progress: how far training is, 0 to 1; 1 at inference.
        overrides: test-time control, see [`RoutingOverrides`].
        memory: what the routers know of the tokens before these, see [`TokenMemory`].
        inputs: of the call, by name, as far as a router may ask for them.
    """

    def __init__(
        self,
        modality_ids: torch.Tensor | Callable[[], torch.Tensor],
        token_mask: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        condition_ids: dict[str, torch.Tensor] | None = None,
        progress: float = 1.0,
        overrides: RoutingOverrides | None = None,
        memory: TokenMemory | None = None,
        inputs: Mapping[str, Any] | None = None,
    ):
        self._modality_ids = modality_ids
        self.token_mask = token_mask
        self.input_ids = input_ids
        self.condition_ids: Any = condition_ids or {}
        self.progress = progress
        self.overrides = overrides
        self.memory = memory or TokenMemory()
        self.inputs = {name: inputs[name] for name in KEPT_INPUTS if name in inputs} if inputs else {}
        # Contexts of the same tokens for adapters, by name, with decisions and memory of their own.
        self.adapters: dict[str, RoutingContext] = {}
        # Contexts of other tokens, by name: the pieces of a token, an image's patches.
        self.parts: dict[str, RoutingContext] = {}
        # The row of the batch that each row of a part belongs to; `None` where they are the same.
        self.row_index: torch.Tensor | None = None
        # What enters the decoder, (B, S, d) without a gradient, where features are among the embeddings of tokens.
        self.embeddings: torch.Tensor | None = None
        # The modality of every placeholder, (B, S), where `modality_ids` count more tokens to an image than these.
        self.placeholders: torch.Tensor | None = None
        # Modules that the routers of all layers share, by the router's name; the model owns them.
        self.shared: dict[str, nn.Module] = {}
        # State that runs from layer to layer, for shared and recurrent routers.
        self.carry: dict[str, Any] = {}
        # Keyed by site, so that a layer which is recomputed in the backward pass overwrites its own entry.
        self.decisions: dict[Site, Decision] = {}
        # What the objectives of the call read besides decisions, see [`Objective.reads`].
        self.wanted: frozenset[str] = frozenset()
        # The routed experts' output (B, S, d) of every site, where it is wanted.
        self.outputs: dict[Site, torch.Tensor] = {}
        # The model whose call has opened the context, and whether router logits are asked of it.
        self.opened_by: nn.Module | None = None
        self.wants_router_logits: bool | None = None
        # What an adapter knows of the layer that runs.
        self.layer_call: Any = None

    @property
    def modality_ids(self) -> torch.Tensor:
        """The modality of every token, (B, S)."""
        if not isinstance(self._modality_ids, torch.Tensor):
            self._modality_ids = self._modality_ids()
        return self._modality_ids

    @modality_ids.setter
    def modality_ids(self, value: torch.Tensor | Callable[[], torch.Tensor]) -> None:
        self._modality_ids = value

    @property
    def token_mask(self) -> torch.Tensor:
        """Which tokens are real, (B, S) bool."""
        return self._token_mask

    @token_mask.setter
    def token_mask(self, value: torch.Tensor) -> None:
        self._token_mask = value
        self._all_real: bool | None = None

    @property
    def all_real(self) -> bool:
        """Whether no token is padding, as far as that can be told without waiting for a device."""
        if torch.compiler.is_compiling() or not self._token_mask.is_cpu:
            return False
        if self._all_real is None:
            self._all_real = bool(self._token_mask.all())
        return self._all_real

    def drop_padding(self, decision: Made) -> Made:
        """Return a decision for these tokens, without the slots of padding: it is computed by nobody."""
        if isinstance(decision, ExpertAssignment) and not self.all_real:
            decision.drop(~self.tokens("token_mask", decision.expert_index.device))
        return decision

    def of(self, adapter: str) -> "RoutingContext":
        """Return the context of an adapter: the same tokens, with decisions and memory of its own."""
        if adapter not in self.adapters:
            context = self.adapters[adapter] = object.__new__(RoutingContext)
            own: dict[str, Any] = {"decisions": {}, "carry": {}, "parts": {}, "memory": self.memory.of(adapter)}
            vars(context).update(vars(self), **own)
        return self.adapters[adapter]

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

    def condition(self, name: str, device: torch.device) -> torch.Tensor:
        """Return the condition `name` of every token, (T,); one of a row holds for all of its tokens.

        Raises:
            ValueError: if the call did not give it.
        """
        ids = self._given_condition(name, "of shape (B,) or (B, S)")
        if ids.dim() == 1:
            ids = ids[:, None].expand(self.token_mask.shape)
        return self.of_tokens(name, ids).reshape(-1).long().to(device)

    def row_condition(self, name: str, device: torch.device) -> torch.Tensor | None:
        """Return the condition `name` of every row, (B,); `None` where every token has one of its own.

        Raises:
            ValueError: if the call did not give it.
        """
        ids = self._given_condition(name, "of shape (B,) or (B, S)")
        return ids.long().to(device) if ids.dim() == 1 else None

    def condition_features(self, name: str, device: torch.device) -> torch.Tensor:
        """Return the features that a condition has in place of ids, for every token, (T, C).

        Raises:
            ValueError: if the call did not give it.
        """
        features = self._given_condition(name, "features of shape (B, C) or (B, S, C)")
        if features.dim() == 2:
            return features.to(device).repeat_interleave(self.token_mask.shape[1], dim=0)
        return self.of_tokens(name, features).flatten(0, 1).to(device)

    def of_tokens(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return `values` (B, L, ...) of the tokens of this call, (B, S, ...): after those of a prompt, its last one.

        Raises:
            ValueError: if they are of other tokens, and nothing is cached.
        """
        length, given = self.token_mask.shape[1], values.shape[1]
        if given == length:
            return values
        start = self.memory.cached_tokens
        if not start:
            raise ValueError(f"The condition {name!r} has values for {given} tokens, and the call has {length}.")
        columns = torch.arange(start, start + length, device=values.device)
        return values[:, columns.clamp(max=given - 1)]

    def _given_condition(self, name: str, form: str) -> torch.Tensor:
        if self.condition_ids is None:
            raise ValueError(
                f"This router reads {name!r}, a condition of the rows, and these tokens are not the rows of the call, "
                "one sequence or image each: they are in the tower of a larger model, in an encoder-decoder, or in a "
                "layer that cuts its input into windows. Choose a router that reads hidden states alone, such as "
                "'top_k', or put it elsewhere."
            )
        if name not in self.condition_ids:
            raise ValueError(
                f"The router reads the condition {name!r}, and the call gave {sorted(self.condition_ids) or 'none'}: "
                f"pass condition_ids={{{name!r}: ...}}, {form}. With LoRA experts hf_moe.adapters.ConditionCollator "
                f"brings it past a collator that drops it, and hf_moe.adapters.routing_inputs({name}=...) into "
                "generation; task_ids never arrives where PEFT's config has a task_type."
            )
        return self.condition_ids[name]

    def past(self, site: Hashable) -> torch.Tensor | None:
        """Return what a router has remembered of the cached tokens, (B, n, ...); `None` where nothing is cached.

        Raises:
            ValueError: if the earlier tokens, or which of these are padding, cannot be known.
        """
        return self.memory.past(site)

    def remember(self, site: Hashable, values: torch.Tensor) -> torch.Tensor:
        """Return `values` (B, S, ...) after those of the cached tokens, (B, n + S, ...); the cache keeps them all.

        The gradient flows into those of this call alone.
        """
        return self.memory.remember(site, values)

    @made_once
    def documents(self) -> torch.Tensor | None:
        """Which of several documents in its row a token belongs to, (B, S); `None` where every row is one."""
        return None if self.memory.cached_tokens else packed_documents(self.inputs, self.token_mask.shape)

    @property
    def labelled(self) -> torch.Tensor | None:
        """Which tokens the call has labels for, (B, S) bool; `None` where it has none, or none of tokens."""
        labels = self.inputs.get("labels")
        fits = isinstance(labels, torch.Tensor) and labels.shape == self.token_mask.shape
        return labels != -100 if fits else None

    def take_after(self, other: "RoutingContext") -> None:
        """Share what is of the whole forward pass with the context of other tokens in it."""
        self.progress, self.overrides, self.shared = other.progress, other.overrides, other.shared
        self.wanted = other.wanted

    def split(self, pieces: int) -> "RoutingContext":
        """Return the context of sub-tokens, (B, S * pieces): every token is cut into `pieces`, which lie together."""
        name = f"split_{pieces}"
        if name not in self.parts:

            def repeated(ids: torch.Tensor | None) -> torch.Tensor | None:
                return None if ids is None else ids.repeat_interleave(pieces, dim=1)

            conditions = {key: ids if ids.dim() == 1 else repeated(ids) for key, ids in self.condition_ids.items()}
            part = RoutingContext(
                repeated(self.modality_ids), repeated(self.token_mask), repeated(self.input_ids), conditions
            )
            part.take_after(self)
            part.row_index, part.memory = self.row_index, self.memory
            self.parts[name] = part
        return self.parts[name]

    def in_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what reaches a layer as (B, S, d), the shape that the context describes."""
        return hidden_states

    def out_of_rows(self, output: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the output (B, S, d') of a layer in the shape of what has reached it."""
        return output.reshape(*like.shape[:-1], -1)

    def of_modalities(self, names: Sequence[str]) -> "RoutingContext":
        """Return the same context in which the tokens of these modalities alone are real."""
        part = copy.copy(self)
        chosen = is_one_of(self.modality_ids, [MODALITIES.index(name) for name in names])
        part.token_mask = self.token_mask & chosen.to(self.token_mask.device)
        return part

    def narrowed(self, name: str, chosen: torch.Tensor) -> "RoutingContext":
        """Return the part `name`, in which the `chosen` tokens (T,) alone are real, with decisions of its own."""
        part = self.parts[name] = copy.copy(self)
        part.token_mask = self.token_mask & chosen.view(self.token_mask.shape).to(self.token_mask.device)
        part.decisions, part.outputs, part.parts = {}, {}, {}
        return part

    def contexts(self) -> "list[RoutingContext]":
        """Return this context and those of its parts."""
        return [self, *(inner for part in self.parts.values() for inner in part.contexts())]

    def to_batch(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the mean of this context's row values in each of the `rows` of the batch, (rows,); 0 for none."""
        if self.row_index is None:
            return values
        index = self.row_index.to(values.device)
        total, count = (values.new_zeros(rows).index_add(0, index, item) for item in (values, torch.ones_like(values)))
        return total / count.clamp(min=1)

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
        if self.traced is not None and torch.compiler.is_compiling():
            return self.traced
        found = self.variable.get()
        # Nor does a part that is not compiled find another than the traced one, in a layer whose graph breaks there.
        return self.traced if found is None else found

    def set(self, context: Running | None) -> Any:
        if torch.compiler.is_compiling():
            previous, self.traced = self.traced, context
            return previous
        return self.variable.set(context)

    def restore(self, context: Running | None) -> None:
        """Go back to what was found before a call, whoever has set what since."""
        if torch.compiler.is_compiling():
            self.traced = context
        else:
            self.traced = None
            self.variable.set(context)

    def reset(self, token: Any) -> None:
        if isinstance(token, Token):  # where a graph broke, the other of the two calls may have been traced
            self.variable.reset(token)
        else:
            self.traced = token


# The context of the layer that is running, and of the call of the whole model.
ACTIVE_CONTEXT: TraceableVariable[RoutingContext] = TraceableVariable("hf_moe_routing_context")
CALL_CONTEXT: TraceableVariable[RoutingContext] = TraceableVariable("hf_moe_call_context")


def active_context(hidden_states: torch.Tensor) -> RoutingContext:
    """Return the context of the layer that is running; that of text alone in a call without one."""
    context = ACTIVE_CONTEXT.get()
    return RoutingContext.all_text(hidden_states) if context is None else context
