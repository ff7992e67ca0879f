"""Sparse upcycling: a MoE whose experts all start as the feed-forward they replace.

With router weights that sum to 1, equal experts give `sum_i w_i FFN(x) = FFN(x)`: the new model computes what the
dense one does. It does not where weights do not sum to 1 (a single slot, unnormalised top-k, empty slots) or where
experts are narrower than the feed-forward; it is then a starting point, not a copy.

Source: Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints, arXiv:2212.05055.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.block import Block
from ..modeling.decisions import ExpertAssignment
from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.experts.ffn import FfnExperts
from ..modeling.host_layers import FfnLayout, decoder_layers, ffn_name, read_ffn
from ..modeling.layer_spec import MoELayerSpec
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.parts import text_decoder
from ..modeling.routing_context import ACTIVE_CONTEXT, RoutingContext
from ..modeling.shared_experts import SharedExperts


def ffn_state(weights: Mapping[str, torch.Tensor], layout: FfnLayout) -> dict[str, torch.Tensor]:
    """Return a dense feed-forward as one expert: `gate_up_proj` (2f, d) or `up_proj` (f, d), `down_proj` (d, f), and
    the same with `_bias` where it has biases.

    Args:
        weights: the feed-forward's parameters by name, as its `state_dict()` or a checkpoint gives them.
        layout: how they are named, see [`read_ffn`].
    """

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


def take_neurons(state: dict[str, torch.Tensor], width: int, start: int = 0) -> dict[str, torch.Tensor]:
    """Return an expert of `width` inner neurons: those of `state` from `start` on, cyclically.

    The output projection is scaled by f / width, so that experts of 1/g of the width add up to the whole under uniform
    weights, and a width of n * f holds the feed-forward n times and computes the same.
    """
    full = state["down_proj"].shape[-1]
    if width == full:
        return state
    index = (torch.arange(width, device=state["down_proj"].device) + start) % full
    taken = {"down_proj": state["down_proj"][:, index] * (full / width)}
    for name, tensor in state.items():
        if name.startswith("gate_up_proj"):
            taken[name] = torch.cat([half[index] for half in tensor.chunk(2)])
        elif name.startswith("up_proj"):
            taken[name] = tensor[index]
        elif name == "down_proj_bias":
            taken[name] = tensor
    return taken


@torch.no_grad()
def fill_layer(layer: Block, state: dict[str, torch.Tensor], generator: torch.Generator, noise_std: float) -> None:
    """Fill a MoE layer from one feed-forward, see [`upcycle`].

    Args:
        state: the feed-forward as [`ffn_state`] returns it.

    Raises:
        ValueError: if the experts are no feed-forwards.
    """
    # A shared branch gives half of the output, the routed experts the other half; a residual mix weighs whole ones.
    branch = 1.0 if layer.shared_expert is None or layer.residual_mix is not None else 0.5
    banks = [module for module in layer.experts.modules() if isinstance(module, FfnExperts)]
    if not banks:
        raise ValueError(
            f"Experts of the class {type(layer.experts).__name__} cannot be copies of a feed-forward: choose the kind "
            "'ffn'."
        )
    for bank in banks:
        for expert in range(bank.num_experts):
            source = take_neurons(state, bank.intermediate_dim, expert * bank.intermediate_dim)
            for name, tensor in source.items():
                # One tensor at a time: a stack of the whole bank would double the memory.
                target = getattr(bank, name)[expert]
                target.copy_(tensor * branch if name.startswith("down_proj") else tensor)
                if noise_std > 0.0:
                    noise = torch.randn(target.shape, generator=generator) * noise_std * tensor.float().std().cpu()
                    target += noise.to(target)
    if layer.shared_expert is not None:
        _fill_shared(layer.shared_expert, state, branch)


def _fill_shared(shared: SharedExperts, state: dict[str, torch.Tensor], branch: float) -> None:
    source = take_neurons(state, shared.down_proj.in_features)
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        if f"down_proj{suffix}" not in source:
            continue
        if shared.gated:
            gate, up = source[f"gate_up_proj{suffix}"].chunk(2)
            getattr(shared.gate_proj, kind).copy_(gate)
        else:
            up = source[f"up_proj{suffix}"]
        getattr(shared.up_proj, kind).copy_(up)
        getattr(shared.down_proj, kind).copy_(source[f"down_proj{suffix}"] * branch)


def copy_host(model: HfMoeForConditionalGeneration, dense: PreTrainedModel) -> None:
    """Copy what the two models share: attention, norms, embeddings, head, and the feed-forwards that stay dense.

    Raises:
        ValueError: if the models do not fit together, or the host's head has a bias, which this model's has not.
    """
    language_model = text_decoder(model)
    layers = decoder_layers(language_model)
    replaced = tuple(
        f"{name}.{ffn_name(layer)}."
        for name, layer in language_model.named_modules()
        if layer in set(layers) and isinstance(getattr(layer, ffn_name(layer)), Block)
    )
    source = {name: tensor for name, tensor in dense.base_model.state_dict().items() if not name.startswith(replaced)}
    target = {name: tensor for name, tensor in language_model.state_dict().items() if not name.startswith(replaced)}
    head = dense.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(dense).__name__} has a head with a bias, which this model's head has no place for.")
    source["lm_head"], target["lm_head"] = head.weight, model.lm_head.weight
    differing = {name for name in source.keys() | target.keys() if _shape(source, name) != _shape(target, name)}
    if differing:
        examples = [f"{name}: {_shape(source, name)} -> {_shape(target, name)}" for name in sorted(differing)[:3]]
        raise ValueError(
            f"The config's host does not fit {type(dense).__name__}: {len(differing)} parameters differ, for example "
            f"{'; '.join(examples)}. Build the model with text_config=dense.config."
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _shape(tensors: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def upcycle(
    model: HfMoeForConditionalGeneration, dense: PreTrainedModel, noise_std: float = 0.0, seed: int = 0
) -> None:
    """Fill `model` from a dense decoder: every expert of a layer becomes the feed-forward that it replaces.

    Experts narrower than the feed-forward take consecutive slices of its inner neurons. With shared experts, the
    shared branch and the routed experts give half of the output each.

    Args:
        model: the MoE to fill, in place; its `text_config` is the dense model's.
        dense: the host's own `ForCausalLM`.
        noise_std: noise on the routed experts, relative to the standard deviation of each matrix.
        seed: seed of the noise.

    Raises:
        ValueError: if the models do not fit together, if the experts are no feed-forwards, or if the host is a MoE
            already.
    """
    copy_host(model, dense)
    generator = torch.Generator().manual_seed(seed)
    layers = decoder_layers(dense.base_model)
    for layer_idx, layer in model.moe_layers().items():
        ffn = getattr(layers[layer_idx], ffn_name(layers[layer_idx]))
        layout = read_ffn(ffn).layout
        if layout is None:
            raise ValueError(f"Layer {layer_idx} of {type(dense).__name__} is a MoE already: use adopt().")
        fill_layer(layer, ffn_state(dict(ffn.named_parameters()), layout), generator, noise_std)


@torch.no_grad()
def logit_difference(model: HfMoeForConditionalGeneration, dense: PreTrainedModel, seed: int = 0) -> float:
    """Return the largest difference between the two models' logits on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(dense.config.get_text_config().vocab_size, (2, 16), generator=generator)
    logits = [part(input_ids=ids.to(part.device)).logits.float().cpu() for part in (model.eval(), dense.eval())]
    return (logits[0] - logits[1]).abs().max().item()


