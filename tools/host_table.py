"""Writes docs/hosts.md: every multimodal model of Transformers, and whether it can become a MoE in place.

python tools/host_table.py

Every type is built on the meta device with few layers, its decoder is read, and a small copy of each of its
feed-forwards is compared with an expert. Nothing is downloaded.
"""

import copy
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from hf_moe import HfMoeConfig
from hf_moe.construction.adoption import read_blocks
from hf_moe.construction.block_checks import check_expert
from hf_moe.construction.refused_hosts import REFUSED
from hf_moe.modeling.host import layer_spec
from hf_moe.modeling.host_layers import decoder_layers, ffn_name, read_ffn
from hf_moe.modeling.inputs import placeholder_ids
from hf_moe.modeling.parts import host_parts, text_decoder


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "hosts.md"
MODALITIES = ("image", "video", "audio")
LAYERS = 4
# Width of the hidden states in small copies of feed-forwards.
HIDDEN = 16

FEW = {"num_hidden_layers": LAYERS}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What it takes to build those whose default config does not.
FIELDS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {
        "text_config": {
            **FEW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        }
    },
    "deepseek_ocr2": {"text_config": {**FEW, "mlp_layer_types": ["dense"] + ["sparse"] * 3, "num_experts_per_tok": 6}},
    "emu3": {"vocabulary_map": {"<image>": 8711}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0], "downsample_rate": "4/8"},
    "hunyuan_vl": {"text_config": {**FEW, "head_dim": 128}},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 1024, "img_size": [448, 448], "depth": 2},
        }
    },
    "qwen4_exp": {
        "text_config": {
            **FEW,
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        }
    },
}

INTRODUCTION = """\
# Hosts

Written from the code by `make docs`; edit `tools/host_table.py`, not this file.

A host is a model of Transformers that becomes a MoE in place: the feed-forwards of its decoder become experts, and
everything else (towers, connector, positions, masks, generation, processor) stays the host's own.

```python
from hf_moe import HfMoeForConditionalGeneration

model = HfMoeForConditionalGeneration.from_host("Qwen/Qwen2.5-VL-3B-Instruct", system="moiie")
```

These are the {count} multimodal types of Transformers {version} that write text. *Run end to end*: `tests/hosts`
builds a tiny model of it, compares it with the native one, trains it, generates with it, saves it, and opens it
without this package. The others are built without memory, their decoder is read, and a small copy of every kind of
feed-forward is compared with what replaces it. Text decoders are hosts too: any `...ForCausalLM` whose feed-forward is
a module of a known form, such as Llama, Qwen 3, Gemma 2, Granite, Cohere, Phi-3, GPT-NeoX and GPT-2.
"""
COLUMNS = "| Type | Class | Sees and hears | Run end to end | Note |\n|---|---|---|---|---|"
HEADINGS = {
    "supported": f"""\
## Dense hosts

Their feed-forwards become the first experts.

{COLUMNS}""",
    "adopted": f"""\

## MoE hosts

Their experts and their gate are taken over, and the model computes what it computed before. `convert_router` gives it
another router.

{COLUMNS}""",
    "refused": """\

## Refused

| Type | Why, and what to take |
|---|---|""",
}
LIMITS = """
## What routers are told

A router that looks at modalities knows text (0), images (1), videos (2) and sounds (3) by the ids that the host's
processor gives (`moe_mm_token_type_ids`, `mm_token_type_ids`), or else by the host's placeholders. Generated tokens
are text. Where that cannot tell two apart, give `mm_token_type_ids` of the shape of `input_ids` by hand:

- SmolVLM and InternVL write the frames of a video as images, and so they route.
- GLM-4V marks a video by its image placeholder too; its processor's `mm_token_type_ids` tell the two apart.
- Idefics and Voxtral Realtime write no placeholders: images and sounds enter beside the words, all tokens are text.
"""


@dataclass(frozen=True)
class HostRow:
    """What became of one type of model.

    Attributes:
        model_type, class_name: in Transformers.
        status: `"supported"`, a dense model whose feed-forwards become experts; `"adopted"`, a MoE that is taken over;
            `"refused"`; or `"unknown"`, which the code refuses and no one has explained.
        modalities: that its towers serve, or that its config has placeholders for.
        blocks: classes of its feed-forwards.
        note: a restriction, or why it is refused and what to take instead.
    """

    model_type: str
    class_name: str
    status: str
    modalities: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    note: str = ""


def model_types() -> dict[str, str]:
    """Return the multimodal types that write text, with the names of their classes."""
    speaking = {
        kind: name
        for kind, name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items()
        if "audio_config" in CONFIG_MAPPING[kind].sub_configs
    }
    return {
        **speaking,
        **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }


def survey(model_type: str) -> HostRow:
    """Return what becomes of one type of model."""
    class_name = model_types()[model_type]
    if model_type in REFUSED:
        refusal = REFUSED[model_type]
        return HostRow(model_type, class_name, "refused", note=f"{refusal.reason}. Take {refusal.instead}.")
    try:
        model = build(model_type, class_name)
        decoder = text_decoder(model)
        feed_forwards = [getattr(layer, ffn_name(layer)) for layer in decoder_layers(decoder)]
        blocks = read_blocks(decoder)
        differing = differing_layers(model, decoder, feed_forwards, set(blocks))
    except Exception as error:  # whatever keeps a new model from being built or read
        return HostRow(model_type, class_name, "unknown", note=f"{type(error).__name__}: {error}")
    if len(differing) == len(feed_forwards):
        return HostRow(model_type, class_name, "unknown", note="its feed-forwards do more than an expert")
    kinds = tuple(dict.fromkeys(type(module).__name__ for module in feed_forwards))
    notes = [] if blocks else [stay_dense(differing, len(feed_forwards))]
    notes.append(not_told_apart(model))
    status = "adopted" if blocks else "supported"
    return HostRow(model_type, class_name, status, modalities_of(model), kinds, "; ".join(filter(None, notes)))


