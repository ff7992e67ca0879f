"""Every field of the two configs, and every option of every mechanism."""

import inspect
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from outcomes import Case
from transformers import CLIPVisionConfig, LlamaConfig
from values import (
    NONSENSE,
    count,
    flag,
    nothing,
    number,
    one_of,
    optional,
    positive,
    real,
    share,
    whole,
)

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, MoeConfig, RoutingOverrides
from hf_moe.configuration.composed_config import ComposedConfig
from hf_moe.modeling.mechanisms import get_mechanism, mechanism_names


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = 7


def result_of(config: dict[str, Any], tower: bool, overrides: RoutingOverrides | None = None) -> Any:
    """Build the model of a config, and return its logits and the loss of a training step.

    Of a decoder or a tower by default, which is large, the config is all that is built.
    """
    given = {"text_config": LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=32), "image_token_id": IMAGE}
    if tower:
        given["vision_config"] = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    built = HfMoeConfig(**{**given, **config})
    if config.keys() & {"text_config", "vision_config"}:
        return built.to_json_string()
    torch.manual_seed(0)
    model = HfMoeForConditionalGeneration(built).eval()
    ids = torch.arange(8, 32).view(2, 12)
    batch: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": (ids % 2 == 0).long()}
    if tower:
        ids[:, : model.config.image_seq_length] = model.config.image_token_id
        pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
        batch = {"input_ids": ids, "pixel_values": pixels}
    batch["condition_ids"] = {name: torch.zeros(2, dtype=torch.long) for name in ("domain", "task")}
    with torch.no_grad():
        logits = model(**batch, routing_overrides=overrides).logits
    torch.manual_seed(0)
    loss = model.train()(**batch, labels=ids).loss
    loss.backward()
    return [logits, loss.detach()]


usual_result = cache(lambda key, tower: result_of(eval(key), tower))  # noqa: S307


def case(group: str, place: str, value: Any, config: dict, usual: dict, tower: bool, sensible: bool) -> Case:
    return Case(
        group, place, value, partial(result_of, config, tower), partial(usual_result, repr(usual), tower), sensible
    )


def per_layer(test: Any) -> Any:
    """A value, or a map from layer to value; no decoder here has a layer 99."""

    def allowed(value: Any) -> bool:
        if not isinstance(value, dict):
            return test(value)
        return bool(value) and set(value) <= {"default", "0", "1"} and all(map(test, value.values()))

    return allowed


def a_list_of_layers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, int) and 0 <= item < 2 for item in value)


# What may stand in a field, by hand.
MOE_FIELDS = {
    "layers": a_list_of_layers,
    "num_experts": per_layer(optional(lambda value: whole(value, 2))),
    "num_experts_per_tok": per_layer(optional(lambda value: whole(value, 1, 8))),
    "num_shared_experts": per_layer(lambda value: whole(value, 0)),
    "granularity": per_layer(lambda value: whole(value, 1, 24)),
    "expert_intermediate_size": per_layer(optional(count)),
    "shared_intermediate_size": per_layer(optional(nothing)),
    "shared_expert_gate": per_layer(flag),
    "expert_banks": optional(nothing),
    "router": nothing,
    "experts": nothing,
    "block": nothing,
    "attention": optional(nothing),
    "layer": optional(nothing),
    "objectives": lambda value: value is None or value == {},
    "residual_mix": per_layer(lambda value: value is False),
    "attention_blocks": lambda value: value in (None, "image", "audio"),
    "token_balanced_loss": flag,
}
CONFIG_FIELDS = {
    "host_type": optional(nothing),
    "host_class": optional(nothing),
    # A dict of fields is a Llama or a CLIP tower, and Transformers lets those hold any field.
    "text_config": optional(lambda value: isinstance(value, dict)),
    "vision_config": optional(lambda value: isinstance(value, dict)),
    "moe_config": lambda value: value is None or value == {},
    "vision_moe_config": lambda value: value is None or value == {},
    "audio_moe_config": optional(nothing),
    "connector_moe_config": lambda value: value is None or value == {},
    "connector": nothing,
    "image_token_id": lambda value: whole(value, 0, 8),
    "video_token_id": optional(lambda value: whole(value, 0, 31)),
    "audio_token_id": optional(lambda value: whole(value, 0, 31)),
    "image_seq_length": optional(lambda value: value == 4),
    "vision_feature_layer": optional(lambda value: whole(value, -3, 2)),
    "vision_feature_size": optional(nothing),
    "vision_prefix_tokens": optional(lambda value: whole(value, 0, 4)),
    "image_size": optional(nothing),
    "initializer_range": lambda value: real(value, 0, 100),
    "output_router_logits": flag,
    "tie_word_embeddings": flag,
    "config_format": lambda value: value == 1 and not isinstance(value, bool),
    "system": optional(lambda value: isinstance(value, str)),
    "hf_moe_version": optional(lambda value: isinstance(value, str)),
}
TOWER_FIELDS = ("connector", "image_", "vision_")


