"""MoE blocks of Transformers' own classes, small and random, and the block that a reading of one fills."""

import importlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from hf_moe import HfMoeConfig
from hf_moe.construction.moe_blocks import BlockReading
from hf_moe.modeling.block import Block
from hf_moe.modeling.configured_parts import build_block
from hf_moe.modeling.host import layer_spec
from hf_moe.modeling.host_layers import read_ffn
from hf_moe.modeling.initialisation import initialize_mechanisms


HIDDEN = 32
COMMON = {"hidden_size": HIDDEN, "moe_intermediate_size": 24, "intermediate_size": 24, "num_experts_per_tok": 2}
COUNTED = {**COMMON, "num_experts": 8, "norm_topk_prob": True}
LOCAL = {**COMMON, "num_local_experts": 8}
GROUPED = {**COMMON, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
SCALED = {**GROUPED, "routed_scaling_factor": 1.5, "norm_topk_prob": True}
STEP = {**LOCAL, "share_expert_dim": 40, "moe_router_scaling_factor": 1.5, "num_hidden_layers": 2}
ERNIE = {**COMMON, "moe_intermediate_size": [24, 16], "moe_k": 2, "moe_num_experts": 8, "num_experts": 8}
ARIA = {**COMMON, "moe_num_experts": 8, "moe_topk": 2}

# name -> (package of Transformers, class of the block, class of its config, fields, further arguments of the block)
BLOCKS: dict[str, tuple[str, str, str, dict[str, Any], tuple]] = {
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", LOCAL, ()),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        {**COUNTED, "shared_expert_intermediate_size": 40, "norm_topk_prob": False},
        (),
    ),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", COUNTED, ()),
    "qwen3_vl_moe": ("qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock", "Qwen3VLMoeTextConfig", COUNTED, ()),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        "Qwen3_5MoeSparseMoeBlock",
        "Qwen3_5MoeTextConfig",
        {**COUNTED, "shared_expert_intermediate_size": 16},
        (),
    ),
    "qwen4_exp": (
        "qwen4_exp",
        "Qwen4ExpTextSparseMoeBlock",
        "Qwen4ExpTextConfig",
        {**COUNTED, "shared_expert_intermediate_size": 16},
        (),
    ),
    "qwen3_omni_thinker": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeThinkerTextSparseMoeBlock",
        "Qwen3OmniMoeTextConfig",
        COUNTED,
        (),
    ),
    "glm4v_moe": ("glm4v_moe", "Glm4vMoeTextMoE", "Glm4vMoeTextConfig", SCALED, ()),
    "ernie4_5_vl_moe": (
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeMoeBlock",
        "Ernie4_5_VLMoeTextConfig",
        {**ERNIE, "moe_num_shared_experts": 2},
        (),
    ),
    "ernie4_5_vl_moe_unshared": (
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeMoeBlock",
        "Ernie4_5_VLMoeTextConfig",
        {**ERNIE, "moe_num_shared_experts": 0},
        (),
    ),
    "aria": ("aria", "AriaTextMoELayer", "AriaTextConfig", {**ARIA, "moe_num_shared_experts": 2}, ()),
    "llama4": (
        "llama4",
        "Llama4TextMoe",
        "Llama4TextConfig",
        {**LOCAL, "num_experts_per_tok": 1, "num_hidden_layers": 2},
        (),
    ),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", SCALED, ()),
    "dots3_note": (
        "dots3_note",
        "Dots3NoteTextMoE",
        "Dots3NoteTextConfig",
        {**SCALED, "shared_experts_intermediate_size": 40},
        (),
    ),
    "mistral4": ("mistral4", "Mistral4MoE", "Mistral4Config", SCALED, ()),
    "mistral_large4": ("mistral_large4", "MistralLarge4TextMoE", "MistralLarge4TextConfig", SCALED, ()),
    "unlimited_ocr": (
        "unlimited_ocr",
        "UnlimitedOcrTextMoe",
        "UnlimitedOcrTextConfig",
        {**SCALED, "num_attention_heads": 4, "topk_method": "group_limited_greedy"},
        (),
    ),
    "deepseek_ocr2": (
        "deepseek_ocr2",
        "DeepseekOcr2TextMoe",
        "DeepseekOcr2TextConfig",
        {**SCALED, "num_attention_heads": 4, "topk_method": "greedy"},
        (),
    ),
    "minimax_m2": ("minimax_m2", "MiniMaxM2SparseMoeBlock", "MiniMaxM2Config", LOCAL, ()),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        "Ernie4_5_MoeSparseMoeBlock",
        "Ernie4_5_MoeConfig",
        {**ERNIE, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
        (),
    ),
    "glm5_next": ("glm5_next", "Glm5NextTextMoE", "Glm5NextTextConfig", {**SCALED, "swiglu_limit": 3.0}, ()),
    "hy_v4_vl": ("hy_v4_vl", "HYV4VLMoE", "HYV4VLTextConfig", {**SCALED, "swiglu_limit": 3.0}, ()),
    "step3p7": ("step3p7", "Step3p7SparseMoeBlock", "Step3p7TextConfig", STEP, (0,)),
    "step3p7_clamped": (
        "step3p7",
        "Step3p7SparseMoeBlock",
        "Step3p7TextConfig",
        {**STEP, "swiglu_limits": [2.0, 0.0], "swiglu_limits_shared": [3.0, 0.0]},
        (0,),
    ),
    "step3p7_clamped_shared": (
        "step3p7",
        "Step3p7SparseMoeBlock",
        "Step3p7TextConfig",
        {**STEP, "swiglu_limits": [0.0, 2.0], "swiglu_limits_shared": [3.0, 0.0]},
        (0,),
    ),
    "minimax_m3_vl": (
        "minimax_m3_vl",
        "MiniMaxM3VLSparseMoeBlock",
        "MiniMaxM3VLTextConfig",
        {**LOCAL, "shared_intermediate_size": 40, "swiglu_limit": 3.0, "routed_scaling_factor": 1.5},
        (),
    ),
    # Kimi K2.5's decoder is DeepSeek-V3's by default.
}
REFUSED: dict[str, tuple[str, str, str, dict[str, Any], tuple]] = {
    "gpt_oss": ("gpt_oss", "GptOssMLP", "GptOssConfig", LOCAL, ()),
    "muse_spark": (
        "muse_spark",
        "MuseSparkMoE",
        "MuseSparkTextConfig",
        {**LOCAL, "moe_hidden_size": 16, "num_attention_heads": 4},
        (),
    ),
    "inkling": ("inkling", "InklingMoE", "InklingTextConfig", {**GROUPED, "n_shared_experts": 2}, ()),
    "inkling2": ("inkling2", "Inkling2SparseMoeBlock", "Inkling2TextConfig", {**GROUPED, **LOCAL}, ()),
}


