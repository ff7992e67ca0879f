"""What a model takes and how it is opened, read from its config alone; a Space carries this file too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers


# In the order of the modality ids.
MODALITIES = ("text", "image", "video", "audio")
# The part of a config without which a host takes none of these.
TOWERS = {"vision_config": ("image", "video"), "audio_config": ("audio",)}
# The meaning of one token of each.
TOKENS = {"image": "patch of the picture", "video": "part of the video", "audio": "part of the sound"}
# The folder of a checkpoint and of a Space with what a page offers to click.
EXAMPLES = "examples"
# How the names of files of each end.
FILE_ENDINGS = {
    "image": (".jpeg", ".jpg", ".png", ".webp"), "video": (".mp4", ".webm"), "audio": (".flac", ".mp3", ".wav"),
}  # fmt: skip


def host_name(config: Any) -> str | None:
    """Return the name of a host's class in Transformers, its own host; `None` for a model put together from parts."""
    if config.model_type == "hf_moe":
        return getattr(config, "host_class", None)
    return next(iter(config.architectures or ()), None)


def modalities(config: Any) -> tuple[str, ...]:
    """Return what a model takes, text first, in the order of the modality ids."""
    # A user's own class is none of Transformers.
    host = getattr(transformers, host_name(config) or "", None)
    declared: tuple[str, ...] | str = ()
    if host is None:
        declared = ("image",) if getattr(config, "vision_config", None) is not None else ()
    # A decoder alone inherits what the host that it comes from declares; its config has no parts.
    elif host.config_class.sub_configs:
        declared = host.input_modalities
    # A class names a single one as a word.
    taken = {"text", *([declared] if isinstance(declared, str) else declared)}
    for tower, served in TOWERS.items():
        # Some hosts come without one of their towers.
        if getattr(config, tower, served) is None:
            taken -= set(served)
    return tuple(name for name in MODALITIES if name in taken)


def pipeline_tag(config: Any) -> str:
    """Return the Hub's name of what a model does."""
    taken = modalities(config)
    sees = "image" in taken or "video" in taken
    if "audio" in taken:
        return "any-to-any" if sees else "audio-text-to-text"
    if "image" in taken:
        return "image-text-to-text"
    return "video-text-to-text" if sees else "text-generation"


def model_tags(config: Any) -> list[str]:
    """Return the Hub's tags for what a model takes beside text."""
    taken = modalities(config)
    seen = ["vision-language"] if "image" in taken or "video" in taken else []
    return [*seen, *(name for name in ("video", "audio") if name in taken)]


def auto_model(config: Any) -> str:
    """Return the class that opens a model."""
    taken = modalities(config)
    if "audio" in taken:
        return "AutoModelForMultimodalLM"
    return "AutoModelForCausalLM" if taken == ("text",) else "AutoModelForImageTextToText"


def auto_processor(config: Any) -> str:
    """Return the class that opens what turns text and the like into a model's inputs."""
    return "AutoTokenizer" if modalities(config) == ("text",) else "AutoProcessor"


def placeholders(config: Any) -> dict[str, int]:
    """Return the placeholder ids of pictures, videos and sounds, by modality."""
    fields = {f"{name}_token_{ending}": name for name in MODALITIES[1:] for ending in ("id", "index")}
    return {name: value for field, name in fields.items() if (value := getattr(config, field, None)) is not None}


def packages(config: Any) -> list[str]:
    """Return the packages that a model and its processor take beside torch and Transformers."""
    taken, tower = modalities(config), getattr(config, "vision_config", None)
    needed = []
    if "image" in taken or "video" in taken:
        needed.append("pillow")
        needed += ["timm"] if getattr(tower, "model_type", None) == "timm_wrapper" else []
        # The processors of Transformers resize with it.
        needed += ["torchvision"] if host_name(config) is not None else []
    # torchcodec decodes sound and video.
    return [*needed, *(["torchcodec"] if "video" in taken or "audio" in taken else [])]


def files_of(folder: Path, modality: str) -> list[Path]:
    """Return the pictures, the videos or the sounds in a folder."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in FILE_ENDINGS[modality])


def described_tokens(taken: Sequence[str]) -> str:
    """Return in words what the tokens of these modalities are."""
    shown = ", ".join(f"every {TOKENS[name]}" for name in taken if name in TOKENS)
    return f"{shown} and every word" if shown else "every word"
