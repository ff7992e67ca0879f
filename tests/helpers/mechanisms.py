"""One case per mechanism: a tiny model that runs it, and rows for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, CLIPVisionConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.context import routers_of
from hf_moe.modeling.inputs import conditions_read

from .hosts.recurrent import MAMBA_1


IMAGE, POSITIONS = 63, 10
# The columns of a row that are an image.
PICTURE = slice(2, 6)
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Case:
    """What a mechanism needs besides the defaults.

    Attributes:
        options: of the mechanism itself.
        moe: other fields of `moe_config`.
        place: where it is used: `""` in the decoder, `"vision"` in a tower.
        host: the type of the decoder.
        text: fields of the decoder's config.
        tower: fields of the vision tower's config.
        exempt: checks that it cannot pass, each with the reason. A check that it passes all the same is an error.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    moe: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    host: str = "llama"
    text: Mapping[str, Any] = field(default_factory=dict)
    tower: Mapping[str, Any] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)


JAMBA = {"num_experts": 1, "attn_layer_period": 3, "attn_layer_offset": 2, **MAMBA_1}
ONE_SLOT = {"num_experts_per_tok": 1}
BANKS = {"text": {"num_experts": 2}, "vision": {"num_experts": 2, "intermediate_size": 16}}

TASKS: dict[str, Any] = {
    "objectives": {"load_balance": 0.01, "tasks": {"name": "signal", "signal": "task_contrast", "coef": 0.1}},
    "num_shared_experts": 1,
}
VQ_LOSS: dict[str, Any] = {"name": "signal", "signal": "vq_loss", "coef": 0.1}
VQ: dict[str, Any] = {"objectives": {"load_balance": 0.01, "codes": VQ_LOSS}, "num_shared_experts": 1}
CONTRAST: dict[str, Any] = {"objectives": {"signal": {"coef": 0.1, "signal": "prototype_contrast"}}}
NO_LOSS: dict[str, Any] = {"objectives": {}}
EMBEDDED = {"embedding": {"name": "signal", "signal": "embedding_loss", "coef": 0.1}, "load_balance": 0.01}
WHOLE_PROMPT = {name: "the experts are merged for the whole prompt" for name in ("causality", "decoding")}
NO_CHOICE = {"disabled": "its experts are not chosen"}
ACTIVE_LOSS = {"objectives": {"active_balance": 0.01}}
CHOICE_LOSS = {"objectives": {"signal": {"coef": 1.0, "signal": "choice_loss"}}}
DEPTH_LOSS = {"objectives": {**CHOICE_LOSS["objectives"], "load_balance": 0.01}}
CHOICE_OF_A_BATCH = {"micro_batches": "while training, experts choose among the tokens of a batch"}
STABLE = {name: {"name": "signal", "signal": name, "coef": 0.3} for name in ("overload", "distillation")}
OVERLAP = {"orthogonality": {"name": "signal", "signal": "output_overlap", "coef": 0.1}}
NOISY_GATES = {"micro_batches": "every micro-batch draws noise for its conditions"}
NOISY_BATCH = {name: "a batch draws its noise at once" for name in ("micro_batches", "padding")}
LOOKS_AHEAD = {"decoding": "the last token of a call does not know the modality of the next"}