def stay_dense(differing: set[int], layers: int) -> str:
    """Say which layers a dense host keeps."""
    if not differing:
        return ""
    rest = [index for index in range(layers) if index not in differing]
    chosen = f"from_{rest[0]}" if rest == list(range(rest[0], layers)) else str(rest)
    return f"`moe_config.layers: {chosen}`, for the feed-forwards of the others do more than an expert"


def not_told_apart(model: PreTrainedModel) -> str:
    """Say what routers are not told of, because the host writes no placeholders for it."""
    config = model.config
    named = {m for m in MODALITIES if hasattr(config, f"{m}_token_id") or hasattr(config, f"{m}_token_index")}
    missing = [modality for modality in served_by(model) if modality not in named]
    return f"no placeholder tells of {' or '.join(missing)}" if missing else ""


def build(model_type: str, class_name: str) -> PreTrainedModel:
    """Build a type of model without memory, with few layers where its config allows that."""
    cls, config = getattr(transformers, class_name), AutoConfig.for_model(model_type, **FIELDS.get(model_type, {}))
    text = config.get_text_config(decoder=True)
    few = copy.deepcopy(vars(text))
    for name, value in few.items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:LAYERS])
    text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
    with torch.device("meta"):
        try:
            return cls(config)
        except (IndexError, KeyError, TypeError, ValueError):  # layers that count on each other
            vars(text).update(few)
            return cls(config)


def differing_layers(
    model: PreTrainedModel, decoder: PreTrainedModel, feed_forwards: list[nn.Module], adopted: set[int]
) -> set[int]:
    """Return the dense layers whose feed-forward computes something else than an expert with its weights."""
    config = HfMoeConfig.on_host(model.config, type(model).__name__, moe_config={"layers": [0]})
    text = config.get_text_config(decoder=True)
    hidden, text.hidden_size = text.hidden_size, HIDDEN
    found, seen = set(), {}
    for index, module in enumerate(feed_forwards):
        if index in adopted:
            continue
        # Most layers are alike but for their index.
        kind = str([(key, value) for key, value in vars(module).items() if isinstance(value, float | str | bool)])
        if kind not in seen:
            small = small_copy(module, hidden)
            spec = layer_spec(config.moe_config, config.get_text_config(decoder=True), index, read_ffn(small))
            try:
                check_expert(SimpleNamespace(config=config), SimpleNamespace(spec=spec), small)  # type: ignore[arg-type]
                seen[kind] = True
            except ValueError:
                seen[kind] = False
        if not seen[kind]:
            found.add(index)
    return found


def small_copy(module: nn.Module, hidden: int) -> nn.Module:
    """Return a dense feed-forward with random weights of small widths, in memory."""
    width = read_ffn(module).intermediate_size
    inner = max(1, width * HIDDEN // hidden)
    sizes = {2 * width: 2 * inner, width: inner, hidden: HIDDEN}
    small, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)
    for part in small.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            shape = [sizes[size] for size in parameter.shape]
            setattr(part, name, nn.Parameter(0.3 * torch.randn(shape, generator=generator)))
    return small.eval()


def served_by(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the modalities that the towers of a model serve."""
    served = {modality for names in host_parts(model).modalities.values() for modality in names}
    return tuple(modality for modality in MODALITIES if modality in served)


def modalities_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Return what a model sees and hears: what its towers serve, and what its config has placeholders for."""
    told = {MODALITIES[number - 1] for number in placeholder_ids(model.config)}
    served = served_by(model)
    return tuple(modality for modality in MODALITIES if modality in served or modality in told)


def run_end_to_end() -> set[str]:
    """Return the types of which a tiny model is built, trained, generated with and saved in tests/hosts."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.hosts.catalogue import HOSTS

    return {host.config["model_type"] for host in HOSTS.values()}


def page(rows: list[HostRow]) -> str:
    """Return the text of docs/hosts.md."""
    ran = run_end_to_end()
    parts = [INTRODUCTION.format(version=transformers.__version__, count=len(rows))]
    for status, text in HEADINGS.items():
        parts.append(text)
        for row in sorted(rows, key=lambda item: item.model_type):
            if row.status == status == "refused":
                parts.append(f"| `{row.model_type}` | {row.note} |")
            elif row.status == status:
                seen = ", ".join(row.modalities) or "text alone"
                tested = "yes" if row.model_type in ran else ""
                parts.append(f"| `{row.model_type}` | `{row.class_name}` | {seen} | {tested} | {row.note} |")
    return "\n".join(parts) + "\n" + LIMITS


def main() -> int:
    logging.disable(logging.WARNING)
    rows = [survey(model_type) for model_type in model_types()]
    for row in rows:
        if row.status == "unknown":
            print(f"{row.model_type} is refused by the code, and no one says why: {row.note}", file=sys.stderr)
    PAGE.write_text(page(rows), encoding="utf-8")
    return int(any(row.status == "unknown" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
