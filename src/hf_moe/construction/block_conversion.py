"""Other options of the block for a model that exists, such as one without a part that was for training alone."""

from typing import Any

import torch

from ..configuration.layer_maps import map_layers
from ..configuration.systems import merge_fields
from ..modeling.block import Block
from ..modeling.configured_parts import build_block
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from .conversion import set_objectives
from .in_place import paths_of, put_modules


@torch.no_grad()
def convert_block(
    model: HfMoeForConditionalGeneration, objectives: dict[str, Any] | None = None, **options: Any
) -> None:
    """Change options of the blocks of a model's decoder, in place: parts that they keep have the weights of before.

    `convert_block(model, {}, discrete_only=True)` leaves the routers of the block `vqmoe` out.

    Args:
        model: its `config` is changed with it.
        objectives (`dict`, *optional*): those from now on, as in `moe_config.objectives`; the statistics begin anew.
        options: of the block that the layers have.

    Raises:
        ValueError: if the block cannot be built, or has parts or sizes that the layers have no weights for.
    """
    config: Any = model.config
    previous, fresh = config.moe_config.block, {}
    config.moe_config.block = map_layers(previous, lambda block: merge_fields(block, options))
    try:
        for path, old in paths_of(model, Block).items():
            if old.spec.place:  # towers and connectors have blocks of their own configs
                continue
            block = fresh[path] = build_block(config, config.moe_config, old.spec)
            state, new = old.state_dict(), block.state_dict()
            lacking = sorted(name for name in new if name not in state or state[name].shape != new[name].shape)
            if lacking:
                raise ValueError(
                    f"Layer {old.spec.site} has no weights that fit {', '.join(lacking)} of such a block."
                )
            block.load_state_dict({name: state[name] for name in new}, assign=True)
            block.train(old.training)
    except ValueError:
        config.moe_config.block = previous
        raise
    put_modules(model, fresh)
    set_objectives(model, config.moe_config.objectives if objectives is None else objectives)
    config.system = None