# Kind -> name -> case; a second case of one mechanism is called `name-variant`.
CASES: dict[str, dict[str, Case]] = {
    "router": {
        "adamoe": Case({"num_null_experts": 2}),
        "aoe": Case(moe={"experts": "aoe"}),
        "anyexperts": Case({"min_slots": 1, "max_slots": 4}),
        "becotta": Case(exempt=NOISY_BATCH),
        "base_layers": Case(
            moe={**ONE_SLOT, **NO_LOSS},
            exempt={"micro_batches": "while training, tokens and experts of a batch are matched"},
        ),
        "cmoe_contextual": Case(
            {"contexts": {"chart": [0], "photo": [1], "text": [2]}},
            {
                "objectives": {
                    "load_balance": 0.01,
                    "context": {"name": "signal", "signal": "context_loss", "coef": 0.1},
                }
            },
        ),
        "condition": Case(moe=NO_LOSS, exempt=NO_CHOICE),
        "condition-rule": Case({"rule": [3, -1, 0, 1, 2]}, NO_LOSS, exempt=NO_CHOICE),
        "constant": Case(moe=NO_LOSS, exempt=NO_CHOICE),
        "dselect_k": Case(),
        "dselect_k-condition": Case({"conditioning": "condition", "condition": "domain", "num_conditions": 3}),
        "dynamic_moe_top_p": Case(),
        "dynmoe": Case(),
        "ernie45_vl": Case(moe={"num_experts_per_tok": 1}),
        "ernie45_vl-banks": Case(moe={"expert_banks": BANKS, "num_experts": None}),
        "evomoe_dtr": Case(),
        "evomoe_dts": Case(exempt=NOISY_BATCH),
        "hash_layers": Case(moe=NO_LOSS, exempt=NO_CHOICE),
        "hash_layers-bigram": Case({"hash_of": "bigram", "num_rows": 97}, NO_LOSS, exempt=NO_CHOICE),
        "hash_layers-previous": Case({"hash_of": "previous", "codebook_size": 4}, NO_LOSS, exempt=NO_CHOICE),
        "expert_choice": Case(moe=NO_LOSS),
        "expert_choice-capped": Case({"group": "sequence", "capacity_factor": 0.75, "max_experts_per_tok": 2}),
        "expert_choice-batch": Case({"group": "batch", "decode_mode": "token_choice"}, exempt=CHOICE_OF_A_BATCH),
        "expert_choice-vision": Case(moe=NO_LOSS, place="vision"),
        "ge_le_gate": Case(moe=NO_LOSS),
        "ge_le_gate-instruction": Case({"end_token_id": 7}, NO_LOSS),
        "grap": Case(),
        "home": Case(),
        "home-hierarchy": Case({"experts_of": [[0, 1, 2], [0, 1, 3]], "self_gate": True}),
        "home-task": Case(
            {
                "experts_of": [[0, 1], [0, 2], [0, 1, 3]],
                "self_gate": True,
                "conditioning": "condition",
                "num_conditions": 3,
            }
        ),
        "hmoe_hierarchical": Case({"num_groups": 2}),
        "hmoe_hierarchical-softmax": Case({"num_groups": 2, "top_k_groups": 1, "gate_level1": "softmax"}),
        "grin": Case({"sample_in_training": False}),
        "grin-sampled": Case({"jitter_eps": 0.5}, exempt=NOISY_BATCH),
        "intuition_mor1e": Case({"num_clusters": 3}),
        "llama4": Case(moe=ONE_SLOT),
        "meo": Case({"block_size": 3}, NO_LOSS),
        "meo-whole": Case({"block_size": None}, NO_LOSS, exempt=WHOLE_PROMPT),
        "maskmoe": Case({"visible_experts_frequent": 2}),
        "mlp": Case(),
        "mlp-prefix_mean": Case({"gate_input": "prefix_mean", "activation": "tanh", "gate_hidden_size": 5}),
        "ming_multi_router": Case(),
        "ming_multi_router-v2": Case({"gate": "sigmoid_bias"}),
        "mixer_reconstructors": Case({"refit_every": 1, "reservoir_size": 8}, {**ONE_SLOT, **NO_LOSS}),
        "modality": Case(moe={"num_experts": 2, **NO_LOSS}, exempt=NO_CHOICE),
        "modality-share": Case({"share": True}, {"num_experts": 2, **NO_LOSS}, exempt=NO_CHOICE),
        "mmoe_multilinear": Case(moe=NO_LOSS),
        "mofme": Case(),
        "mofme-passes": Case({"uncertainty_passes": 5}, exempt=NOISY_BATCH),
        "mmoe_multilinear-softmax": Case({"gate_activation": "softmax"}),
        "moec": Case(),
        "moore": Case(moe=NO_LOSS),
        "moore-modality": Case({"conditioning": "modality"}, NO_LOSS),
        "moiie": Case(),
        "moiie-next_token": Case({"boundary_rule": "next_token"}, exempt=LOOKS_AHEAD),
        "nexus": Case({"domain_embedding_dim": 6, "projection_hidden": 12}),
        "promoe_prototypical": Case(moe=CONTRAST),
        "promoe_prototypical-reserved": Case({"reserved_modalities": ["image"], "score": "sigmoid"}, CONTRAST),
        "sequence": Case(),
        "sequence-instruction": Case({"end_token_id": 7, "centred": True}),
        "mixture_of_tokens": Case(moe=NO_LOSS, exempt={"micro_batches": "while training, rows of a batch are mixed"}),
        "moma": Case(moe=CHOICE_LOSS, exempt=CHOICE_OF_A_BATCH),
        "moma-gumbel": Case(
            {"gumbel_noise": True},
            CHOICE_LOSS,
            exempt=NOISY_BATCH,
        ),
        "omni_router": Case(),
        "omni_router-modalities": Case({"modalities": ["text", "image"]}),
        "omni_smola": Case(moe={"num_experts": 6, **NO_LOSS}),
        "omni_smola-sequence": Case(
            {"scope": "sequence", "num_text_experts": 0, "slots_per_expert": 2}, NO_LOSS, "vision"
        ),
        "rmoe_layerwise": Case({"router_state_dim": 8}),
        "rmoe_layerwise-rnn": Case({"router_state_dim": 8, "router_cell": "rnn"}),
        "smora": Case(),
        "soft_moe": Case(moe=NO_LOSS, place="vision"),
        "soft_moe-normalized": Case({"slots_per_expert": 2, "normalize": True}, NO_LOSS, "vision"),
        "speechmoe": Case({"route_embedding_dim": 8, "embedding_classes": 48}, {**ONE_SLOT, "objectives": EMBEDDED}),
        "stablemoe": Case(moe={**ONE_SLOT, "objectives": STABLE}),
        "t2mir": Case(exempt=NOISY_BATCH),
        "t2mir-still": Case({"noise_epsilon": None}),
        "top_k": Case(),
        "top_k-sigmoid": Case({"score_function": "sigmoid", "routed_scaling_factor": 2.0}),
        "top_k-capacity": Case({"capacity_factor": 1.0}),
        "top_k-priority": Case({"capacity_factor": 1.0, "capacity_order": "score"}),
        "top_k-modality": Case({"modality_bias": "logits"}),
        "top_k-embedding": Case({"modality_bias": "input"}),
        "top_k-bias": Case({"score_function": "sigmoid", "bias_update_rate": 0.001, "n_group": 2, "topk_group": 1}),
        "uniperceiver_moe": Case(
            {"num_attributes": 3}, NO_LOSS, exempt={"micro_batches": "a batch draws its noise at once"}
        ),
        "uniperceiver_moe-mixed": Case({"level": "modality", "gate_noise_std": 0.0, "merge": False}),
        "uniperceiver_moe-task": Case({"level": "task", "gate_noise_std": 0.0}, NO_LOSS),
        "uniperceiver_moe-modality": Case({"level": "modality", "gate_noise_std": 0.0}, NO_LOSS),
        "uoe": Case(),
        "uoe-data": Case({"selection": "data"}, NO_LOSS, "vision"),
        "unimoe_audio": Case({"num_shared_experts": 1, "jitter_noise": 0.0}, ACTIVE_LOSS),
        "unimoe_audio-banks": Case(
            {"dynamic_weights": "uniform", "jitter_noise": 0.0, "num_null_experts": 2},
            {"expert_banks": BANKS, "num_experts": None, **ACTIVE_LOSS},
        ),
        "wemoe": Case({"block_size": 3}, {"num_experts_per_tok": 4, **NO_LOSS}),
        "wemoe-linear": Case({"block_size": 3, "router_hidden_layers": 1}, {"num_experts_per_tok": 3, **NO_LOSS}),
        "wemoe-constant": Case({"router_hidden_layers": 0}, {"num_experts_per_tok": 4, **NO_LOSS}),
        "wemoe-whole": Case({"block_size": None}, {"num_experts_per_tok": 4, **NO_LOSS}, exempt=WHOLE_PROMPT),
    },
    "experts": {
        "ffn": Case(),
        "aoe": Case(moe={"router": "aoe"}),
        "grove_moe": Case({"adjugate_size": 8, "adjugate_scale": 0.5}, {"num_experts_per_tok": 3}),
        "home": Case({"feature_gate_rank": 2}),
        "home-plain": Case({"expert_norm": "none"}),
        "onecat": Case({"scale_adapter_rank": 4}),
        "hecto": Case({"recurrent_size": 6}, {"router": "sequence"}),
        "hecto-tokens": Case({"recurrent_size": 4, "num_recurrent": 2}),
        "rmoe_residual": Case(),
        "mole_latent": Case({"latent_dim": 8, "latent_group_size": 2}),
        "mpoe": Case({"central_mask_prob": 0.0, "init_noise": 0.1}),
        "mpoe-three_cores": Case({"num_cores": 3, "bond_dim": 6, "central_mask_prob": 0.0}),
        "mote_ternary": Case({"activation_bits": None}),
        "mote_ternary-packed": Case({"activation_bits": None, "weight_scale": "row", "packed": True}),
        "mofme": Case({"modulation_rank": 4}),
        "mofme-full": Case({"modulation": "full", "base_block": "identity"}),
        "mofme-vector": Case({"modulation": "vector"}),
        "mmoe_multilinear": Case(moe={"router": "mmoe_multilinear", **NO_LOSS}),
        "mmoe_multilinear-tr": Case({"form": "tr", "rank": 5}),
        "ffn-shared": Case(moe={"num_shared_experts": 1, "shared_expert_gate": True, "granularity": 2}),
    },
    "objective": {
        "active_balance": Case(
            {"final_coef": 0.02}, {"router": {"name": "unimoe_audio", "num_shared_experts": 1, "jitter_noise": 0.0}}
        ),
        "condition_information": Case({"condition": "domain", "num_conditions": 3}),
        "expert_contrast": Case(moe=ONE_SLOT),
        "global_entropy": Case({"min_experts": {"text": 4, "image": 4}}),
        "load_balance": Case(),
        "load_balance-by_width": Case({"by_width": True}, {"expert_banks": BANKS, "num_experts": None}),
        "load_balance-sequence": Case({"scope": "sequence"}),
        "load_balance-within_groups": Case({"within_groups": 2}),
        "local_entropy": Case(),
        "locality": Case({"num_nodes": 4, "condition": "domain"}),
        "mean_importance": Case(),
        "moa_image": Case(moe={"attention": {"name": "attention_experts", "num_experts": 2}}),
        "null_load": Case(moe={"router": "adamoe"}),
        "router_orthogonality": Case(moe={"router": "ernie45_vl"}),
        "router_z": Case(),
        "signal": Case(moe={"router": {"name": "anyexperts", "min_slots": 1, "max_slots": 4}}),
        "sparsity_l1": Case(),
        "smar": Case(moe={"router": {"name": "top_k", "modality_bias": "logits"}}),
        "slot_budget": Case(moe={"router": {"name": "anyexperts", "min_slots": 1, "max_slots": 4}}),
    },
    "block": {
        "chain_of_experts": Case(moe={"num_shared_experts": 1}),
        "chain_of_experts-one_decision": Case({"independent_routers": False}),
        "cartesian_moe": Case(moe={"num_shared_experts": 1}),
        "cartesian_moe-no_norm": Case({"inner_norm": False}),
        "mh_moe": Case(moe={"num_shared_experts": 1}),
        "mh_moe-no_parity": Case({"num_heads": 4, "parity": False}),
        "moore": Case(moe={"num_shared_experts": 1, "num_experts_per_tok": 3}),
        "moore-penalty": Case({"mode": "penalty"}, {"objectives": OVERLAP}),
        "smoe_stratified": Case(moe={"num_shared_experts": 1}),
        "smoe_stratified-three": Case({"strata": [1, 1, 2]}),
        "t2mir": Case(
            {"num_task_experts": 6, "num_tasks": 3},
            TASKS,
            exempt={"gradients": "tasks are contrasted with those of an earlier step, and there is none"},
        ),
        "vqmoe": Case({"num_codes": 6}, VQ),
        "vqmoe-revived": Case({"num_codes": 6, "revive": True, "modalities": ["text", "image"]}, VQ),
        "vqmoe-discrete_only": Case(
            {"num_codes": 6, "distance": "cos", "discrete_only": True},
            # In the place of a balance loss, which has no probabilities to balance.
            {"objectives": {"load_balance": VQ_LOSS}},
        ),
        "moe": Case(),
        "moe-residual": Case(moe={"num_shared_experts": 1, "residual_mix": True}),
    },
    "attention": {
        "attention_experts": Case({"num_experts": 4}),
        "attention_experts-share_kv": Case({"num_experts": 3, "num_experts_per_tok": 2, "share_kv": True}),
        "mae_attentive_experts": Case(),
        "mae_attentive_experts-pairs": Case({"dropped_heads": 2, "inference": "argmax"}),
        "moa_attention_heads": Case({"num_experts": 6}, text={"num_key_value_heads": 1}),
        "uoe": Case(),
    },
    "layer": {
        "mixture_of_depths": Case({"capacity": 0.4}, DEPTH_LOSS),
        "mixture_of_depths-predictor": Case(
            {"every": 1, "capacity": 0.3, "inference": "predictor", "per_modality_capacity": {"image": 0.5}},
            DEPTH_LOSS,
        ),
        "mixture_of_mamba": Case(host="jamba", text=JAMBA),
        "mixture_of_mamba-x_proj": Case({"split": ["x_proj"], "split_norm": False}, host="jamba", text=JAMBA),
        "mot_transformers": Case(),
        "mot_transformers-attention": Case({"untie": ["attention"]}),
        "parallel_block": Case(),
        "mot_transformers-blocks": Case(
            moe={"attention_blocks": "image"}, exempt={"decoding": "an image that is cut in two does not see itself"}
        ),
    },
    "connector": {"mlp": Case(), "pixel_shuffle": Case(tower={"patch_size": 4})},
    "host": {"composed": Case()},
}


