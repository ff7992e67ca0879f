"""What the frozen towers and connectors of a host give, computed once per image or video and kept on disk."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate.utils import recursively_apply
from peft import PeftModel
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.parts import host_parts
from .feature_files import fingerprint, read_whole, write_whole
from .host_inputs import HostInputs, HostRow
from .placeholders import NOUNS, media_tokens
from .row_images import pixel_key
from .rows import describe_row, row_media, row_named
from .tokenisation import ConversationTokenizer


ENCODED_KINDS = ("image", "video")  # what a forward takes encoded, in `mm_encoder_outputs`
POOLED = "pooler_output"  # a tensor, or one of each image; other fields are lists of either, by layer
HOW_WITHOUT = "train without the cache, in a recipe by keep_features: false"
Kept: TypeAlias = dict[str, Any]


class HostFeatures:
    """What a host makes of each image and each video, by its content."""

    def __init__(self, outputs: dict[bytes, Kept], inputs: dict[str, tuple[str, ...]], dtype: torch.dtype):
        self.outputs = outputs  # by the key of what has been opened
        self.inputs = inputs  # of each kind that is kept, the names that a batch then has no more
        self.dtype = dtype  # of the model

    def __len__(self) -> int:
        return len(self.outputs)

    @classmethod
    def build(
        cls, model: Any, processor: ProcessorMixin, rows: Iterable[dict[str, Any]], folder: Path, dtype: torch.dtype
    ) -> "HostFeatures":
        """Encode each distinct image and video of `rows` once, or read what an earlier run has left.

        The host must take encoded images, and freeze all on their way; what it makes of one depends on no other.
        """
        kinds = [kind for kind in ENCODED_KINDS if kind in media_tokens(processor)]
        host = HostInputs(processor, ConversationTokenizer(processor, train=False))
        found = _distinct(host, rows, kinds)
        inputs = {kind: _inputs(model, kind) for kind in sorted({kind for kind, *_ in found.values()})}
        path = folder / f"{_fingerprint(model, processor, dtype, found)}.safetensors"
        outputs = read_whole(path, _read)
        if outputs is None:
            with evaluation_mode(model):
                outputs = _encode_all(model, host, found, dtype)
            tensors = _tensors({key.hex(): kept for key, kept in outputs.items()})
            write_whole(path, {name: tensor.contiguous() for name, tensor in tensors})
        return cls(outputs, inputs, model.dtype)

    def replace(self, rows: list[HostRow], named: Callable, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch of opened rows with features in place of pixels, `named` as in [`HostInputs`]."""
        kept: dict[str, list[Kept]] = {kind: [] for kind in ENCODED_KINDS}
        for index, row in enumerate(rows):
            for kind, items in zip(ENCODED_KINDS, (row.images, row.videos), strict=True):
                for position, item in enumerate(items):
                    kept[kind].append(named(index, self._find, kind, position, item))
        outputs = {kind: _output(_joined(found), self.dtype) for kind, found in kept.items() if found}
        return replaced(batch, outputs, self.inputs)

    def _find(self, kind: str, position: int, item: Any) -> Kept:
        found = self.outputs.get(opened_key(kind, item))
        if found is None:
            raise ValueError(
                f"has {kind} {position}, which is not in the feature cache of {len(self)} images and videos: it is "
                "new or has changed. Build the cache from all rows."
            )
        return found