def make_block(name: str, **fields: Any) -> tuple[nn.Module, Any]:
    """Return a block of Transformers with weights and biases that all show in its output, and its config."""
    package, block_class, config_class, own, arguments = {**BLOCKS, **REFUSED}[name]
    try:
        modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        configuration = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
        block_of, config_of = getattr(modeling, block_class), getattr(configuration, config_class)
    except (ImportError, AttributeError):
        pytest.skip(f"this release of Transformers has no {block_class}")
    config = config_of(**{**own, **fields})
    torch.manual_seed(0)
    block = block_of(config, *arguments)
    with torch.no_grad():
        for parameter_name, tensor in (*block.named_parameters(), *block.named_buffers()):
            # A bias on the choice changes it, and leaves it to the scores.
            nn.init.normal_(tensor, std=0.2 if parameter_name.endswith("bias") else 0.15)
    return block.eval(), config


def config_of(reading: BlockReading, config: Any) -> HfMoeConfig:
    """Return the config of a model whose only layer is the block."""
    text = LlamaConfig(
        hidden_size=HIDDEN,
        hidden_act=config.hidden_act,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
    )
    return HfMoeConfig(text_config=text, moe_config={"layers": [0], **reading.fields})


def make_layer(block: nn.Module, reading: BlockReading, config: Any) -> Block:
    """Return the block of a reading, with the block's tensors."""
    whole = config_of(reading, config)
    layer = build_block(whole, whole.moe_config, layer_spec(whole.moe_config, whole.text_config, 0, read_ffn(block)))
    initialize_mechanisms(layer, 0.02)
    missing, unexpected = layer.load_state_dict(reading.state(block.state_dict()), strict=False)
    assert not unexpected
    assert {name.rpartition(".")[2] for name in missing} <= {"load", "e_score_correction_bias"}
    return layer.eval()
