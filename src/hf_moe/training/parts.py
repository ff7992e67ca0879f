"""The parts of a model, for freezing and training them by name."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b

import torch
from torch import nn

from ..modeling.parts import ENCODED, PARTS, HostParts, host_parts, part_of


# What older recipes call the tower, which was for images.
VISION_TOWER = "vision_tower"


@dataclass(frozen=True)
class Selector:
    """Which parameters a recipe means: `part`, `part/modality`, `part/pattern` or `part/modality/pattern`.

        tower               all towers, whatever the host calls them
        tower/audio         the tower that hears; connectors go by modality as well
        routers/importance_*  the parameters of routers whose own name fits the pattern
        experts/text.*      those of the bank `text`: a pattern with dots is for as many modules around them

    Attributes:
        part: of [`PARTS`].
        modality: of the tower or the connector; `None` for all.
        pattern: of the end of a parameter's name, as many components as it has.
    """

    part: str
    modality: str | None = None
    pattern: str = "*"

    @classmethod
    def read(cls, text: str) -> "Selector":
        """Return the selector that a recipe writes.

        Raises:
            ValueError: if there is no such part, or it has no modalities.
        """
        part, *rest = text.split("/")
        modality = rest.pop(0) if rest and rest[0] in ENCODED else None
        if part == VISION_TOWER:
            part, modality = "tower", modality or "image"
        if part not in PARTS or len(rest) > 1:
            raise ValueError(
                f"Unknown parts {[text]}: allowed are {', '.join(PARTS)}, each with /pattern of parameters' names; "
                f"tower and connector also with /{', /'.join(ENCODED)}."
            )
        if modality is not None and part not in ("tower", "connector"):
            raise ValueError(f"{text!r}: {part} has no part for {modality} alone, only tower and connector have.")
        return cls(part, modality, rest[0] if rest and rest[0] else "*")

    def selects(self, name: str, part: str, parts: HostParts) -> bool:
        """Whether a parameter of that part is meant."""
        end = ".".join(name.split(".")[-1 - self.pattern.count(".") :])
        if part != self.part or not fnmatchcase(end, self.pattern):
            return False
        holder = parts.holder(name)
        # A parameter on its own, such as LLaVA-NeXT's `image_newline`, serves whatever the connectors do.
        return self.modality is None or holder is None or self.modality in parts.modalities[holder]


def selects(selector: str, name: str, parts: HostParts) -> bool:
    """Whether a recipe's selector means a parameter of a model with those parts, see [`Selector`]."""
    return Selector.read(selector).selects(name, part_of(name, parts), parts)


def trained_parts(trainable: Iterable[str]) -> set[str]:
    """Return the parts, of [`PARTS`], that a recipe's selectors train in all or in part."""
    return {Selector.read(selector).part for selector in trainable}


def train_only(model: nn.Module, parts: Iterable[str], experts: Collection[str] = ()) -> dict[str, int]:
    """Make exactly the named parts trainable, whatever was trained before, and return the parameters of each.

    What no gradient can reach stays frozen: parameters that the model says are unreachable, and quantised ones.

    Args:
        parts: what to train, see [`Selector`]: `"connector"`, `"tower/audio"`, `"routers/importance_*"`.
        experts: parameters of a dense model that count as `experts`, being those of an expert-to-be.

    Raises:
        ValueError: if a part is unknown, or a modality is one that no tower of the model is for.
    """
    wanted = [Selector.read(text) for text in parts]
    places = host_parts(model)
    _check_modalities(wanted, places, type(model).__name__)
    unreachable = {
        id(module.get_parameter(name))
        for module in model.modules()
        for name in getattr(module, "unreachable_parameters", ())
    }
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = "experts" if name in experts else part_of(name, places)
        chosen = any(selector.selects(name, part, places) for selector in wanted)
        parameter.requires_grad_(chosen and parameter.is_floating_point() and id(parameter) not in unreachable)
        if parameter.requires_grad:
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _check_modalities(wanted: list[Selector], places: HostParts, model: str) -> None:
    """Refuse `tower/audio` of a model that sees and does not hear."""
    for selector in wanted:
        paths = places.towers if selector.part == "tower" else places.connectors
        known = {modality for path in paths for modality in places.modalities[path]}
        if paths and selector.modality is not None and selector.modality not in known:
            raise ValueError(
                f"{selector.part}/{selector.modality}: {model} has a {selector.part} for "
                f"{' and '.join(item for item in ENCODED if item in known)} alone."
            )


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