def check_host_logits(model: HfMoeForConditionalGeneration, dense: PreTrainedModel, atol: float = 1e-4) -> None:
    """Refuse a host that this library would change, whatever the router does.

    Two comparisons: the model with the host's own feed-forwards put back must have the host's logits (embeddings,
    layers, head), and an expert that holds a feed-forward must compute what it does.

    Args:
        model: a model that [`upcycle`] or an adoption has filled.
        dense: the host's own `ForCausalLM`.
        atol: largest difference; float32 rounding stays below 1e-5, bf16 needs about 1e-1.

    Raises:
        ValueError: with the difference.
    """
    name = type(dense).__name__
    ours, theirs = decoder_layers(text_decoder(model)), decoder_layers(dense.base_model)
    moe_layers = model.moe_layers()
    ffns = {layer_idx: getattr(theirs[layer_idx], ffn_name(theirs[layer_idx])) for layer_idx in moe_layers}
    for layer_idx, ffn in ffns.items():
        if read_ffn(ffn).layout is not None:
            check_expert(model, moe_layers[layer_idx], ffn)
    try:
        for layer_idx, ffn in ffns.items():
            setattr(ours[layer_idx], ffn_name(ours[layer_idx]), ffn)
        difference = logit_difference(model, dense)
    finally:
        for layer_idx, moe_layer in moe_layers.items():
            setattr(ours[layer_idx], ffn_name(ours[layer_idx]), moe_layer)
    if difference > atol:
        raise ValueError(
            f"{name} cannot host MoE layers: its own logits differ by {difference:.1e} from those of its layers under "
            "this library's head."
        )


@torch.no_grad()
def check_expert(model: HfMoeForConditionalGeneration, layer: Block, ffn: nn.Module) -> None:
    """Refuse a dense feed-forward that is more than its projections and activation: no expert computes what it does.

    Raises:
        ValueError: with the difference, on random hidden states.
    """
    host = read_ffn(ffn)
    assert host.layout is not None, "of a dense feed-forward"
    spec = replace(layer.spec, num_experts=1, expert_intermediate_size=host.intermediate_size, banks=())
    weight = next(ffn.parameters())
    with torch.device(weight.device):
        expert = FfnExperts(model.config, spec).to(weight.dtype)
    for name, tensor in ffn_state(dict(ffn.named_parameters()), host.layout).items():
        getattr(expert, name)[0].copy_(tensor)
    pair = (ffn, _Alone(expert), spec.hidden_size, weight)
    difference = torch.cat([_differences(*pair, scale) for scale in (1.0, _large(weight))]).max().item()
    if not difference <= _tolerance(weight):
        raise ValueError(
            f"{type(ffn).__name__} cannot become a MoE layer: an expert that holds the feed-forward of layer "
            f"{spec.layer_idx} differs from it by {difference:.1e}; it does more than its projections and activation."
        )