def config_cases() -> Iterator[Case]:
    """Yield every field of the configs with every value, and every name with a letter less."""
    for name in (*HfMoeConfig.__annotations__, *ComposedConfig.__annotations__):
        tower = name.startswith(TOWER_FIELDS) and name != "vision_config"
        for value in NONSENSE:
            yield case("config", name, value, {name: value}, {}, tower, CONFIG_FIELDS[name](value))
        yield case("config", name, 1, {name[:-2]: 1}, {}, False, False)
    for name in MoeConfig.__annotations__:
        for value in NONSENSE:
            config = {"moe_config": {name: value}}
            yield case("config", f"moe_config.{name}", value, config, {}, False, MOE_FIELDS[name](value))
        yield case("config", f"moe_config.{name}", 1, {"moe_config": {name[:-2]: 1}}, {}, False, False)
        yield case("config", f"moe_config.{name}", 1, {name: 1}, {}, False, False)
    for entry in ({"coef": value} for value in NONSENSE):
        config = {"moe_config": {"objectives": {"balance": {"name": "load_balance", **entry}}}}
        usual = {"moe_config": {"objectives": {"balance": {"name": "load_balance", "coef": 0.0}}}}
        yield case("config", "coef", entry["coef"], config, usual, False, real(entry["coef"], 0))
    for bank in ("num_experts", "intermediate_size"):
        for value in NONSENSE:
            sensible = per_layer(count)(value) or (bank == "intermediate_size" and value is None)
            banks = {"text": {"num_experts": 8, bank: value}}
            usual = {"moe_config": {"expert_banks": {"text": {"num_experts": 8}}}}
            config = {"moe_config": {"expert_banks": banks, "num_experts_per_tok": 1}}
            yield case("config", bank, value, config, usual, False, sensible)


def divides_eight(value: Any) -> bool:
    return whole(value, 1, 8) and 8 % int(value) == 0


