"""What stays float32, and how a model is split over devices: patterns of names that Transformers reads."""

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from .block import Block
from .replacement import Replacement
from .routing import Experts, Router, SharedPart


def float32_patterns(language_model: nn.Module) -> list[str]:
    """Return the patterns of the routers' tensors, which stay float32 in a model of lower precision.

    All but their tables and counts, which are no floats or of double precision: Transformers casts whatever a pattern
    names. The routers that a host keeps are its own affair.
    FSDP2 asks for names with a star for the number of the layer.
    """
    patterns = set()
    for name, module in language_model.named_modules():
        if not isinstance(module, Router | SharedPart):
            continue
        pattern = re.escape(name)
        if isinstance(module, Router):
            layer = module.spec.layer_idx
            pattern = re.sub(rf"\\\.{layer}\\\.", rf"\\.(?:{layer}|[^\\d.]+)\\.", pattern, count=1)
        others = [
            re.escape(n) for n, b in module.named_buffers() if b.dtype is torch.double or not b.is_floating_point()
        ]
        patterns.add(rf"{pattern}\b" + (rf"(?!\.({'|'.join(others)})$)" if others else ""))
    return sorted(patterns)


def plan_moe_layers(language_model: PreTrainedModel) -> None:
    """Name the parts of the MoE layers in the host's plans of tensor and expert parallelism.

    The rules name layers with a star for their number, so one holds in every layer that has such a part. Where layers
    differ, as an `experts` of feed-forwards and one of banks do, all experts are left whole. The host's rules for what
    no layer has any more are dropped.
    """
    names = {name for name, _ in [*language_model.named_modules(), *language_model.named_parameters()]}
    layers = {name: part for name, part in language_model.named_modules() if isinstance(part, Block)}
    experts = tuple({f"{_starred(name)}.experts" for name in layers})
    kept = {_starred(name) for name in names if not name.startswith(tuple(f"{name}." for name in layers))}
    replaced = {_starred(name) for name, part in language_model.named_modules() if isinstance(part, Replacement)}
    for kind in ("tp_plan", "ep_plan"):
        host_plan = getattr(language_model, kind)
        # Beside a projection that is another now all stays whole: an attention is split in all of its parts or none.
        whole = tuple({f"{name.rpartition('.')[0]}." for name in replaced if name in host_plan})
        plans = [{name: host_plan.get(name) for name in sorted(kept) if not name.startswith(whole)}]
        plans += [_layer_plan(_starred(name), layer, kind) for name, layer in layers.items()]
        plan = {name: style for own in plans for name, style in own.items() if style is not None}
        if any(plan.get(name) != style for own in plans for name, style in own.items() if name.startswith(experts)):
            plan = {name: style for name, style in plan.items() if not name.startswith(experts)}
        setattr(language_model, kind, plan)


def _layer_plan(name: str, layer: Block, kind: str) -> dict[str, str | None]:
    """Return the style of every part of a MoE layer, `None` where it stays whole."""
    parts = [part for part, _ in [*layer.named_modules(), *layer.named_parameters()] if part]
    plan: dict[str, str | None] = dict.fromkeys(parts)
    for path, experts in layer.named_modules():
        if isinstance(experts, Experts):
            plan |= {f"{path}.{part}".rstrip("."): style for part, style in experts.parallel_plans()[kind].items()}
    if kind == "tp_plan" and layer.shared_expert is not None:
        plan |= {f"shared_expert.{part}": style for part, style in layer.shared_expert.tp_plan().items()}
    return {f"{name}.{_starred(part)}": style for part, style in plan.items()}


def _starred(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