@torch.no_grad()
def check_block(layer: Block, block: nn.Module, branches: Mapping[str, str] | None = None) -> None:
    """Refuse a host's MoE block that computes something else than the layer which has taken over its weights.

    Args:
        branches: paths of the parts that compute alone, in the block and in the layer, see [`BlockReading`]. They are
            compared on large hidden states too, where a clamp shows; a gate's scores would only tie there.

    Raises:
        ValueError: with the difference, on random hidden states.
    """
    weight = next(block.parameters())
    width = layer.spec.hidden_size
    whole = _differences(*_of_both_kinds(block, layer), width, weight)  # (16,)
    # In low precision hosts round the logits of their gates, which ours do not: some tokens find other experts.
    most = whole.max() if weight.dtype == torch.float32 else whole.quantile(0.75)
    differences = {"the block": most.item()}
    for path, own in (branches or {}).items():
        theirs, ours = block.get_submodule(path), layer.get_submodule(own)
        if isinstance(ours, SharedExperts):
            theirs, ours = theirs, _Ungated(ours)
        else:
            theirs, ours = _Assigned(theirs, layer.spec), _Assigned(ours, layer.spec)
        differences[path] = _differences(theirs, ours, width, weight, _large(weight)).max().item()
    part, difference = max(differences.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    if not difference <= _tolerance(weight):
        raise ValueError(
            f"{type(block).__name__} cannot be adopted: the MoE layer that holds the weights of layer "
            f"{layer.layer_idx} differs from it by {difference:.1e} in {part}; it does more than a top-k gate and "
            "gated experts do. Choose another decoder."
        )


def _of_both_kinds(block: nn.Module, layer: Block) -> tuple[nn.Module, nn.Module]:
    """Return the two such that every other token is one of an image, where they have banks for these."""
    return (_EveryOtherImage(block), _EveryOtherImage(layer)) if layer.spec.banks else (block, layer)


class _EveryOtherImage(nn.Module):
    """A block with a bank for text and one for vision: every other token is of an image."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: torch.Tensor) -> Any:
        kinds = (torch.arange(hidden_states.shape[1], device=hidden_states.device) % 2)[None]  # (1, S)
        if not isinstance(self.block, Block):
            return self.block(hidden_states, kinds)
        token = ACTIVE_CONTEXT.set(RoutingContext(kinds, torch.ones_like(kinds, dtype=torch.bool)))
        try:
            return self.block(hidden_states)
        finally:
            ACTIVE_CONTEXT.reset(token)


class _Assigned(nn.Module):
    """A stack of experts, each of which sees some tokens."""

    def __init__(self, experts: nn.Module, spec: MoELayerSpec):
        super().__init__()
        self.experts = experts
        self.slots = spec.num_experts_per_tok

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, -2)  # (T, d)
        index = torch.arange(len(rows) * self.slots, device=rows.device).view(len(rows), -1)
        weight = torch.full_like(index, 1.0 / self.slots, dtype=rows.dtype)
        return self.experts(rows, index % self.experts.down_proj.shape[0], weight).view_as(hidden_states)


class _Ungated(nn.Module):
    """A shared branch without the gate on its output."""

    def __init__(self, shared: SharedExperts):
        super().__init__()
        self.shared = shared

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.shared.feed_forward(hidden_states)


class _Alone(nn.Module):
    """An expert as a feed-forward: every token goes to it, with weight 1."""

    def __init__(self, experts: FfnExperts):
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, -2)  # (T, d)
        index = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        assignment = ExpertAssignment(index, torch.ones_like(index, dtype=rows.dtype), num_experts=1)
        return self.experts(rows, assignment).view(*hidden_states.shape[:-1], -1)


def _tolerance(weight: torch.Tensor) -> float:
    return 1e-4 if weight.dtype == torch.float32 else 1e-1


def _large(weight: torch.Tensor) -> float:
    """Return by how much hidden states are scaled to reach a clamp; float16 has no room for their products."""
    return 1.0 if weight.dtype == torch.float16 else 100.0


def _differences(
    theirs: nn.Module, ours: nn.Module, width: int, weight: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Return the largest difference of two modules' outputs for each of 16 random tokens, (16,).

    It is relative to the token's largest output: two kernels round in proportion to what they sum.
    """
    hidden = scale * torch.randn(1, 16, width, generator=torch.Generator().manual_seed(0)).to(weight)
    with evaluation_mode(theirs), evaluation_mode(ours):
        outputs = [module(hidden) for module in (theirs, ours)]
    # A block may return its logits too, and its tokens as one row each.
    expected, found = (
        (output[0] if isinstance(output, tuple) else output).float().view(hidden.shape[1], -1) for output in outputs
    )
    largest = expected.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (found - expected).abs().amax(-1) / largest