# What may stand in an option, by hand, with eight experts and two slots a token.
OPTIONS = {
    "block_size": optional(lambda value: whole(value, 1)),
    "score_function": one_of("softmax", "sigmoid"),
    "norm_topk_prob": flag,
    "jitter_noise": share,
    "routed_scaling_factor": positive,
    "capacity_factor": optional(positive),
    "init_scale": positive,
    "num_null_experts": optional(count),
    "null_router_init": one_of("copy", "normal"),
    "n_group": lambda value: divides_eight(value) and int(value) < 8,
    "topk_group": lambda value: whole(value, 1, 1),
    "group_score": one_of("best_two", "best"),
    "isolated_banks": flag,
    "limit": optional(positive),
    "shared_limit": optional(positive),
    "order": one_of("before", "after"),
    "alpha": optional(positive),
    "bias_update_rate": lambda value: real(value, 0),
    "bias_in_weights": flag,
    "num_domains": count,
    "end_token_id": optional(lambda value: whole(value, 0)),
    "pooling": one_of("sum", "mean"),
    "centred": flag,
    "num_clusters": lambda value: whole(value, 0),
    "slots_per_expert": count,
    "router_hidden_layers": lambda value: whole(value, 0, 2),
    "init_lambda": lambda value: real(value, -1e9),
    "normalize": flag,
    "modalities": nothing,
    "gate": one_of("softmax", "sigmoid_bias"),
    "init_from_text_gate": flag,
    "group_fractions": nothing,
    "boundary_rule": one_of("none", "next_token"),
    "norm_min": positive,
    "boundary_token_ids": optional(
        lambda value: isinstance(value, list) and all(isinstance(item, int) and item >= 0 for item in value)
    ),
    "hyper_hidden": optional(count),
    "bottleneck_rank": count,
    "bottleneck_act": one_of("silu_gate_self", "split"),
    "per_modality": flag,
    "shared_router": flag,
    "top_p_threshold": share,
    "max_experts_per_tok": optional(lambda value: whole(value, 1, 8)),
    "min_slots": optional(lambda value: whole(value, 1, 2)),
    "max_slots": optional(lambda value: whole(value, 2, 8)),
    "target_slots": optional(lambda value: real(value, 1.1, 7.9)),
    "max_virtual_share": share,
    "virtual_output": one_of("zero", "identity"),
    "virtual_gate": one_of("included", "excluded"),
    "fusion_alpha": lambda value: real(value, -1e9),
    "importance_hidden": optional(count),
    "ste_tau": positive,
    "normalise": one_of("filled", "none"),
    "importance_norm": one_of("none"),
    "generator": one_of("hyper", "linear"),
    "probe_slot": lambda value: value is True,
    "dropout": lambda value: real(value, 0, 0.999),
    "scope": one_of("batch", "sequence", "token"),
    "per_gate": flag,
    "shares": one_of("slots", "tokens"),
    "expert_groups": optional(divides_eight),
    "temperature": positive,
    "condition": lambda value: value == "task",
    "num_conditions": count,
    "budget": optional(positive),
    "num_layers": count,
    "act": one_of("gelu", "relu"),
    "norm": flag,
    "pool": lambda value: value in (1, 2) and number(value) is not None,
    "scale_factor": lambda value: value in (1, 2) and number(value) is not None,
    "bias": flag,
    "bid": positive,
    "gate_gain": positive,
    "kappa": lambda value: real(value, 0),
    "gamma": positive,
    "init_experts": optional(lambda value: whole(value, 1, 8)),
    "record_steps": lambda value: whole(value, 1, 900),
    "tau_max": lambda value: real(value, 0.5),
    "tau_min": lambda value: real(value, 0, 1, open_low=True),
    "tau_decay": share,
    "gate_threshold": share,
    "hard_after": optional(share),
    "threshold": share,
    "threshold_rate": share,
    "jitter_eps": positive,
    "heun_prob": share,
    "sample_in_training": flag,
    "num_rows": optional(count),
    "codebook_size": count,
    "seed": lambda value: whole(value, 0),
    "num_groups": lambda value: divides_eight(value) and int(value) > 1,
    "top_k_groups": lambda value: whole(value, 1, 2),
    "weight_scale": one_of("matrix", "row"),
    "activation_bits": optional(lambda value: whole(value, 2, 8)),
    "packed": flag,
    "num_cores": lambda value: whole(value, 3) and int(value) % 2 == 1,
    "bond_dim": optional(count),
    "central_mask_prob": optional(share),
    "init_noise": lambda value: real(value, 0),
    "visible_experts_frequent": optional(lambda value: whole(value, 1, 8)),
    "visible_experts_rare": lambda value: whole(value, 1, 8),
    "frequent_mass": share,
    "image_experts": lambda value: value == [1, 2],
    "rule": optional(lambda value: value in ([-1], [1, 2])),
    "latent_dim": optional(lambda value: whole(value, 1, 8)),
    "latent_group_size": optional(divides_eight),
    "refit_every": count,
    "reservoir_size": lambda value: whole(value, 8),
    "ridge": positive,
    "group_size": optional(count),
    "final_temperature": optional(positive),
    "group_by_modality": flag,
    "share": flag,
    "inter_weight": lambda value: real(value, 0),
    "expert_dropout": share,
    "gumbel_noise": flag,
    "domain_embedding_dim": optional(count),
    "projection_hidden": optional(count),
    "contrast_tau": positive,
    "router_state_dim": count,
    "detach_router_state": flag,
    "route_embedding_dim": count,
    "embedding_classes": optional(count),
    "switch_fraction": share,
    "distill_dim": count,
    "num_shared_experts": lambda value: whole(value, 1, 5),
    "num_text_experts": optional(lambda value: whole(value, 0, 6)),
    "num_vision_experts": optional(lambda value: whole(value, 0, 6)),
    "num_attributes": count,
    "num_tasks": count,
    "gate_noise_std": optional(lambda value: real(value, 0)),
    "merge": flag,
    "experts_per_group": divides_eight,
    "adjugate_size": optional(count),
    "num_recurrent": lambda value: whole(value, 1, 7),
    "recurrent_size": optional(count),
    "adjugate_scale": lambda value: real(value, 0),
    "rank": optional(count),
    "modulation": one_of("full", "lowrank", "vector"),
    "modulation_rank": count,
    "base_block": one_of("glu", "identity"),
    "uncertainty_passes": lambda value: whole(value, 0),
    "router_dropout": lambda value: real(value, 0, 0.999),
    "expert_norm": one_of("rms", "none"),
    "feature_gate_rank": lambda value: whole(value, 0),
    "scale_adapter_rank": count,
    "selection": one_of("token"),
    "expert_capacity_fraction": lambda value: real(value, 0, 1, open_low=True),
    "residual_init_std": lambda value: real(value, 0),
    "final_coef": optional(lambda value: real(value, 0)),
    "within_groups": optional(divides_eight),
    "by_width": flag,
    "num_nodes": lambda value: whole(value, 1, 1),
    "smoothing": lambda value: real(value, 0, 0.999, open_low=True),
    "gate_hidden_size": optional(count),
    "foreground": lambda value: value in ([], ()),
    "answers": flag,
    "activation": one_of("gelu", "relu", "silu", "tanh"),
    "gate_input": one_of("token", "prefix_mean"),
    "zero_init": lambda value: value is False,
    "d_min": lambda value: real(value, 0, 2),
    "noise_epsilon": optional(lambda value: real(value, 0)),
    "d_low": optional(lambda value: whole(value, 5, 5)),
    "d_max": lambda value: real(value, 1.5),
}
# The rest of a config in which a mechanism is at home.
SURROUNDINGS: dict[str, dict[str, Any]] = {
    **{name: {"num_experts_per_tok": 1} for name in ("base_layers", "llama4", "mixer_reconstructors", "stablemoe")},
    "aoe": {"router": "aoe", "experts": "aoe"},
    "intuition_mor1e": {"num_experts": 4},
    "modality": {"num_experts": 2, "num_experts_per_tok": 1},
    "expert_contrast": {"num_experts_per_tok": 1},
    "moa_image": {"attention": "attention_experts"},
    "null_load": {"router": "adamoe"},
    "slot_budget": {"router": "anyexperts"},
    "router_orthogonality": {"router": "ernie45_vl"},
}


