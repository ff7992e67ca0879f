"""What becomes of a stage's model before the next one: upcycled, assembled, or given other routers."""

from copy import deepcopy
from typing import Any

from ..configuration import HfMoeConfig, MoeConfig
from ..configuration.configuration_hf_moe import PLACE_FIELDS, unknown_name_message
from ..configuration.systems import load_system
from ..construction.conversion import convert_router, set_objectives
from ..construction.evolution import ExpertEvolution, assemble
from ..construction.host_plan import system_source
from ..modeling.parts import host_parts
from .sections import Stage


CONSTRUCTIONS = ("upcycle", "assemble", "convert_router")


def construct_stage(model: Any, stage: Stage, evolution: ExpertEvolution | None, seed: int) -> Any:
    """Return the model that a stage trains, made from `model`, the one before.

    `upcycle` and `assemble` take `system` (a preset), `moe_config` and its likes for towers and connectors (fields
    over it), and `upcycle` the `source` and the `noise_std` of [`assemble`]; `convert_router` takes those of
    [`convert_router`].

    Args:
        evolution: of the stage before, with its experts.

    Raises:
        ValueError: if there is no such construction, or no experts evolved that `assemble` could take.
    """
    given: Any
    for method, given in (stage.construct or {}).items():
        options: dict[str, Any] = deepcopy(given)
        if method == "convert_router":
            if "name" not in options:
                raise ValueError(f"convert_router needs the name of a router: {{name: top_k}}; got {options!r}.")
            if not model.moe_layers():
                raise ValueError("convert_router exchanges the routers of MoE layers, and the model has none.")
            convert_router(model, **{"seed": seed, **options})
        elif method in CONSTRUCTIONS:
            if method == "assemble" and evolution is None:
                raise ValueError(
                    "The construction 'assemble' takes the experts that evolved in the stage before: give that stage "
                    "'evolve', or use 'upcycle' for copies."
                )
            system, fields = options.pop("system", None), options.pop("moe_config", {})
            places = {name: options.pop(name) for name in PLACE_FIELDS.values() if name in options}
            if system is not None:
                record = load_system(system)
                fields, places = record.fields("model", given=fields), record.place_fields(places)
            if not host_parts(model).towers:  # as where a recipe is checked, whose tower is left out
                places = {}
            config = {**model.config.to_dict(), "moe_config": fields, **places, "system": system}
            evolved = evolution if method == "assemble" else None
            if method == "upcycle":
                options.setdefault("source", system_source(system))
            model = assemble(model, HfMoeConfig.from_dict(config), evolved, **{"seed": seed, **options})
        else:
            raise ValueError(unknown_name_message("construction", method, list(CONSTRUCTIONS)))
    if stage.objectives is not None:
        set_objectives(model, stage.objectives)
    return model


def evolution_of(stage: Stage, model: Any, seed: int) -> ExpertEvolution | None:
    """Return the evolution that a stage asks for, without experts yet.

    Raises:
        ValueError: if its layers are missing or are not the decoder's, or an option is refused.
    """
    if stage.evolve is None:
        return None
    options: dict[str, Any] = {"seed": seed, **stage.evolve}
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    layers = MoeConfig(layers=options.pop("layers")).moe_layers(depth)
    return ExpertEvolution(layers, **options)
