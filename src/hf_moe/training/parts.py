"""The parts of a model, for freezing and training them by name."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from hashlib import blake2b

import torch
from torch import nn


PARTS = ("vision_tower", "connector", "routers", "experts", "embeddings", "backbone")


def part_of(name: str) -> str:
    """Return the part that a parameter of a `HfMoeForConditionalGeneration` belongs to.

    `routers` are the gates and the residual mixes, `experts` the routed and the shared ones, `embeddings` the token
    embeddings and the head, `backbone` everything else of the decoder.
    """
    if "vision_tower." in name:
        return "vision_tower"
    if "connector." in name:
        return "connector"
    if ".gate." in name or ".residual_mix." in name:
        return "routers"
    if ".experts." in name or ".shared_expert." in name:
        return "experts"
    if ".embed" in name or ".wte." in name or name.startswith("lm_head."):
        return "embeddings"
    return "backbone"


def selects(selector: str, name: str, part: str) -> bool:
    """Whether `"<part>"` or `"<part>/<pattern of the last component>"` selects a parameter of that part."""
    wanted, _, pattern = selector.partition("/")
    return wanted == part and fnmatchcase(name.rpartition(".")[2], pattern or "*")


def train_only(model: nn.Module, parts: Iterable[str], experts: Collection[str] = ()) -> dict[str, int]:
    """Make exactly the named parts trainable, whatever was trained before, and return the parameters of each.

    What no gradient can reach stays frozen: parameters that the model says are unreachable, and quantised ones.

    Args:
        parts: names of [`PARTS`], or `"routers/importance_*"` for those parameters of a part.
        experts: parameters of a dense model that count as `experts`, being those of an expert-to-be.

    Raises:
        ValueError: if a part is unknown.
    """
    wanted = set(parts)
    unknown = {part for part in wanted if part.partition("/")[0] not in PARTS}
    if unknown:
        raise ValueError(f"Unknown parts {sorted(unknown)}: allowed are {', '.join(PARTS)}, each with /pattern.")
    unreachable = {
        id(module.get_parameter(name))
        for module in model.modules()
        for name in getattr(module, "unreachable_parameters", ())
    }
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = "experts" if name in experts else part_of(name)
        chosen = any(selects(selector, name, part) for selector in wanted)
        parameter.requires_grad_(chosen and parameter.is_floating_point() and id(parameter) not in unreachable)
        if parameter.requires_grad:
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def fingerprints(model: nn.Module) -> dict[str, bytes]:
    """Return a digest of every parameter's bits."""
    digests = {}
    for name, parameter in model.named_parameters():
        bits = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digests[name] = blake2b(bits, digest_size=16).digest()
    return digests


def moved_parameters(model: nn.Module, before: dict[str, bytes]) -> tuple[list[str], list[str]]:
    """Return the trainable parameters that are what they were when `before` was taken, and the frozen that are not."""
    after = fingerprints(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unmoved = [name for name in after if name in trainable and after[name] == before[name]]
    return unmoved, [name for name in after if name not in trainable and after[name] != before[name]]


def refuse_strayed(strayed: list[str]) -> None:
    """Refuse a training that moved frozen parameters.

    Raises:
        RuntimeError: if there are any.
    """
    if strayed:
        raise RuntimeError(
            f"{len(strayed)} frozen parameters moved in training, for example {', '.join(strayed[:3])}: something "
            "besides the optimizer writes to them."
        )