def home_of(kind: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a model that has the mechanism, with these options."""
    moe = {"num_experts": 8, "num_experts_per_tok": 2, **SURROUNDINGS.get(name, {})}
    if kind == "connector":
        return {"connector": {"name": name, **options}, "moe_config": moe}
    if kind == "objective":
        return {"moe_config": {**moe, "objectives": {name: {"coef": 0.1, **options}}}}
    return {"moe_config": {**moe, kind: {"name": name, **options}}}


def option_cases() -> Iterator[Case]:
    """Yield every option of every mechanism with every value, and every name with a letter less."""
    for kind in ("router", "experts", "objective", "connector"):
        for name in mechanism_names(kind):
            parameters = inspect.signature(get_mechanism(kind, name)).parameters.values()
            for option in (item.name for item in parameters if item.kind is item.KEYWORD_ONLY):
                usual, tower = home_of(kind, name, {}), kind == "connector"
                for value in NONSENSE:
                    sensible = per_layer(OPTIONS.get(option, nothing))(value) and kind in ("router", "experts")
                    sensible = sensible or OPTIONS.get(option, nothing)(value)
                    config = home_of(kind, name, {option: value})
                    yield case("options", option, value, config, usual, tower, sensible)
                yield case("options", option, 1, home_of(kind, name, {option[:-2]: 1}), usual, tower, False)


def override_cases() -> Iterator[Case]:
    """Yield test-time overrides of layers, experts and values that are none."""
    layer_values = [*NONSENSE, [0.0] * 8, [0.0] * 7, [float("nan")] * 8, torch.zeros(8, 1), torch.zeros(8), [8], [0]]
    for name in ("logit_offset", "disabled_experts", "expert_budget"):
        for value in layer_values:
            for given in (value,) if name == "expert_budget" else (value, {0: value}, {5: value}, {"0": value}):

                def run(name: str = name, given: Any = given) -> Any:
                    return result_of({}, False, RoutingOverrides(**{name: given}))

                sensible = name == "disabled_experts" and given in ({0: [0]}, {0: [1, 2]})
                yield Case("overrides", name, given, run, partial(usual_result, "{}", False), sensible)