def name_of(key: str) -> str:
    return key.partition("-")[0]


def config_of(kind: str, key: str) -> HfMoeConfig:
    case = CASES[kind][key]
    named = {"name": name_of(key), **case.options}
    moe = {"layers": "from_1", "num_experts": 4, "objectives": {"load_balance": 0.01}, **case.moe}
    tower = kind in ("connector", "host") or case.place == "vision"
    if kind == "objective":
        moe["objectives"] = {named["name"]: {**named, "coef": 0.1}}
    elif kind not in ("connector", "host"):
        moe[kind] = named
    if case.place:
        configs = {"moe_config": {"layers": []}, f"{case.place}_moe_config": {**moe, "layers": "all"}}
    else:
        configs = {"moe_config": moe}
    return HfMoeConfig(
        text_config=CONFIG_MAPPING[case.host](**{**TEXT, **case.text}),
        vision_config=CLIPVisionConfig(**{**TOWER, **case.tower}) if tower else None,
        connector=named if kind == "connector" else "mlp",
        image_token_id=IMAGE if tower else None,
        initializer_range=0.15,
        **configs,
    )


@torch.no_grad()
def build(kind: str, key: str, **options) -> HfMoeForConditionalGeneration:
    """Return a model whose weights have moved a little, so that none is zero and no two are equal."""
    torch.manual_seed(0)
    model = HfMoeForConditionalGeneration._from_config(config_of(kind, key), **options)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def make_rows(model: HfMoeForConditionalGeneration, rows: int = 3, seed: int = 1) -> dict[str, Any]:
    """Return rows of text with one image each, and the conditions of every row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (rows, POSITIONS), generator=generator)
    types = torch.zeros_like(ids)
    types[:, PICTURE] = 1
    # Each row has another number of labels, and none for the first token, which padding would have to foretell.
    labels = ids.masked_fill(torch.arange(POSITIONS) <= torch.arange(rows)[:, None], -100)
    batch = {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["condition_ids"] = {"domain": torch.arange(rows) % 3}
    for name, count in conditions_read(routers_of(model).values()).items():
        features = torch.rand(rows, 3, generator=generator)
        batch["condition_ids"][name] = torch.arange(rows) % count if count else features
    if model.config.image_token_id is None:
        return batch
    ids[:, PICTURE] = IMAGE
    pixels = torch.randn(rows, 3, TOWER["image_size"], TOWER["image_size"], generator=generator)
    return {**batch, "pixel_values": pixels}


def take(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: take(value, rows) if isinstance(value, dict) else value[rows] for name, value in batch.items()}


def until(batch: dict[str, Any], end: int) -> dict[str, Any]:
    """Return the first columns of every row."""
    return {name: value[:, :end] if name in TOKENS else value for name, value in batch.items()}


TOKENS = ("input_ids", "mm_token_type_ids", "attention_mask", "labels")


def padded(batch: dict[str, Any], width: int, filler: int = 0) -> dict[str, Any]:
    """Put padding before every row, with the id `filler`."""
    values = {"input_ids": filler, "labels": -100, "mm_token_type_ids": 0, "attention_mask": 0}
    added = {name: torch.nn.functional.pad(batch[name], (width, 0), value=value) for name, value in values.items()}
    return {**batch, **added}