def replaced(
    batch: dict[str, Any], outputs: dict[str, ModelOutput], inputs: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Return a batch with encoded images or videos in place of their pixels; grids of patches tell positions too."""
    gone = {name for kind in outputs for name in inputs[kind] if name.startswith("pixel")}
    rest = {name: value for name, value in batch.items() if name not in gone}
    return {**rest, "mm_encoder_outputs": outputs} if outputs else rest


def without_sight(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with zeros for what the model makes of its images and videos."""
    inputs = {kind: _inputs(model, kind) for kind in ENCODED_KINDS if hasattr(_base(model), f"get_{kind}_features")}
    seen = {kind: dict(output) for kind, output in batch.get("mm_encoder_outputs", {}).items()}
    for kind, names in inputs.items():
        if any(name.startswith("pixel") and name in batch for name in names):
            seen[kind] = encode(model, kind, batch)
    outputs = {kind: _output(recursively_apply(torch.zeros_like, kept), model.dtype) for kind, kept in seen.items()}
    if not outputs and any(name.startswith("input_features") for name in batch):
        raise ValueError("zero_images leaves sounds as they are, and these rows have no images or videos.")
    return replaced(batch, outputs, inputs)


def encode(model: Any, kind: str, batch: dict[str, Any]) -> Kept:
    """Return the fields of what a host makes of the images or videos of a batch."""
    given = {name: batch[name].to(model.device) for name in _inputs(model, kind) if name in batch}
    output = getattr(_base(model), f"get_{kind}_features")(**given, return_dict=True)
    fields = {name: value for name, value in output.items() if name == POOLED or name.startswith("deepstack")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def opened_key(kind: str, item: Any) -> bytes:
    """Return a digest of an opened image, or of the frames of a video and when they were seen."""
    if kind == "image":
        return pixel_key(item)
    frames, known = item
    seen = f"{kind} {frames.shape} {known.fps} {list(known.frames_indices)}"
    return hashlib.sha256(seen.encode() + np.ascontiguousarray(frames).tobytes()).digest()


def _base(model: Any) -> Any:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model


def _inputs(model: Any, kind: str) -> tuple[str, ...]:
    """Return what a host encodes a kind from."""
    method = getattr(_base(model), f"get_{kind}_features", None)
    if method is None or "mm_encoder_outputs" not in inspect.signature(_base(model).forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no encoded {NOUNS[kind]} (mm_encoder_outputs), so their features cannot be "
            f"kept: {HOW_WITHOUT}."
        )
    return tuple(inspect.signature(method).parameters)


def _distinct(host: HostInputs, rows: Iterable[dict[str, Any]], kinds: list[str]) -> dict[bytes, tuple[str, str, Any]]:
    """Return by its key each image and video: its kind, how an error names it, and how the row holds it."""
    found: dict[bytes, tuple[str, str, Any]] = {}
    for index, row in enumerate(rows):
        with row_named(row, index, "dataset"):
            for kind in kinds:
                for item in row_media(row, kind):
                    opened = host.open(kind, [item])[0]
                    found.setdefault(opened_key(kind, opened), (kind, describe_row(row, index, "dataset"), item))
    return found


def _encode_all(
    model: Any, host: HostInputs, found: dict[bytes, tuple[str, str, Any]], dtype: torch.dtype
) -> dict[bytes, Kept]:
    outputs: dict[bytes, Kept] = {}
    checked: set[str] = set()
    for key, (kind, named, item) in tqdm(found.items(), desc="Features", unit="item"):
        try:
            batch = _batch(host, kind, [item])
            if kind not in checked:
                _check_frozen(model, kind, batch)
                _check_alone(model, host, kind, [other for one, _, other in found.values() if one == kind][:2])
                checked.add(kind)
            with torch.no_grad():
                kept = encode(model, kind, batch)
        except ValueError as error:
            raise ValueError(f"{named} has {kind}s whose features cannot be kept. {error}") from error
        outputs[key] = recursively_apply(lambda tensor: tensor.to("cpu", dtype), kept)
        if not all(tensor.isfinite().all() for _, tensor in _tensors(outputs[key])):
            raise ValueError(f"The features of the host do not fit {dtype}: pass dtype=torch.bfloat16 or float32.")
    return outputs


def _batch(host: HostInputs, kind: str, items: list[Any]) -> dict[str, torch.Tensor]:
    messages = [{"role": "user", "content": [{"type": kind}] * len(items)}]
    rows = [{"messages": messages, f"{kind}s": items}]
    return host(rows, lambda _, step, *given: step(*given), lambda tokens, _: tokens)


def _check_frozen(model: Any, kind: str, batch: dict[str, Any]) -> None:
    with torch.enable_grad():
        kept = encode(model, kind, batch)
    if any(tensor.requires_grad for _, tensor in _tensors(kept)):
        parts = host_parts(model)
        trained = [name for name, value in model.named_parameters() if value.requires_grad and parts.holder(name)]
        raise ValueError(
            f"Features can be kept only of frozen towers and connectors, and of those of {NOUNS[kind]} "
            f"{', '.join(trained[:3]) or 'some'} are trainable: freeze them, or {HOW_WITHOUT}."
        )


def _check_alone(model: Any, host: HostInputs, kind: str, items: list[Any]) -> None:
    """Refuse a host whose features of one image depend on the others."""
    with torch.no_grad():
        together = encode(model, kind, _batch(host, kind, items))
        joined = _joined([encode(model, kind, _batch(host, kind, [item])) for item in items])
    for name, value in together.items():
        pair = (value, joined[name])
        first, second = (torch.cat([tensor.flatten(0, -2) for _, tensor in _tensors(given)]) for given in pair)
        if first.shape != second.shape or not torch.allclose(first, second, atol=1e-3, rtol=1e-2):
            raise ValueError(
                f"{type(model).__name__} makes other features ({name}) of two {NOUNS[kind]} together than of each "
                f"alone: {HOW_WITHOUT}."
            )


def _output(kept: Kept, dtype: torch.dtype) -> ModelOutput:
    output = BaseModelOutputWithPooling()
    for name, value in kept.items():  # hosts have fields beyond those of this class
        output[name] = recursively_apply(lambda tensor: tensor.to(dtype), value)
    return output


def _joined(outputs: list[Kept]) -> Kept:
    """Return the fields of several images as the host gives them of all at once."""
    fields: Kept = {}
    for name in outputs[0]:
        values = [kept[name] for kept in outputs]
        fields[name] = _concatenated(values) if name == POOLED else list(map(_concatenated, zip(*values, strict=True)))
    return fields


def _concatenated(values: Any) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return [tensor for value in values for tensor in value]


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors of nested dicts and lists, by the path of their keys and places."""
    if isinstance(value, torch.Tensor):
        yield name, value
    else:
        for place, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{name}/{place}" if name else f"{place}")


def _fingerprint(model: Any, processor: ProcessorMixin, dtype: torch.dtype, keys: Iterable[bytes]) -> str:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = host_parts(base)
    settings = [type(base).__qualname__, str(dtype), processor.to_dict()]
    return fingerprint(settings, (item for item in base.state_dict().items() if parts.holder(item[0])), keys)


def _read(path: Path) -> dict[bytes, Kept]:
    """Return what was written as tensors by the path of their keys and places."""
    nested: dict[str, Any] = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            *places, last = name.split("/")
            held = nested
            for place in places:
                held = held.setdefault(place, {})
            held[last] = file.get_tensor(name)

    def listed(value: Any) -> Any:
        return value if isinstance(value, torch.Tensor) else [listed(value[str(place)]) for place in range(len(value))]

    return {bytes.fromhex(key): {name: listed(value) for name, value in kept.items()} for key, kept in nested.items()}
