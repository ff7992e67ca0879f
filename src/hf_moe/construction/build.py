"""Building a multimodal MoE from its parts: a decoder, a vision tower and the name of a system.

The parts are put together to a dense model, which becomes the MoE in place, see `in_place.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import HfMoeConfig
from ..configuration.composed_config import ComposedConfig
from ..modeling.block import Block
from ..modeling.initialisation import initializer_std
from ..modeling.mechanisms import get_mechanism
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.processing_hf_moe import HfMoeProcessor
from .block_checks import check_expert
from .expert_sources import ExpertSource, build_source, feed_forward_state, fill_layer
from .generation import generation_settings
from .host_plan import plan_host, system_source
from .in_place import become_moe, paths_of
from .materialisation import check_materialised, empty_model, materialise
from .pretrained import load_language_model, load_vision_tower
from .step_zero import StepZero, logit_difference, random_text, tolerance
from .tokenizer import IMAGE_TOKEN, add_image_token, default_chat_template


def build_model(
    language_model: str | dict[str, Any],
    vision_tower: str | dict[str, Any] | None,
    system: str | None = None,
    *,
    moe_config: dict[str, Any] | None = None,
    connector: dict[str, Any] | None = None,
    vision_moe_config: dict[str, Any] | None = None,
    connector_moe_config: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template: str | None = None,
    image_token: str = IMAGE_TOKEN,
    image_size: int | None = None,
    feature_stage: int | None = None,
    source: str | Mapping[str, Any] | None = None,
    noise_std: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    on_check: Callable[[StepZero], None] | None = None,
) -> tuple[HfMoeForConditionalGeneration, HfMoeProcessor | PreTrainedTokenizerBase]:
    """Build a model and its processor; without a tower, its tokenizer.

    A dense decoder is upcycled: its experts start as copies of its feed-forwards. A decoder that is a MoE already is
    adopted with its experts, and with its routers unless `system` brings others. A config gives a fresh decoder.

    Args:
        language_model: see [`load_language_model`]; or the fields of a config (with `model_type`), which gives a fresh
            decoder and needs `tokenizer`, which decides its vocabulary.
        vision_tower: see [`load_vision_tower`]; `None` for a model of text alone, which a decoder with
            weights becomes in place, see [`from_host`].
        system: a key of `hf_moe.list_systems()`; `"top_k"` for a dense decoder when absent.
        connector: the connector's name and options; a two-layer MLP when absent.
        tokenizer: instead of the decoder's own.
        chat_template: instead of [`default_chat_template`].
        image_token: the placeholder, added to the tokenizer if it is new there.
        image_size, feature_stage: see [`load_vision_tower`].
        dtype: of the weights; routers stay float32.
        moe_config, vision_moe_config, connector_moe_config, source, seed, on_check: see [`from_host`].
        noise_std: noise on the experts, relative to the standard deviation of each matrix.

    Raises:
        ValueError: if the parts do not fit together, or the decoder cannot host MoE layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fields: dict[str, Any] = {"connector": connector} if connector else {}
        tower, image_processor = None, None
        if vision_tower is not None:
            tower, image_processor = load_vision_tower(vision_tower, image_size, feature_stage, dtype)
            fields |= {"vision_config": tower.config, "image_size": _side(image_processor, image_size)}
        given = {"vision_moe_config": vision_moe_config, "connector_moe_config": connector_moe_config}
        places = {name: moe for name, moe in given.items() if moe is not None and tower is not None}
        dense = None
        if not isinstance(language_model, dict):
            dense, own_tokenizer = load_language_model(language_model, dtype)
            tokenizer = tokenizer or own_tokenizer
        if tokenizer is None:
            raise ValueError("A decoder from scratch has no tokenizer: pass one, such as train_word_tokenizer(texts).")
        image_token_id = add_image_token(tokenizer, image_token) if tower is not None else None
        fields["image_token_id"] = image_token_id
        if isinstance(language_model, dict):
            special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
            text_config = AutoConfig.for_model(**{**language_model, "vocab_size": len(tokenizer), **special})
            config = composed_config(text_config, system, moe_config, **fields, **places)
            model = HfMoeForConditionalGeneration._from_config(config, dtype=dtype)
            if tower is not None:
                _put_tower(model, tower.to(dtype), build_source(source or system_source(system), seed, noise_std))
        else:
            _fit_vocabulary(dense, len(tokenizer))
            host = dense if tower is None else compose(dense, tower, **fields)
            plan = plan_host(host, system, moe_config, places, source)
            model = become_moe(host, plan, build_source(plan.source, seed, noise_std), False, seed, on_check)
    check_materialised(model)
    for block in model.moe_blocks().values():
        block.gate.float()
    template = chat_template or default_chat_template(tokenizer, image_token if tower is not None else None)
    tokenizer.chat_template = template
    model.generation_config = generation_settings(dense, tokenizer, image_token_id)
    if tower is None:
        return model.eval(), tokenizer
    length = model.config.image_seq_length
    return model.eval(), HfMoeProcessor(image_processor, tokenizer, length, image_token, chat_template=template)


