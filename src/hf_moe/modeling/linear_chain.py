"""Linear layers with an activation between them, which connectors end with."""

from collections import OrderedDict
from itertools import pairwise

from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .gating import check_choice


def linear_chain(widths: list[int], act: str, bias: bool = True) -> nn.Sequential:
    """Return y = W_n act(... act(W_1 x)); two layers are a feed-forward, in whose place experts may stand.

    Args:
        widths (`list[int]`): of the input and of every layer's output.
        act (`str`): as in Transformers' `ACT2FN`.
        bias (`bool`, *optional*, defaults to `True`): whether the layers have biases.

    Raises:
        ValueError: if `act` is unknown.
    """
    check_choice("act", act, tuple(ACT2FN))
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate(pairwise(widths)):
        if number:
            chain[f"act_{number}"] = ACT2FN[act]
        chain[str(number)] = nn.Linear(before, after, bias=bias)
    return nn.Sequential(chain)


def initialize_linears(module: nn.Module, std: float) -> None:
    """Give the linear layers right in a module their first values."""
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            init.normal_(layer.weight, mean=0.0, std=std)
            if layer.bias is not None:
                init.zeros_(layer.bias)
