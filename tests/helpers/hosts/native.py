"""What a tiny host is: its config, its class, and rows of tokens and media to call it with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import transformers
from packaging.specifiers import SpecifierSet
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel


PAD = 0
IMAGE, VIDEO, AUDIO = 100, 101, 102
# Tokens that some hosts write around an image, a video and a sound.
IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END, AUDIO_START, AUDIO_END = range(103, 109)
SPECIAL = list(range(100, 109))
MODALITY_OF = {IMAGE: 1, VIDEO: 2, AUDIO: 3}

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
PLAIN_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CLIP = {**PLAIN_TOWER, "model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16}
SIGLIP = {**PLAIN_TOWER, "model_type": "siglip_vision_model"}
PIXTRAL = {**PLAIN_TOWER, "model_type": "pixtral", "head_dim": 8}

Media = Mapping[str, torch.Tensor]


def decoder(model_type: str, **fields) -> dict:
    """The config of a tiny decoder of two layers."""
    return {
        "model_type": model_type,
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **fields,
    }


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(*sizes: tuple[int, int, int], patch: int, name: str = "image", seed: int = 0) -> dict[str, torch.Tensor]:
    """Images or videos as Qwen2-VL takes them: patches in one row each, and the grid (T, H, W) of every picture."""
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[name]
    patches = sum(time * height * width for time, height, width in sizes)
    return {pixels: noise(patches, patch, seed=seed), f"{name}_grid_thw": torch.tensor(sizes)}


@dataclass(frozen=True)
class NativeHost:
    """A tiny model of Transformers, and rows with all its modalities.

    Attributes:
        class_name: its class in Transformers.
        config: the fields of its config, `model_type` among them.
        rows: token ids of two or more rows of different lengths. `[IMAGE] * 4` is an image of four tokens.
        media: for every row, what else the model gets for it; rows are put together along the first dimension.
        per_token: those of the media that have a value per token in dimension 1, padded as the tokens are.
        type_ids: the argument in which the host's processor gives the modality of every token.
        boundaries: tokens around a medium that its processor counts as part of it: token id to modality id.
        adopted: its decoder has MoE layers of its own.
        broken: releases of Transformers in which the native model fails on these rows.
        broken_beams: releases in which it fails with beams.
    """

    class_name: str
    config: Mapping
    rows: tuple[list[int], ...]
    media: tuple[Callable[[], Media], ...] = ()
    per_token: tuple[str, ...] = ()
    type_ids: str | None = None
    boundaries: Mapping[int, int] = field(default_factory=dict)
    adopted: bool = False
    broken: str | None = None
    broken_beams: str | None = None

    @property
    def is_broken(self) -> bool:
        return _release_in(self.broken)

    @property
    def has_broken_beams(self) -> bool:
        return self.is_broken or _release_in(self.broken_beams)

    def make_config(self) -> PreTrainedConfig:
        fields = {name: value for name, value in self.config.items() if name != "model_type"}
        return CONFIG_MAPPING[self.config["model_type"]](**fields)

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The native model, with weights large enough that every part of it shows in the logits."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.class_name)(self.make_config())
        with torch.no_grad():
            for parameter in model.parameters():
                # Of vectors those that are zero, among them the gates that keep cross-attention out at first.
                if parameter.dim() > 1 or not parameter.any():
                    parameter.normal_(std=0.15)
        return model.eval()

    def inputs(self, *picked: int, padding: int = 0) -> dict[str, torch.Tensor]:
        """The arguments of a call with some rows, all by default, padded on the left to one length, or beyond it."""
        picked = picked or tuple(range(len(self.rows)))
        rows = [torch.tensor(self.rows[index]) for index in picked]
        length = max(map(len, rows)) + padding
        words = {"input_ids": rows, "attention_mask": [torch.ones_like(row) for row in rows]}
        found = {name: torch.cat([_padded(row[None], length) for row in given]) for name, given in words.items()}
        if self.type_ids is not None:
            found[self.type_ids] = self._types(found["input_ids"])
        if self.boundaries:
            found["moe_mm_token_type_ids"] = self._modalities(found["input_ids"], {**MODALITY_OF, **self.boundaries})
        media = [self.media[index]() for index in picked] if self.media else []
        for name in dict.fromkeys(name for row in media for name in row):
            given = [row[name] for row in media if name in row]
            if name in self.per_token:
                given = [_padded(row, length) for row in given]
            found[name] = torch.cat(given)
        return found

    def modality_ids(self, *picked: int) -> torch.Tensor:
        """The modality of every token (B, N), padding text: what routers must be told."""
        return self._modalities(self.inputs(*picked)["input_ids"], {**MODALITY_OF, **self.boundaries})

    def _types(self, input_ids: torch.Tensor) -> torch.Tensor:
        # PaliGemma's `token_type_ids` tell prefix (0) from suffix (1), not modalities.
        known = {} if self.config["model_type"] == "paligemma" else MODALITY_OF
        return self._modalities(input_ids, known)

    @staticmethod
    def _modalities(input_ids: torch.Tensor, known: Mapping[int, int]) -> torch.Tensor:
        return torch.tensor([[known.get(token, 0) for token in row] for row in input_ids.tolist()])


def _release_in(releases: str | None) -> bool:
    return releases is not None and transformers.__version__ in SpecifierSet(releases, prereleases=True)


def _padded(row: torch.Tensor, length: int) -> torch.Tensor:
    """Put zeros before a row (1, N, ...) up to a length; a zero is padding in ids and masks alike."""
    return torch.cat([row.new_zeros(1, length - row.shape[1], *row.shape[2:]), row], dim=1)
