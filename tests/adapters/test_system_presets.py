"""The numbers of every published system and variant, so that no preset changes unnoticed."""

import inspect

import pytest

from hf_moe import MoeLoraConfig, list_systems
from hf_moe.configuration.systems import load_system
from hf_moe.modeling.mechanisms import get_mechanism


ATTENTION, FEED_FORWARD = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
PLAIN = {"router": "constant", "num_experts": 1, "num_experts_per_tok": 1}
MIXLORA = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "target_modules": [*FEED_FORWARD, "q_proj", "v_proj"],
    "ffn_experts": True,
    "router": {"name": "top_k"},
    "objectives": {"load_balance": 0.01},
    "target_overrides": dict.fromkeys(ATTENTION, PLAIN),
    "model_part": "language_model",
}
INTUITION = {
    "r": 1,
    "lora_alpha": 1,
    "num_experts": 8 * 8,
    "num_experts_per_tok": 8,
    "experts": {"name": "rank1_pairs"},
    "target_modules": ["q_proj", "k_proj", "v_proj", *FEED_FORWARD],
    "router": {"name": "intuition_mor1e", "num_clusters": 16},
    "router_input": "target",
    "model_part": "language_model",
}
SOFT = {
    "num_experts": 10,
    "num_experts_per_tok": None,
    "router": {"name": "top_k"},
    "router_input": "target",
    "model_part": "language_model",
}
PERFT = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ["mlp"],
    "router_input": "target",
    "model_part": "language_model",
}
PILL = {
    "r": 32,
    "lora_alpha": 32,
    "experts": {"name": "bottleneck", "activation": "silu", "gated": True, "position": "sequential"},
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "router": {"name": "modality", "modalities": ["text", "image"]},
    "model_part": "language_model",
}
MOA = {
    "r": 768 // 8,
    "lora_alpha": 768 // 8,
    "num_experts": 8,
    "num_experts_per_tok": None,
    "experts": {"name": "bottleneck", "activation": "gelu"},
    "target_modules": ["mlp"],
    "router_input": "target",
    "model_part": "towers",
}
SMOLA = {"r": 4, "lora_alpha": 4, "num_experts_per_tok": None, "router_input": "target"}
# What differs from a config that is given nothing.
PRESETS = {
    ("becotta", None): {
        "r": 8,
        "lora_alpha": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "experts": {"name": "bottleneck", "activation": "gelu", "position": "sequential"},
        "target_modules": r"(?!.*\.\d+\.).*\.(layers|layer|blocks|block|h)\.\d+",
        "router": {"name": "becotta", "num_domains": 4},
        "router_input": "target",
        "objectives": {"condition_information": {"coef": 0.0005, "condition": "domain", "num_conditions": 4}},
        "model_part": "language_model",
    },
    ("intuition_mor1e", "intuition"): INTUITION,
    ("intuition_mor1e", "plain"): {**INTUITION, "router": {"name": "intuition_mor1e", "num_clusters": 0}},
    ("kshot_lora_moe", "softmax"): {"num_experts_per_tok": None, "router_input": "target"},
    ("kshot_lora_moe", "top_k"): {"num_experts_per_tok": 2, "router_input": "target"},
    ("mixlora", "top_k"): MIXLORA,
    ("mixlora", "top_p"): {
        **MIXLORA,
        "router": {"name": "dynamic_moe_top_p", "top_p_threshold": 0.8, "norm_topk_prob": True},
    },
    ("mixlora", "switch"): {
        **MIXLORA,
        "num_experts_per_tok": 1,
        "router": {
            "name": "top_k",
            "norm_topk_prob": False,
            "capacity_factor": 1.25,
            "jitter_noise": 0.01,
            "init_scale": 0.1,
        },
        "objectives": {"load_balance": 0.01, "router_z": 0.01},
    },
    ("moe_redundancy_plora", None): {
        "r": 16,
        "lora_alpha": 32,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "target_modules": ATTENTION,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "router": {"name": "modality", "modalities": ["image"]},
        "model_part": "language_model",
    },
    ("mov_molora", "mov"): {
        **SOFT,
        "experts": {"name": "ia3", "feedforward_modules": ["down_proj"]},
        "target_modules": ["k_proj", "v_proj", "down_proj"],
    },
    ("mov_molora", "molora"): {**SOFT, "r": 4, "lora_alpha": 4, "target_modules": [*ATTENTION, *FEED_FORWARD]},
    ("octavius", None): {
        "r": 8,
        "lora_alpha": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "target_modules": [*ATTENTION, *FEED_FORWARD],
        "router": {"name": "sequence", "modalities": ["text"]},
        "router_input": "model",
        "model_part": "language_model",
    },
    ("perft", "R"): {
        **PERFT,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "router": {"name": "top_k", "norm_topk_prob": False},
    },
    ("perft", "E"): {**PERFT, "target_modules": ["mlp.experts"], "router": {"name": "host"}},
    ("perft", "D"): {**PERFT, "num_experts": 8, "num_experts_per_tok": None, "router": {"name": "constant"}},
    ("perft", "S"): {**PERFT, "num_experts": 1, "num_experts_per_tok": 1, "router": {"name": "constant"}},
    ("pill", "instruct"): {
        **PILL,
        "target_modules": ["input_layernorm", "post_attention_layernorm", "v_proj"],
        "target_overrides": {
            "input_layernorm": {"router": "constant", "num_experts": 1},
            "v_proj": {
                "experts": "value_gate",
                "router": {"name": "modality", "modalities": ["image"]},
                "num_experts": 1,
            },
        },
    },
    ("pill", "caption"): {**PILL, "target_modules": ["post_attention_layernorm"], "frozen_experts": [0]},
    ("smora", None): {
        "r": 1,
        "lora_alpha": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "target_modules": [*ATTENTION, *FEED_FORWARD],
        "router": {"name": "smora"},
        "router_input": "target",
        "model_part": "language_model",
    },
    ("omni_smola", "token"): {
        **SMOLA,
        "model_part": "language_model",
        "num_experts": 48,
        "target_modules": [*ATTENTION, *FEED_FORWARD],
        "router": {"name": "omni_smola", "scope": "token"},
    },
    ("omni_smola", "sequence"): {
        **SMOLA,
        "model_part": "towers",
        "num_experts": 16,
        "target_modules": "all-linear",
        "router": {"name": "omni_smola", "scope": "sequence", "num_text_experts": 0, "num_vision_experts": 0},
    },
    ("ge_le_gate", None): {
        "r": 8,
        "lora_alpha": 16,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "target_modules": [*ATTENTION, *FEED_FORWARD],
        "router": {"name": "ge_le_gate"},
        "router_input": "model",
        "model_part": "language_model",
    },
    ("lora", None): {
        "r": 8,
        "lora_alpha": 16,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "target_modules": ["q_proj", "v_proj"],
        "experts": {"name": "lora"},
        "router": {"name": "constant"},
    },
    ("task_moe", None): {
        "model_part": "language_model",
        "r": 8,
        "lora_alpha": 8,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "target_modules": [*ATTENTION, *FEED_FORWARD],
        "router": {"name": "condition"},
    },
    ("soft_moa", "soft"): {**MOA, "router": {"name": "soft_moe", "slots_per_expert": 1}},
    ("soft_moa", "dense"): {**MOA, "router": {"name": "top_k"}},
}
# Published numbers that are the defaults of an option: of which router, and which option.
DEFAULTS = [
    ("smora", "bias_update_rate", 1e-5),
    ("smora", "bias_in_weights", True),
    ("soft_moe", "normalize", False),
    ("top_k", "norm_topk_prob", True),
    ("sequence", "norm_topk_prob", True),
    ("sequence", "pooling", "mean"),
    ("becotta", "pooling", "sum"),
]


