"""Building a multimodal MoE from its parts: a decoder, a vision tower and the name of a system.

The dense decoder itself becomes the MoE, one layer at a time: a feed-forward is copied into the experts of its layer
and let go before the next layer's experts exist, so the dense decoder and the MoE are never both whole in memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import HfMoeConfig
from ..modeling.host import routed_layer_class
from ..modeling.host_layers import decoder_layers, ffn_name, read_ffn
from ..modeling.initialisation import initializer_std
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.processing_hf_moe import HfMoeProcessor
from .adoption import adopt, hand_over_block
from .block_checks import check_block, check_expert
from .expert_sources import ExpertSource, build_source, feed_forward_state, fill_layer
from .generation import generation_settings
from .host_plan import plan_host, system_source
from .in_place import become_moe, block_paths
from .materialisation import check_materialised, materialise
from .moe_blocks import read_block
from .pretrained import load_language_model, load_vision_tower
from .step_zero import StepZero, compare_at_step_zero, logit_difference, tolerance
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
        language_model: see [`load_language_model`]; a dict needs `tokenizer`, which decides its vocabulary.
        vision_tower: see [`load_vision_tower`]; `None` for a model of text alone, which a decoder with
            weights becomes in place, see [`from_host`].
        system: a key of `hf_moe.list_systems()`; `"top_k"` for a dense decoder when absent.
        moe_config: fields that override the system's.
        connector: the connector's name and options; a two-layer MLP when absent.
        vision_moe_config, connector_moe_config: see [`HfMoeConfig`]; the tower's experts start as copies too.
        tokenizer: instead of the decoder's own.
        chat_template: instead of [`default_chat_template`].
        image_token: the placeholder, added to the tokenizer if it is new there.
        image_size, feature_stage: see [`load_vision_tower`].
        source: what the experts of a dense decoder are made of, see [`from_host`].
        noise_std: noise on the experts, relative to the standard deviation of each matrix.
        seed: of everything that is drawn at random.
        dtype: of the weights; routers stay float32.
        on_check: called with the comparison with the decoder's own output, where it had weights.

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
            places = {"vision_moe_config": vision_moe_config, "connector_moe_config": connector_moe_config}
            fields |= {name: moe for name, moe in places.items() if moe is not None}
        dense = None
        if not isinstance(language_model, dict):
            dense, own_tokenizer = load_language_model(language_model, dtype)
            tokenizer = tokenizer or own_tokenizer
        if tokenizer is None:
            raise ValueError("A decoder from scratch has no tokenizer: pass one, such as train_word_tokenizer(texts).")
        image_token_id = add_image_token(tokenizer, image_token) if tower is not None else None
        fields["image_token_id"] = image_token_id
        if isinstance(language_model, dict):
            config = _config(_fresh_text_config(language_model, tokenizer), system, moe_config, fields)
            model = HfMoeForConditionalGeneration._from_config(config, dtype=dtype)
        elif tower is None:
            _fit_vocabulary(dense, len(tokenizer))
            plan = plan_host(dense, system, moe_config, source=source)
            model = become_moe(dense, plan, build_source(plan.source, seed, noise_std), False, seed, on_check)
        else:
            method = build_source(source or system_source(system), seed, noise_std)
            model = _from_decoder(dense, tokenizer, system, moe_config, fields, dtype, method, seed, on_check)
        if tower is not None:
            method = build_source(source or system_source(system), seed, noise_std)
            _put_tower(model, _with_config(tower.to(dtype), model.config.vision_config), method)  # its buffers too
    check_materialised(model)
    for block in model.moe_blocks().values():
        block.gate.float()
    template = chat_template or default_chat_template(tokenizer, image_token if tower is not None else None)
    tokenizer.chat_template = template
    model.generation_config = generation_settings(dense, tokenizer, image_token_id)
    if tower is None:
        return model.eval(), tokenizer
    image_seq_length = model.config.image_seq_length
    return model.eval(), HfMoeProcessor(
        image_processor, tokenizer, image_seq_length, image_token, chat_template=template
    )


@torch.no_grad()
def _put_tower(model: HfMoeForConditionalGeneration, tower: PreTrainedModel, source: ExpertSource) -> None:
    """Give a model its tower, whose feed-forwards become experts where the config says so."""
    dense = dict(tower.named_modules())
    model.model.vision_tower = tower
    model.install_place("vision")
    for path, block in block_paths(tower).items():
        check_expert(model, block, dense[path])
        materialise(block, initializer_std(model.config), next(dense[path].parameters()).device)
        fill_layer(block, [feed_forward_state(dense[path])], source)
    for name in model.model.unreachable_parameters:
        model.model.get_parameter(name).requires_grad_(False)


def _side(image_processor: Any, asked: int | None) -> int | None:
    """Return the side of the images that the tower will see, `None` where it takes any.

    Raises:
        ValueError: if it is not the one that was asked for.
    """
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


def _config(
    text_config: Any, system: str | None, moe_config: dict[str, Any] | None, fields: dict[str, Any]
) -> HfMoeConfig:
    if system is not None:
        return HfMoeConfig.from_system(system, moe_config=moe_config, text_config=text_config, **fields)
    return HfMoeConfig(moe_config=moe_config or {}, text_config=text_config, **fields)


def _fresh_text_config(source: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    options = {
        **source,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return AutoConfig.for_model(options.pop("model_type"), **options)


def _from_decoder(
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
    moe_config: dict[str, Any] | None,
    fields: dict[str, Any],
    dtype: torch.dtype,
    source: ExpertSource,
    seed: int,
    on_check: Callable[[StepZero], None] | None,
) -> HfMoeForConditionalGeneration:
    """Turn a decoder into the model, in place."""
    dense.eval()
    text_config = dense.config
    if hasattr(text_config, "quantization_config"):
        # Left by a GGUF file, whose weights are plain ones by now.
        del text_config.quantization_config
    ids = torch.randint(text_config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(seed))
    _fit_vocabulary(dense, len(tokenizer))
    with torch.no_grad():
        reference = dense(input_ids=ids).logits.float()
    layers = decoder_layers(dense.base_model)
    config, host_routing = config_of_decoder(dense, system, moe_config, fields)
    adopted = bool(host_routing)
    with torch.device("meta"):
        model = HfMoeForConditionalGeneration._from_config(config, dtype=dtype)
    moe_layers = model.moe_layers()
    own_routers = adopted and all(getattr(config.moe_config, name) == value for name, value in host_routing.items())
    model.model.language_model = _with_config(dense.base_model, config.text_config)
    model.lm_head.weight = dense.get_output_embeddings().weight
    for layer in layers:
        host_class: Any = type(layer)
        layer.__class__ = routed_layer_class(host_class)
    _check_host(model, ids, reference)

    std = config.initializer_range
    for module in (model.model.connector, model.objectives):
        if module is not None:
            materialise(module, std)
    exact = True
    for layer_idx, moe_layer in moe_layers.items():
        layer = layers[layer_idx]
        name = ffn_name(layer)
        ffn = getattr(layer, name)
        if read_ffn(ffn).layout is None:
            reading = read_block(ffn, text_config)
            assert reading is not None, "of a MoE block"
            hand_over_block(moe_layer, ffn, reading, std)
            if own_routers:
                check_block(moe_layer, ffn, reading.branches)
        else:
            check_expert(model, moe_layer, ffn)
            materialise(moe_layer, std)
            exact = fill_layer(moe_layer, [feed_forward_state(ffn)], source) and exact
        setattr(layer, name, moe_layer)
    inputs, equal = {"input_ids": ids}, exact and own_routers == adopted
    check = compare_at_step_zero(model.eval(), inputs, reference, equal, adopted)
    if on_check is not None:
        on_check(check)
    return model


def config_of_decoder(
    dense: PreTrainedModel, system: str | None, moe_config: dict[str, Any] | None, fields: dict[str, Any]
) -> tuple[HfMoeConfig, dict[str, Any]]:
    """Return the config of the model that a decoder becomes, and the decoder's own routing: none if it is dense.

    Args:
        dense: also without memory, on the meta device.
        fields: of the config, besides.
    """
    layers = decoder_layers(dense.base_model)
    if all(read_ffn(getattr(layer, ffn_name(layer))).layout is not None for layer in layers):
        return _config(dense.config, system or "top_k", moe_config, fields), {}
    host_routing, moe_config = _adopted_config(dense, system, moe_config or {})
    return _config(dense.config, system, moe_config, fields), host_routing


def _adopted_config(
    dense: PreTrainedModel, system: str | None, moe_config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the routing of a decoder that is a MoE, and the `moe_config` of the model that takes over its experts.

    A system may bring router, slots and objectives, `moe_config` too; the experts are the decoder's.

    Raises:
        ValueError: if `moe_config` asks for other experts than the decoder has.
    """
    adopted, _ = adopt(dense)
    routing = {name: adopted[name] for name in ("router", "num_experts_per_tok")}
    kept = {name: value for name, value in adopted.items() if name not in routing}
    fixed = {"granularity": 1, "expert_banks": None, **kept}
    del fixed["layers"], fixed["experts"]
    for name, value in fixed.items():
        if moe_config.get(name, value) != value:
            raise ValueError(
                f"moe_config.{name}={moe_config[name]!r} contradicts {type(dense).__name__}, whose "
                f"{adopted['num_experts']} experts of one width are taken over: leave it out."
            )
    if system is None:
        return routing, {**adopted, **moe_config}
    own_sizes = {"num_shared_experts": 0, "granularity": 1, "expert_intermediate_size": None, "expert_banks": None}
    return routing, {**own_sizes, **kept, **moe_config}


