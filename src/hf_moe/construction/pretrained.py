"""The parts a model is built from: decoders and vision towers, from the Hub, from folders or from packages."""

import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from ..configuration.reading import check_files
from ..modeling.loading import damaged_weights
from .packaged import PACKAGED, packaged_file
from .refusals import host_class_of, host_config_class


logger = logging.get_logger(__name__)


def load_language_model(
    source: str, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> tuple[Any, Any]:
    """Load a decoder with its head, and its tokenizer.

    Args:
        source: a Hub id or folder; a path to a `.gguf` file; or the name of a packaged model.
        dtype: of the weights.
        revision: branch, tag or commit of a repository on the Hub.
    """
    path = packaged_file(source) if source in PACKAGED else Path(source)
    if path.suffix != ".gguf":
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        return _load(AutoModelForCausalLM, str(source), dtype, revision), tokenizer
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{path.name} is a GGUF file: pip install gguf")
    options = {"gguf_file": path.name}
    dense = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **options)
    # Its weights are whole, but Transformers trains and saves no model that bears the mark of a quantised one.
    dense.hf_quantizer.remove_quantization_config(dense)
    return dense, AutoTokenizer.from_pretrained(path.parent, **options)


def host_folder(source: str | Path) -> str | Path:
    """Return where the files of a host are: those of `small-omni` are written at its first use.

    Raises:
        FileNotFoundError: if the source looks like a folder and is none.
        ImportError: if the package of that host is not installed.
        ValueError: if its config.json holds no JSON object.
    """
    if source != "small-omni":
        check_files(source, ("config.json",))
        return source
    from .small_omni import save_small_omni

    packaged_file(source)
    folder = Path(HF_HOME, "hf_moe", source)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{source}.", dir=folder.parent) as scratch:
            save_small_omni(Path(scratch, source))
            os.replace(Path(scratch, source), folder)
    return folder


def load_host(source: str | Path, dtype: torch.dtype | None = None, revision: str | None = None) -> PreTrainedModel:
    """Load a model of Transformers with its language head.

    Args:
        source: a Hub id or folder; a path to a `.gguf` file; the name of a packaged model, or `small-omni`.
        dtype: of the weights; that of the checkpoint when absent.
        revision: branch, tag or commit of a repository on the Hub.

    Raises:
        ValueError: if it cannot become a MoE in place, which its config tells, or lacks weights.
    """
    source = host_folder(source)
    if str(source) in PACKAGED or Path(source).suffix == ".gguf":
        return load_language_model(str(source), dtype or torch.float32)[0]
    fields, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    # Code that a checkpoint carries is never run: its type has to be one of Transformers.
    config = host_config_class(fields.get("model_type")).from_pretrained(source, revision=revision)
    dtype = dtype or config.dtype or torch.float32
    host, report = _read(host_class_of(config), config, str(source), dtype, revision)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of {type(host).__name__}, among them {missing[:3]}: it is "
            "damaged, or a checkpoint of a part. Take one of the whole model with its head."
        )
    return host


def host_processor(source: str | Path, revision: str | None = None) -> Any:
    """Return what a checkpoint makes its inputs with: its processor, or the tokenizer of a model of text.

    `None`, with a warning, where it holds none that Transformers can open.
    """
    source = host_folder(source)
    if str(source) in PACKAGED or Path(source).suffix == ".gguf":
        path = packaged_file(str(source)) if str(source) in PACKAGED else Path(source)
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    try:
        return AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        logger.warning(f"{source} has no processor that can be opened, so none is saved: {error}")
        return None


def local_config(source: str) -> Any:
    """Return the config of a decoder whose files are on this machine; `None` where they are elsewhere."""
    path = Path(source)
    if source in PACKAGED:
        try:
            path = packaged_file(source)
        except ImportError:
            return None
    if path.suffix == ".gguf":
        readable = path.is_file() and importlib.util.find_spec("gguf") is not None
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name) if readable else None
    return AutoConfig.from_pretrained(source) if (path / CONFIG_NAME).is_file() else None


def _load(auto: Any, source: str, dtype: torch.dtype, revision: str | None = None) -> Any:
    """Load a checkpoint as `auto.from_pretrained` does, see [`_read`]."""
    config = AutoConfig.from_pretrained(source, revision=revision)
    with torch.device("meta"):
        empty = auto.from_config(config, dtype=dtype)
    return _read(type(empty), empty.config, source, dtype, revision)[0]