@torch.no_grad()
def _put_tower(model: HfMoeForConditionalGeneration, tower: PreTrainedModel, source: ExpertSource) -> None:
    """Give a model its tower, whose feed-forwards become experts where the config says so."""
    dense, own = dict(tower.named_modules()), tower.config
    for part in dense.values():
        if getattr(part, "config", None) is own:
            part.config = model.config.vision_config
    model.model.vision_tower = tower
    model.install_place("vision")
    for path, block in paths_of(tower, Block).items():
        check_expert(model, block, dense[path])
        materialise(block, initializer_std(model.config), next(dense[path].parameters()).device)
        fill_layer(block, [feed_forward_state(dense[path])], source)
    for name in model.model.unreachable_parameters:
        model.model.get_parameter(name).requires_grad_(False)


@torch.no_grad()
def compose(decoder: PreTrainedModel, tower: PreTrainedModel | None = None, **fields: Any) -> Any:
    """Return a dense model that is put together of a decoder and a vision tower, whose tensors it takes over.

    Args:
        decoder: with its language head.
        fields: of the [`ComposedConfig`], such as `connector` and `image_token_id`.

    Raises:
        ValueError: if the logits are not those of the decoder's own head.
    """
    decoder.eval()
    text_config = decoder.config
    if hasattr(text_config, "quantization_config"):
        # A GGUF file leaves it, whose weights are plain ones by now.
        del text_config.quantization_config
    config = ComposedConfig(text_config=text_config, **fields)
    host = empty_model(get_mechanism("host", "composed"), config, decoder.dtype)
    host.model.language_model = decoder.base_model
    host.lm_head.weight = decoder.get_output_embeddings().weight
    if tower is not None:
        for name, parameter in host.model.vision_tower.named_parameters():
            tower.get_parameter(name).requires_grad_(parameter.requires_grad)
        host.model.vision_tower = tower.to(decoder.dtype)
        materialise(host.model.connector, config.initializer_range, decoder.device)
    inputs = random_text(host)
    difference = logit_difference(host.eval()(**inputs).logits, decoder(**inputs).logits.float())
    if difference > tolerance(decoder.dtype):
        raise ValueError(
            f"A {type(decoder).__name__} cannot host MoE layers: its own logits differ by {difference:.1e} from those "
            "of its layers under this library's head."
        )
    return host


def _side(image_processor: Any, asked: int | None) -> int | None:
    """Return the side of the images that the tower will see, as asked for; `None` where it takes any."""
    if hasattr(image_processor, "data_config"):
        side = image_processor.data_config["input_size"][-1]
    else:
        cropped = getattr(image_processor, "do_center_crop", False)
        size = getattr(image_processor, "crop_size" if cropped else "size", None) or {}
        side = size.get("height")
    if asked is not None and asked != side:
        raise ValueError(
            f"This tower's image processor gives images of {side} pixels, not {asked}: leave image_size out."
        )
    return side


def composed_config(
    text_config: Any, system: str | None, moe_config: dict[str, Any] | None, **fields: Any
) -> HfMoeConfig:
    """Return the config of a fresh model that is put together, of a system or of a `moe_config` alone."""
    if system is not None:
        return HfMoeConfig.from_system(system, moe_config=moe_config, text_config=text_config, **fields)
    return HfMoeConfig(moe_config=moe_config or {}, text_config=text_config, **fields)


@torch.no_grad()
def _fit_vocabulary(dense: PreTrainedModel, size: int) -> None:
    """Give the tokens that are new to a decoder the mean embedding, and the mean row of the head."""
    known = dense.get_input_embeddings().weight.shape[0]
    if size <= known:
        return
    dense.resize_token_embeddings(size, mean_resizing=False)
    for weight in (dense.get_input_embeddings().weight, dense.get_output_embeddings().weight):
        weight[known:] = weight[:known].mean(0, dtype=torch.float32).to(weight.dtype)