def _with_config(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Let a model and its parts read the whole's copy of their config, as those do that are made from it."""
    own = model.config
    for part in model.modules():
        if getattr(part, "config", None) is own:
            part.config = config
    return model


@torch.no_grad()
def _fit_vocabulary(dense: PreTrainedModel, size: int) -> None:
    """Give the tokens that are new to a decoder the mean embedding, and the mean row of the head."""
    known = dense.get_input_embeddings().weight.shape[0]
    if size <= known:
        return
    dense.resize_token_embeddings(size, mean_resizing=False)
    for weight in (dense.get_input_embeddings().weight, dense.get_output_embeddings().weight):
        weight[known:] = weight[:known].mean(0, dtype=torch.float32).to(weight.dtype)


@torch.no_grad()
def _check_host(model: HfMoeForConditionalGeneration, ids: torch.Tensor, reference: torch.Tensor) -> None:
    """Refuse a host that this library would change, whatever the router does; its feed-forwards are still in place.

    Raises:
        ValueError: if the host's logits change under this library's head.
    """
    name = type(decoder_layers(model.model.language_model)[0]).__name__
    difference = logit_difference(model.eval()(input_ids=ids).logits, reference)
    if difference > tolerance(model.dtype):
        raise ValueError(
            f"A decoder of {name}s cannot host MoE layers: its own logits differ by {difference:.1e} from those of "
            "its layers under this library's head."
        )
