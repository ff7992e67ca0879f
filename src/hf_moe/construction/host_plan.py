"""What a model of Transformers becomes as a MoE: its config, which blocks are adopted, and which router comes then."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..configuration import HfMoeConfig
from ..configuration.layer_maps import at_layer
from ..configuration.systems import load_system
from ..modeling.parts import text_decoder
from .adoption import adopted_config, read_blocks
from .moe_blocks import BlockReading


# What a system brings to a host whose own experts stay.
BESIDE_EXPERTS = ("objectives", "token_balanced_loss", "attention", "layer", "attention_blocks")


@dataclass(frozen=True)
class HostPlan:
    """What a host becomes.

    Attributes:
        config: of the MoE; with the host's own routers where the host is a MoE.
        readings: the MoE blocks that are adopted, by layer.
        router: the router that takes the place of the host's, by its name; `None` where they stay.
        options: of that router, as they were asked for.
        defaults: of that router, as the system has them; the host's own gate may need others.
        objectives: of a host that is a MoE: they may need the new router.
        source: what the experts of a dense host are made of, see [`build_source`].
    """

    config: HfMoeConfig
    readings: dict[int, BlockReading] = field(default_factory=dict)
    router: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=dict)
    source: str | Mapping[str, Any] = "copies"


def plan_host(
    host: PreTrainedModel,
    system: str | None,
    moe_config: Mapping[str, Any] | None,
    places: Mapping[str, Any] | None = None,
    source: str | Mapping[str, Any] | None = None,
) -> HostPlan:
    """Return what a host becomes.

    A dense host is upcycled, with the system `"top_k"` where none is given. Of a host that is a MoE the experts stay;
    a system or `moe_config` may bring another router, more or fewer slots, objectives, and a shared branch.

    Args:
        host: also on the meta device.
        system, moe_config, source: see [`~hf_moe.HfMoeForConditionalGeneration.from_host`].
        places: the fields of the config with the MoE layers of towers and connectors, which override the system's.

    Raises:
        ValueError: if a block cannot be adopted, or other experts than the host's are asked for.
    """
    given = dict(moe_config or {})
    readings = read_blocks(text_decoder(host))
    if not readings:
        system = system or "top_k"
        fields = {"moe_config": load_system(system).fields("model", given=given)}
        return HostPlan(_config(host, system, fields, places), source=source or system_source(system))
    if source is not None:
        raise ValueError(f"{type(host).__name__} is a MoE, whose experts are taken over: leave source={source!r} out.")
    adopted = adopted_config(readings)
    _refuse_other_experts(host, adopted, given)
    preset = load_system(system).fields("model") if system is not None else {}
    joined = {name: preset[name] for name in BESIDE_EXPERTS if name in preset} | given
    objectives = joined.pop("objectives", None) or {}
    fields = {"moe_config": {**adopted, **joined, "router": adopted["router"]}}
    config = _config(host, system, fields, places)
    options, defaults = _named(given.get("router")), _named(preset.get("router"))
    name = options.pop("name", defaults.get("name"))
    if defaults.pop("name", None) != name:
        defaults = {}
    asked = {"name": name, **options}.items()
    routers = [at_layer(adopted["router"], index) for index in readings]
    kept = name is None or all(router.get(key) == value for router in routers for key, value in asked)
    return HostPlan(config, readings, None if kept else name, options, defaults, objectives)


def system_source(system: str | None) -> str | dict[str, Any]:
    """Return what the experts of a system are made of: `construct: {upcycle: {source: ...}}` in its record."""
    construct = load_system(system).construct if system is not None else None
    return (construct or {}).get("upcycle", {}).get("source", "copies")


def _named(router: str | Mapping[str, Any] | None) -> dict[str, Any]:
    return {"name": router} if isinstance(router, str) else dict(router or {})


def _config(
    host: PreTrainedModel, system: str | None, fields: dict[str, Any], given: Mapping[str, Any] | None
) -> HfMoeConfig:
    places = dict(given or {}) if system is None else load_system(system).place_fields(given)
    return HfMoeConfig.on_host(host.config, type(host).__name__, system=system, **fields, **places)


def _refuse_other_experts(host: PreTrainedModel, adopted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    fixed = {"granularity": 1, "expert_banks": None, **adopted}
    for name in ("router", "num_experts_per_tok", "layers"):
        fixed.pop(name)
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"moe_config.{name}={given[name]!r} contradicts {type(host).__name__}, whose {adopted['num_experts']} "
                f"experts are taken over with {name}={value!r}: leave it out."
            )
