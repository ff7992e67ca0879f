"""Step 0: how a fresh MoE compares with the model it was made from, on random text."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration.configuration_hf_moe import MODALITIES
from ..modeling.blocks.moe import MoELayer
from ..modeling.context import routers_of
from ..modeling.decisions import Decision, ExpertAssignment
from ..modeling.inputs import placeholder_ids


@dataclass(frozen=True)
class StepZero:
    """How the fresh MoE compares with the model it was made from, on random text.

    Attributes:
        logit_difference: the largest absolute difference of a logit.
        exact: whether the two are equal by design. An upcycled model is where experts are whole copies without noise
            and every decision hands the tokens to them unscaled, with weights that sum to 1; an adopted one where it
            keeps its routers.
    """

    logit_difference: float
    exact: bool


def random_text(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the inputs of two rows of 16 random tokens, for any model of Transformers with a language head.

    Special tokens are not among them: for placeholders there would be no features.
    """
    config = model.config
    vocabulary = min(config.get_text_config(decoder=True).vocab_size, model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(seed))
    special = set().union(*placeholder_ids(config).values(), _special_tokens(config)) & set(range(vocabulary))
    plain = next((token for token in range(vocabulary) if token not in special), 0)
    ids = torch.where(torch.isin(ids, torch.tensor(sorted(special), dtype=torch.long)), plain, ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "image_attention_mask" in inspect.signature(model.forward).parameters:
        # Idefics takes no text without an image, but text that does not look at its image.
        side = config.vision_config.image_size
        inputs["pixel_values"] = torch.zeros(2, 1, 3, side, side, dtype=model.dtype)
        inputs["image_attention_mask"] = torch.zeros(2, ids.shape[1], 1, dtype=torch.long)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def condition_of_blocks(model: Any, rows: int) -> dict[str, torch.Tensor]:
    """Return the condition that the attention of a model reads, if it does: 0, no block, for every row."""
    name = model.config.moe_config.attention_blocks
    read = name is not None and name not in MODALITIES
    return {name: torch.zeros(rows, dtype=torch.long, device=model.device)} if read else {}


def first_conditions(model: Any, rows: int) -> dict[str, torch.Tensor]:
    """Return the conditions that a model reads: of every row the first id, or features of 0."""
    conditions = condition_of_blocks(model, rows)
    for router in routers_of(model).values():
        if router.condition is not None:
            ids = torch.zeros(rows, dtype=torch.long, device=model.device)
            features = ids.new_zeros(rows, router.num_condition_features, dtype=torch.float32)
            conditions[router.condition] = ids if router.num_conditions else features
    return conditions


def _special_tokens(config: Any) -> set[int]:
    """Return the tokens that a config and its parts name."""
    found = set()
    for name, value in vars(config).items():
        if name in config.sub_configs and value is not None:
            found |= _special_tokens(value)
        elif isinstance(value, int) and name.endswith(("token_id", "token_index")):
            found.add(value)
    return found


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest difference of equal models: float32 rounds well below, a lower precision sums otherwise."""
    return 1e-4 if dtype == torch.float32 else 1e-1


def logit_difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest absolute difference of a logit."""
    return (logits.float() - reference).abs().max().item()


@torch.no_grad()
def compare_at_step_zero(
    model: Any, inputs: dict[str, torch.Tensor], reference: torch.Tensor, equal_experts: bool, adopted: bool
) -> StepZero:
    """Compare a finished model, in evaluation mode, with what it was made from.

    Both as they are used: noise and capacities belong to training.

    Args:
        inputs, reference: of the other model, and its logits.
        equal_experts: whether every expert computes what the feed-forward did, or the routers are the model's own.
        adopted: whether it was a MoE already.

    Raises:
        ValueError: if the two are equal by design, and differ.
    """
    conditions = first_conditions(model, len(inputs["input_ids"]))
    output = model(**inputs, condition_ids=conditions, output_routing=True)
    layers = model.moe_layers().values()
    plain = all(type(layer) is MoELayer for layer in layers)  # other blocks compute something else
    ungated = all(layer.shared_expert is None or layer.shared_expert.shared_expert_gate is None for layer in layers)
    # Layers of cross-attention do not run without images, and decide nothing.
    whole = all(map(_hands_over_whole_tokens, output.routing.decisions.values()))
    whole = adopted or (plain and ungated and whole)
    check = StepZero(logit_difference(output.logits, reference), equal_experts and whole)
    largest = tolerance(output.logits.dtype) * max(1.0, reference.abs().max().item())
    if check.exact and check.logit_difference > largest:
        raise ValueError(
            f"The model differs from the one it was made from by {check.logit_difference:.1e} in a logit, where both "
            "should compute the same. Please report it with the names of the model and of the system."
        )
    return check


def _hands_over_whole_tokens(decision: Decision) -> bool:
    """Whether equal experts give what one of them does: every token arrives unscaled, with weights that sum to 1."""
    if not isinstance(decision, ExpertAssignment):
        return False
    unscaled = decision.input_scale is None or bool((decision.input_scale == 1).all())
    no_identity = decision.identity_weight is None or not decision.identity_weight.any()
    sums = decision.expert_weight.float().sum(-1)  # (T,)
    return unscaled and no_identity and bool((sums - 1).abs().max() < 1e-3)
