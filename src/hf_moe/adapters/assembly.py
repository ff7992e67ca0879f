"""One routed bank from LoRA adapters that were trained apart, as Branch-Train-MiX does with whole feed-forwards.

Adapter i becomes expert i of its own rank, with its own scaling folded into B_i. Nothing of the adapters is retrained:
only the new router is trainable.

Source: Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM, arXiv:2403.07816.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from .config import MoeLoraConfig
from .layer import MoeLoraLayer
from .systems import load_system


# What the experts of one bank must agree in.
SHARED_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Of the names that PEFT saves: what stands around the name of the target.
PREFIX, A_SUFFIX = "base_model.model.", ".lora_A.weight"
# What has no place in a bank of plain low-rank experts, with the value that is not in the way.
PLAIN_FIELDS = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
}


def assemble_lora_experts(
    model: PreTrainedModel,
    adapters: list[str],
    adapter_name: str = "default",
    *,
    system: str | None = None,
    variant: str | None = None,
    **options: Any,
) -> PeftModel:
    """Return `model` with one expert per LoRA adapter, and a fresh router in front.

    Args:
        model: the base model of the adapters.
        adapters: folders or Hub names of LoRA adapters with the same targets; their ranks may differ. The last parts
            of the names become those of the experts, if they differ.
        adapter_name: name of the assembled adapter.
        system: a published system, such as `"kshot_lora_moe"`, whose fields to take as far as the adapters do not set
            them.
        variant: its form; the first one when `None`.
        options: further fields of [`MoeLoraConfig`], such as `router` or `num_experts_per_tok`, before those of the
            system. The experts are frozen unless `freeze_experts=False`.

    Raises:
        ValueError: if the system or its variant is unknown, or if an adapter is no plain LoRA, differs from the first
            one in targets, or does not fit the model.
    """
    configs = [PeftConfig.from_pretrained(adapter) for adapter in adapters]
    for adapter, config in zip(adapters, configs, strict=True):
        _check_plain(adapter, config)
        for name in SHARED_FIELDS:
            found, wanted = getattr(config, name), getattr(configs[0], name)
            if found != wanted:
                raise ValueError(
                    f"The experts of a bank need the same {name}: {adapters[0]!r} has {wanted}, {adapter!r} {found}."
                )
    weights = [load_peft_weights(adapter, device="cpu") for adapter in adapters]
    first = configs[0]
    fields = {name: getattr(first, name) for name in (*SHARED_FIELDS, "lora_alpha", "alpha_pattern", "use_rslora")}
    fields |= _ranks(weights)
    preset = {} if system is None else load_system(system, variant)["config"]
    preset = {name: value for name, value in preset.items() if name not in {*fields, "num_experts"}}
    names = [Path(adapter).name for adapter in adapters]
    expert_names = names if len(set(names)) == len(names) else None
    options = {"freeze_experts": True, "expert_names": expert_names, **preset, **options}
    peft_model = get_peft_model(model, MoeLoraConfig(num_experts=len(adapters), **fields, **options), adapter_name)
    for expert, (adapter, config) in enumerate(zip(adapters, configs, strict=True)):
        _fill_expert(peft_model, adapter_name, expert, adapter, config, weights[expert])
    return peft_model


def _ranks(weights: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Return `r` and `rank_pattern` of a bank, from the matrices of its adapters."""
    found: dict[str, list[int]] = {}
    for adapter in weights:
        for name, tensor in adapter.items():
            if name.endswith(A_SUFFIX):
                found.setdefault(name.removeprefix(PREFIX).removesuffix(A_SUFFIX), []).append(len(tensor))
    ranks = {name: tuple(item) for name, item in found.items() if len(item) == len(weights)}
    if not ranks:
        raise ValueError("The adapters have no matrices of linear layers in common, which a bank could be made of.")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    as_field = {item: item[0] if len(set(item)) == 1 else list(item) for item in ranks.values()}
    return {
        "r": as_field[usual],
        "rank_pattern": {name: as_field[item] for name, item in ranks.items() if item != usual},
    }


def _check_plain(adapter: str, config: PeftConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter!r} is a {type(config).__name__}, and the experts of a bank are LoRA adapters.")
    for name, plain in PLAIN_FIELDS.items():
        if (getattr(config, name) or plain) != plain:
            raise ValueError(
                f"{adapter!r} has {name}={getattr(config, name)!r}, which LoRA experts have no place for."
            )


@torch.no_grad()
def _fill_expert(
    model: PeftModel,
    adapter_name: str,
    expert: int,
    adapter: str,
    config: LoraConfig,
    weights: dict[str, torch.Tensor],
) -> None:
    bank = model.peft_config[adapter_name]
    for name, layer in model.named_modules():
        if not isinstance(layer, MoeLoraLayer):
            continue
        names = [f"{name}.lora_{side}.weight" for side in "AB"]
        missing = [item for item in names if item not in weights]
        if missing:
            raise ValueError(f"{adapter!r} does not fit the model: it has no {missing[0]!r}.")
        lora_a, lora_b = (weights.pop(item) for item in names)
        rank = len(lora_a)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        scaled_b = lora_b * (scaling / bank.scaling(layer.lora_alpha[adapter_name], rank))
        target = layer.experts[adapter_name].target
        target.split("A", layer.moe_lora_A[adapter_name])[expert].copy_(lora_a)
        target.split("B", layer.moe_lora_B[adapter_name])[expert].copy_(scaled_b)
    if weights:
        raise ValueError(f"{adapter!r} does not fit the model: nothing takes its {sorted(weights)[0]!r}.")