@pytest.mark.parametrize("key, variant", PRESETS)
def test_a_preset_sets_the_published_numbers(key, variant):
    expected = {**PRESETS[key, variant]}
    if isinstance(expected.get("target_modules"), list):
        expected["target_modules"] = set(expected["target_modules"])
    found, plain = MoeLoraConfig.from_system(key, variant=variant).to_dict(), MoeLoraConfig().to_dict()
    assert found == {**plain, **expected, "system": key}
    if [variant] == list(load_system(key).variants)[:1]:
        assert MoeLoraConfig.from_system(key).to_dict() == found


@pytest.mark.parametrize("router, option, value", DEFAULTS)
def test_a_router_defaults_to_the_published_number(router, option, value):
    assert inspect.signature(get_mechanism("router", router)).parameters[option].default == value


def test_x_lora_sets_the_published_numbers():
    config = MoeLoraConfig.from_system("x_lora", hidden_size=32, adapters=["a", "b"])
    fields = ("xlora_depth", "xlora_size", "layerwise_scalings", "enable_softmax", "softmax_temperature")
    assert [getattr(config, name) for name in fields] == [1, 2048, False, True, 1.0]
    assert config.top_k_lora is None and config.scaling_pass_value == 0.0
    assert config.adapters == {"0": "a", "1": "b"}


def test_no_system_and_no_variant_is_left_out_here():
    listed = [(system.key, variant) for system in list_systems("adapter") for variant in system.variants or [None]]
    assert sorted(map(str, listed)) == sorted(map(str, [*PRESETS, ("x_lora", None)]))


def test_settings_of_a_target_follow_the_merged_fields():
    config = MoeLoraConfig.from_system("mixlora", target_overrides={"q_proj": {"r": 2}})
    settings = config.settings("model.layers.0.self_attn.q_proj")
    assert (settings.router["name"], settings.num_experts, settings.r) == ("constant", 1, 2)
