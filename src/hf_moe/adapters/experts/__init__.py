"""Kinds of experts that an adapter can put on a target, one file each."""

from typing import Any

from ...configuration.checks import checked_options, unknown_name_message
from ..stacks import Target
from .base import ExpertKind, TargetCall
from .bottleneck import BottleneckExperts
from .ia3 import Ia3Experts
from .lora import LoraExperts
from .rank1_pairs import Rank1PairExperts
from .value_gate import ValueGateExperts


__all__ = ["EXPERT_KINDS", "ExpertKind", "TargetCall", "build_kind"]

EXPERT_KINDS: dict[str, type[ExpertKind]] = {
    "bottleneck": BottleneckExperts,
    "ia3": Ia3Experts,
    "lora": LoraExperts,
    "rank1_pairs": Rank1PairExperts,
    "value_gate": ValueGateExperts,
}


def build_kind(settings: dict[str, Any], target: Target) -> ExpertKind:
    """Return the kind of experts that `settings` (`name` and options) describes, for one target."""
    options = dict(settings)
    name = options.pop("name")
    if name not in EXPERT_KINDS:
        raise ValueError(unknown_name_message("kind of experts", name, list(EXPERT_KINDS)))
    return EXPERT_KINDS[name](target, **checked_options("experts", name, EXPERT_KINDS[name], options))
