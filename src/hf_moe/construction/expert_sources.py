"""Construction sources: what the experts of a MoE layer are made of, one method per file of `sources/`.

A method is handed the feed-forwards of one layer, of one trained model or several, and gives every expert its first
weights. Feed-forwards and experts have the same form, a `State`: `gate_up_proj` (2f, d) with the gate first, or
`up_proj` (f, d), and `down_proj` (d, f), each with `_bias` where it has biases.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..configuration.checks import checked_options, unknown_name_message
from ..modeling.block import Block
from ..modeling.host_layers import FfnLayout, read_ffn
from ..modeling.shared_experts import SharedExperts
from . import sources


State = dict[str, torch.Tensor]


class ExpertSource:
    """Base of the methods; options are the keyword arguments of a method's constructor.

    Args:
        seed (`int`, *optional*, defaults to 0): of everything that is drawn.
        noise_std (`float`, *optional*, defaults to 0.0): noise on every expert, relative to the standard deviation of
            each matrix.
    """

    # Whether an expert as wide as its feed-forward computes what that does, without noise.
    exact = False
    # How much of a feed-forward's output routed experts give beside a shared branch that gives all of it; `None`: half
    # each, so that they add up to the feed-forward.
    beside: float | None = None

    def __init__(self, seed: int = 0, noise_std: float = 0.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.noise_std = noise_std

    def expert(self, parents: Sequence[State], expert: int, width: int) -> State:
        """Return the weights of one expert.

        Args:
            parents (`Sequence[State]`): the feed-forwards of the layer, one of each trained model.
            expert (`int`): its number in the layer.
            width (`int`): how many inner neurons it has.
        """
        raise NotImplementedError(f"{type(self).__name__} must define expert(parents, expert, width).")


def source_names() -> list[str]:
    """Return the names of all methods."""
    return sorted(module.name for module in pkgutil.iter_modules(sources.__path__))


def source_class(name: str) -> type[ExpertSource]:
    """Return the class of a method.

    Raises:
        ValueError: if there is none of that name, with the nearest.
    """
    if name not in source_names():
        raise ValueError(unknown_name_message("construction source", name, source_names()))
    return importlib.import_module(f"{sources.__name__}.{name}").METHOD


def build_source(source: str | Mapping[str, Any], seed: int = 0, noise_std: float = 0.0) -> ExpertSource:
    """Return a method from its name, or from `{name: ..., option: value}`.

    Raises:
        ValueError: if there is no such method or option, with the nearest.
    """
    options = {"name": source} if isinstance(source, str) else dict(source)
    name = options.pop("name", "")
    cls = source_class(name)
    return cls(seed, noise_std, **checked_options("construction source", name, cls, options, leading=2))


def ffn_state(weights: Mapping[str, torch.Tensor], layout: FfnLayout) -> State:
    """Return a dense feed-forward, by the names that its `state_dict()` or a checkpoint has, as one expert."""

    def of(projection: str, kind: str) -> torch.Tensor:
        tensor = weights[f"{projection}.{kind}"]
        return tensor.t() if layout.transposed and kind == "weight" else tensor

    name = "gate_up_proj" if layout.fused or layout.gate is not None else "up_proj"
    state = {}
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        if f"{layout.down}.{kind}" not in weights:
            continue
        up = of(layout.up, kind)
        state[name + suffix] = up if layout.gate is None else torch.cat([of(layout.gate, kind), up])
        state["down_proj" + suffix] = of(layout.down, kind)
    return state


def feed_forward_state(ffn: nn.Module) -> State:
    """Return a dense feed-forward of a host as one expert.

    Raises:
        ValueError: if it is a MoE block.
    """
    layout = read_ffn(ffn).layout
    if layout is None:
        raise ValueError(f"A {type(ffn).__name__} holds experts, and is no feed-forward that experts can start from.")
    return ffn_state(dict(ffn.named_parameters()), layout)


def pick_neurons(state: State, index: torch.Tensor) -> State:
    """Return an expert of some of the inner neurons of a feed-forward, `index` (width,); one may occur several times.

    The output projection is scaled by f / width, so that experts of 1/g of the width add up to the whole under uniform
    weights, and a width of n * f that holds the feed-forward n times computes the same.
    """
    full = state["down_proj"].shape[-1]
    index = index.to(state["down_proj"].device)
    picked = {"down_proj": state["down_proj"][:, index] * (full / len(index))}
    for name, tensor in state.items():
        if name.startswith("gate_up_proj"):
            picked[name] = torch.cat([half[index] for half in tensor.chunk(2)])
        elif name.startswith("up_proj"):
            picked[name] = tensor[index]
        elif name == "down_proj_bias":
            picked[name] = tensor
    return picked


def take_neurons(state: State, width: int, start: int = 0) -> State:
    """Return an expert of the `width` inner neurons of a feed-forward from `start` on, cyclically."""
    full = state["down_proj"].shape[-1]
    return state if width == full else pick_neurons(state, (torch.arange(width) + start) % full)


@torch.no_grad()
def fill_layer(layer: Block, parents: Sequence[State], source: ExpertSource) -> bool:
    """Fill a MoE layer from the feed-forwards of one layer; its shared branch is a copy of the first of them.

    With a shared branch, that and the routed experts give half of the output each, unless a residual mix weighs them
    or the source says what the experts give beside the whole branch.

    Returns:
        Whether the experts and the branch compute what the feed-forward did.

    Raises:
        ValueError: if the experts are of a kind that cannot start as feed-forwards.
    """
    added = layer.shared_expert is not None and layer.residual_mix is None
    routed = branch = 1.0
    if added:
        routed, branch = (0.5, 0.5) if source.beside is None else (source.beside, 1.0)
    equal = layer.experts.take(_states(layer.experts.widths, parents, source, routed))
    widths = list(layer.experts.widths)
    if layer.shared_expert is not None:
        widths.append(layer.shared_expert.down_proj.in_features)
        _fill_shared(layer.shared_expert, take_neurons(parents[0], widths[-1]), branch)
    full = parents[0]["down_proj"].shape[-1]
    exact = source.exact and source.noise_std == 0.0 and len(parents) == 1 and not (added and routed + branch != 1.0)
    return equal and exact and all(width % full == 0 for width in widths)


def _states(widths: Sequence[int], parents: Sequence[State], source: ExpertSource, scale: float) -> Iterator[State]:
    """Yield the weights of one expert after the other: a stack of them all would double the memory."""
    for expert, width in enumerate(widths):
        state = {}
        for name, tensor in source.expert(parents, expert, width).items():
            state[name] = tensor * scale if scale != 1.0 and name.startswith("down_proj") else tensor
            if source.noise_std > 0.0:
                noise = torch.randn(tensor.shape, generator=source.generator, device="cpu").to(tensor.device)
                state[name] = state[name] + (noise * source.noise_std * tensor.float().std()).to(tensor.dtype)
        yield state


def _fill_shared(shared: SharedExperts, state: State, branch: float) -> None:
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        if f"down_proj{suffix}" not in state:
            continue
        if shared.gated:
            gate, up = state[f"gate_up_proj{suffix}"].chunk(2)
            getattr(shared.gate_proj, kind).copy_(gate)
        else:
            up = state[f"up_proj{suffix}"]
        getattr(shared.up_proj, kind).copy_(up)
        getattr(shared.down_proj, kind).copy_(state[f"down_proj{suffix}"] * branch)
