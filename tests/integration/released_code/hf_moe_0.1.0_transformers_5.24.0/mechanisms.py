# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 0c87989b7e063e8ac15fd00febb57079724ffa3127fc85a28cada36c6d45f492
"""The mechanisms that this checkpoint carries."""

import functools

from .configuration_hf_moe import unknown_name_message


@functools.cache
def _mechanisms() -> dict[str, dict[str, type]]:
    # Imported when the first one is asked for: a mechanism that builds others imports this file.
    from .connector_mlp import MlpConnector
    from .experts_ffn import FfnExperts
    from .objective_load_balance import LoadBalance
    from .objective_router_z import RouterZ
    from .router_deepseek_v3 import DeepseekV3Router
    from .router_moiie import MoIIERouter

    return {
        "router": {"deepseek_v3": DeepseekV3Router, "moiie": MoIIERouter},
        "experts": {"ffn": FfnExperts},
        "objective": {"load_balance": LoadBalance, "router_z": RouterZ},
        "connector": {"mlp": MlpConnector},
    }


def mechanism_names(kind: str) -> list[str]:
    """Return the names of the mechanisms of `kind` that this checkpoint carries.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in _mechanisms():
        raise ValueError(unknown_name_message("kind of mechanism", kind, list(_mechanisms())))
    return sorted(_mechanisms()[kind])


def get_mechanism(kind: str, name: str) -> type:
    """Return the class of a mechanism.

    Raises:
        ValueError: if this checkpoint does not carry it.
    """
    if name not in mechanism_names(kind):
        raise ValueError(
            f"This checkpoint does not carry the {kind} {name!r} that its config.json asks for, only: "
            f"{', '.join(mechanism_names(kind)) or 'none'}. Restore config.json, or build and save the model with "
            "the package: pip install hf-moe"
        )
    return _mechanisms()[kind][name]
