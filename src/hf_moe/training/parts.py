"""The parts of a model, for freezing and training them by name."""

from collections.abc import Iterable

from torch import nn


PARTS = ("vision_tower", "connector", "routers", "experts", "embeddings", "backbone")


def part_of(name: str) -> str:
    """Return the part that a parameter of a `HfMoeForConditionalGeneration` belongs to.

    `routers` are the gates, `experts` the routed and the shared ones, `embeddings` the token embeddings and the head,
    `backbone` everything else of the decoder.
    """
    if "vision_tower." in name:
        return "vision_tower"
    if "connector." in name:
        return "connector"
    if ".gate." in name:
        return "routers"
    if ".experts." in name or ".shared_expert." in name:
        return "experts"
    if ".embed" in name or ".wte." in name or name.startswith("lm_head."):
        return "embeddings"
    return "backbone"


def train_only(model: nn.Module, parts: Iterable[str]) -> dict[str, int]:
    """Make exactly the named parts trainable and return the trainable parameters of each.

    Parameters that the model froze at its construction, because no gradient can reach them, stay frozen.

    Raises:
        ValueError: if a part is unknown.
    """
    wanted = set(parts)
    if wanted - set(PARTS):
        raise ValueError(f"Unknown parts {sorted(wanted - set(PARTS))}: allowed are {', '.join(PARTS)}.")
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in wanted and parameter.requires_grad)
        if parameter.requires_grad:
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts
