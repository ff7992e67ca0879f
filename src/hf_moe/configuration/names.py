"""Names of mechanisms that are another one with options of its own.

A config may use them, and those of earlier versions do. What is built, and saved again, is the mechanism itself.
"""

from typing import Any


ALIASES: dict[str, dict[str, dict[str, Any]]] = {
    "block": {"multi_head_moe": {"name": "mh_moe", "num_heads": 4, "parity": False}},
    "router": {
        "deepseek_v3": {"name": "top_k", "score_function": "sigmoid", "bias_update_rate": 0.001},
        "deepseekmoe": {"name": "top_k", "norm_topk_prob": False},
        "soft_moa": {"name": "soft_moe"},
        "switch_transformer": {
            "name": "top_k",
            "norm_topk_prob": False,
            "capacity_factor": 1.25,
            "jitter_noise": 0.01,
            "init_scale": 0.1,
        },
    },
}


def without_alias(kind: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the `name` and options of a mechanism of `kind`, under the name that it has today."""
    alias = ALIASES.get(kind, {}).get(entry["name"])
    return entry if alias is None else {**alias, **{key: value for key, value in entry.items() if key != "name"}}