def _read(
    model_class: Any, config: Any, source: str, dtype: torch.dtype, revision: str | None
) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint with every tensor read into memory of its own, and return the model and the report of it.

    Transformers maps the files. A mapped file stays in memory until the last of its tensors is let go, those that
    were only copied into experts included.
    """
    files = _safetensors_files(source, revision)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if not files:
        return model_class.from_pretrained(source, revision=revision, **options)
    tensors: dict[str, Any] = {}
    try:
        for file in files:
            weights = safe_open(file, "pt", backend="pread")
            tensors |= {name: weights.get_slice(name) for name in weights.keys()}
        model, report = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
    except SafetensorError as error:
        raise damaged_weights(source, error) from error
    model.config.name_or_path = source
    if model.can_generate():
        with suppress(OSError):  # Without a file of its own it keeps what the config says.
            model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
    return model, report


def _safetensors_files(source: str, revision: str | None) -> list[str]:
    """Return the weight files of a checkpoint, none where it has another format."""
    optional: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if (file := cached_file(source, SAFE_WEIGHTS_NAME, **optional)) is not None:
        return [file]
    if (index := cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **optional)) is not None:
        return get_checkpoint_shard_files(source, index, revision=revision)[0]
    return []


def load_vision_tower(
    source: str | dict[str, Any],
    image_size: int | None = None,
    feature_stage: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, Any]:
    """Load a vision tower and its image processor.

    Args:
        source: a Hub id or folder; the name of a packaged model; or the fields of a config (with `model_type`), which
            gives a fresh tower.
        image_size: side of the square input in pixels; the tower's own when absent.
        feature_stage: stage of a packaged convolutional tower whose feature map is used (3: stride 16); the layers
            behind it are left out. The last one when absent.
        dtype: of the weights.
    """
    if isinstance(source, dict):
        config = AutoConfig.for_model(**source)
        size = image_size or getattr(config, "image_size", None) or 224
        return AutoModel.from_config(config, dtype=dtype), square_image_processor(int(size))
    if source == "efficientnet-lite0":
        tower = _efficientnet_lite0(feature_stage).to(dtype)
        return tower, square_image_processor(image_size or 224, mean=127, std=128)
    tower = _load(AutoModel, source, dtype)
    tower = getattr(tower, "vision_model", tower)
    return tower, AutoImageProcessor.from_pretrained(source)


def square_image_processor(size: int, mean: float = 127.5, std: float = 127.5) -> CLIPImageProcessor:
    """Return a processor that resizes to `size` x `size` pixels and scales to (x - mean) / std, x in 0..255."""
    return CLIPImageProcessor(
        size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=[mean / 255] * 3,
        image_std=[std / 255] * 3,
    )


def _efficientnet_lite0(feature_stage: int | None) -> PreTrainedModel:
    """Return EfficientNet-Lite0 in timm's wrapper, with its ImageNet weights."""
    if feature_stage is not None and feature_stage not in range(5):
        raise ValueError(f"feature_stage={feature_stage!r} is no stage of efficientnet-lite0, which has 0 to 4.")
    import timm

    weights = torch.load(packaged_file("efficientnet-lite0"), map_location="cpu", weights_only=True)
    names = timm.create_model("efficientnet_lite0").state_dict()
    # The file comes from another code base: the same tensors in the same order under other names.
    mismatched = [
        name for (name, own), theirs in zip(names.items(), weights.values(), strict=True) if own.shape != theirs.shape
    ]
    if mismatched:
        raise ValueError(f"The weights of EfficientNet-Lite0 do not fit timm's model at {mismatched[:3]}.")
    state = dict(zip(names, weights.values(), strict=True))
    # Of its feature extractors for this architecture, timm's "getter" alone leaves out the layers behind the stage.
    features = {"features_only": True, "feature_cls": "getter", "out_indices": [feature_stage]}
    model_args = {} if feature_stage is None else features
    config = AutoConfig.for_model("timm_wrapper", architecture="efficientnet_lite0", model_args=model_args)
    tower = AutoModel.from_config(config)
    network = tower.timm_model if feature_stage is None else tower.timm_model.model
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return tower.eval()
