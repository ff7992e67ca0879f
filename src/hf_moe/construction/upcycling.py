"""A MoE filled from a decoder that stays as it is: its shared parts are copied, its feed-forwards become experts."""

import torch
from transformers import PreTrainedModel

from ..modeling.block import Block
from ..modeling.host_layers import decoder_layers, ffn_name, read_ffn
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.parts import text_decoder
from .block_checks import check_expert
from .expert_sources import build_source, feed_forward_state, fill_layer


def copy_host(model: HfMoeForConditionalGeneration, dense: PreTrainedModel) -> None:
    """Copy what the two models share: attention, norms, embeddings, head, and the feed-forwards that stay dense.

    Raises:
        ValueError: if the models do not fit together, or the host's head has a bias, which this model's has not.
    """
    language_model = text_decoder(model)
    layers = decoder_layers(language_model)
    replaced = tuple(
        f"{name}.{ffn_name(layer)}."
        for name, layer in language_model.named_modules()
        if layer in set(layers) and isinstance(getattr(layer, ffn_name(layer)), Block)
    )
    source = {name: tensor for name, tensor in dense.base_model.state_dict().items() if not name.startswith(replaced)}
    target = {name: tensor for name, tensor in language_model.state_dict().items() if not name.startswith(replaced)}
    head = dense.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(dense).__name__} has a head with a bias, which this model's head has no place for.")
    source["lm_head"], target["lm_head"] = head.weight, model.lm_head.weight
    differing = {name for name in source.keys() | target.keys() if _shape(source, name) != _shape(target, name)}
    if differing:
        examples = [f"{name}: {_shape(source, name)} -> {_shape(target, name)}" for name in sorted(differing)[:3]]
        raise ValueError(
            f"The config's host does not fit {type(dense).__name__}: {len(differing)} parameters differ, for example "
            f"{'; '.join(examples)}. Build the model with text_config=dense.config."
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _shape(tensors: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def upcycle(
    model: HfMoeForConditionalGeneration, dense: PreTrainedModel, noise_std: float = 0.0, seed: int = 0
) -> None:
    """Fill `model` from a dense decoder: every expert of a layer becomes the feed-forward that it replaces.

    Experts narrower than the feed-forward take consecutive slices of its inner neurons. With shared experts, the
    shared branch and the routed experts give half of the output each.

    Args:
        model: the MoE to fill, in place; its `text_config` is the dense model's.
        dense: the host's own `ForCausalLM`.
        noise_std: noise on the routed experts, relative to the standard deviation of each matrix.
        seed: seed of the noise.

    Raises:
        ValueError: if the models do not fit together, if the experts are no feed-forwards, or if the host is a MoE
            already.
    """
    copy_host(model, dense)
    source = build_source("copies", seed, noise_std)
    layers = decoder_layers(dense.base_model)
    for layer_idx, layer in model.moe_layers().items():
        ffn = getattr(layers[layer_idx], ffn_name(layers[layer_idx]))
        if read_ffn(ffn).layout is None:
            raise ValueError(f"Layer {layer_idx} of {type(dense).__name__} is a MoE already: use adopt().")
        fill_layer(layer, [feed_forward_state(ffn)], source)


@torch.no_grad()
def logit_difference(model: HfMoeForConditionalGeneration, dense: PreTrainedModel, seed: int = 0) -> float:
    """Return the largest difference between the two models' logits on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(dense.config.get_text_config().vocab_size, (2, 16), generator=generator)
    logits = [part(input_ids=ids.to(part.device)).logits.float().cpu() for part in (model.eval(), dense.eval())]
    return (logits[0] - logits[1]).abs().max().item()


def check_host_logits(model: HfMoeForConditionalGeneration, dense: PreTrainedModel, atol: float = 1e-4) -> None:
    """Refuse a host that this library would change, whatever the router does.

    Two comparisons: the model with the host's own feed-forwards put back must have the host's logits (embeddings,
    layers, head), and an expert that holds a feed-forward must compute what it does.

    Args:
        model: a model that [`upcycle`] or an adoption has filled.
        dense: the host's own `ForCausalLM`.
        atol: largest difference; float32 rounding stays below 1e-5, bf16 needs about 1e-1.

    Raises:
        ValueError: with the difference.
    """
    name = type(dense).__name__
    ours, theirs = decoder_layers(text_decoder(model)), decoder_layers(dense.base_model)
    moe_layers = model.moe_layers()
    ffns = {layer_idx: getattr(theirs[layer_idx], ffn_name(theirs[layer_idx])) for layer_idx in moe_layers}
    for layer_idx, ffn in ffns.items():
        if read_ffn(ffn).layout is not None:
            check_expert(model, moe_layers[layer_idx], ffn)
    try:
        for layer_idx, ffn in ffns.items():
            setattr(ours[layer_idx], ffn_name(ours[layer_idx]), ffn)
        difference = logit_difference(model, dense)
    finally:
        for layer_idx, moe_layer in moe_layers.items():
            setattr(ours[layer_idx], ffn_name(ours[layer_idx]), moe_layer)
    if difference > atol:
        raise ValueError(
            f"{name} cannot host MoE layers: its own logits differ by {difference:.1e} from those of its layers under "
            "this library's head."
        )
