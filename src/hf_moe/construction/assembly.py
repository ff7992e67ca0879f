"""One routed bank from LoRA adapters that were trained apart, as Branch-Train-MiX does with whole feed-forwards.

Adapter i becomes expert i of its own rank, with its own scaling folded into B_i. Nothing of the adapters is retrained:
only the new router is trainable.

Source: Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM, arXiv:2403.07816.
"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _get_in_out_features, check_target_module_exists
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapters.config import MoeLoraConfig
from ..adapters.frozen import take_frozen
from ..adapters.layer import tuner_layers
from ..configuration.configuration_hf_moe import unknown_name_message
from ..configuration.systems import load_system


# Where the experts are, in the words of the first adapter.
TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Of the names that PEFT saves: what stands around the name of the target.
PREFIX, A_SUFFIX, B_SUFFIX = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# What makes of a LoRA adapter something else than `W x + s B A x` for every token.
NOT_PLAIN = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
)
# Ways to start an adapter that take its first product out of the base weights; a suffix may follow.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields of the bank that follow from the adapters, and those of single targets.
FROM_ADAPTERS = {
    *TARGET_FIELDS,
    *("num_experts", "experts", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora"),
    *("target_parameters", "model_part", "init_lora_weights", "peft_type"),
}
# target -> A (r, in) and B (out, r)
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]


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
            of the names become those of the experts, if they differ. Those of other bases are warned of.
        adapter_name: name of the assembled adapter.
        system: a published system, such as `"kshot_lora_moe"`, whose fields to take as far as the adapters do not set
            them.
        variant: its form; the first one when `None`.
        options: further fields of [`MoeLoraConfig`], such as `router` or `num_experts_per_tok`, before those of the
            system. The experts are frozen unless `freeze_experts=False`.

    Raises:
        ValueError: if the system, its variant or an option is unknown, if an option follows from the adapters, or if
            an adapter is no plain LoRA on the model's own weights, differs from the others in its targets, or does
            not fit the model, which is unchanged then.
    """
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"adapters={adapters!r} must be a list of one or more folders or Hub names.")
    _check_options(options)
    configs = [PeftConfig.from_pretrained(adapter) for adapter in adapters]
    for adapter, config in zip(adapters, configs, strict=True):
        _check_plain(adapter, config)
    matrices = [_matrices(adapter) for adapter in adapters]
    fields = {
        name: getattr(configs[0], name) for name in (*TARGET_FIELDS, "lora_alpha", "alpha_pattern", "use_rslora")
    }
    preset = {} if system is None else load_system(system).fields("adapter", variant)
    preset = {name: value for name, value in preset.items() if name not in FROM_ADAPTERS}
    names = [Path(adapter).name for adapter in adapters]
    expert_names = names if len(set(names)) == len(names) else None
    options = {"freeze_experts": True, "expert_names": expert_names, **preset, **options}
    bank = MoeLoraConfig(num_experts=len(adapters), **fields, **_ranks(matrices), **options)
    for adapter, found in zip(adapters, matrices, strict=True):
        _check_fit(model, bank, adapter, found)
    _warn_of_bases(model, adapters, configs)
    peft_model = get_peft_model(model, bank, adapter_name)
    for expert, (config, found) in enumerate(zip(configs, matrices, strict=True)):
        _fill_expert(peft_model, adapter_name, expert, config, found)
    take_frozen(peft_model)
    return peft_model


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what is no field of the config, and what follows from the adapters."""
    known = [name for name in MoeLoraConfig.__dataclass_fields__ if name not in FROM_ADAPTERS]
    for name in options:
        if name in FROM_ADAPTERS:
            raise ValueError(f"{name} follows from the adapters of a bank: leave {name}={options[name]!r} out.")
        if name not in known:
            raise ValueError(unknown_name_message("option of assemble_lora_experts", name, known))
    for key, own in options.get("target_overrides", {}).items():
        if FROM_ADAPTERS & set(own):
            found = ", ".join(sorted(FROM_ADAPTERS & set(own)))
            raise ValueError(f"target_overrides[{key!r}]: {found} follow from the adapters of a bank: leave them out.")


def _check_plain(adapter: str, config: PeftConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter!r} is a {type(config).__name__}, and the experts of a bank are LoRA adapters.")
    found = {name: getattr(config, name, None) for name in NOT_PLAIN} | {"bias": config.bias != "none" and config.bias}
    for name, value in found.items():
        if value:
            raise ValueError(f"{adapter!r} has {name}={value!r}, which LoRA experts have no place for.")
    if str(config.init_lora_weights).lower().startswith(BASE_CHANGING):
        raise ValueError(
            f"{adapter!r} was started with init_lora_weights={config.init_lora_weights!r}, which changes the base "
            "weights, and a bank has one base for all experts: save it as plain LoRA, by its save_pretrained with "
            "path_initial_model_for_weight_conversion, or train it from another start."
        )


def _matrices(adapter: str) -> Matrices:
    """Return the matrices of an adapter by the name of the target in the model."""
    weights = load_peft_weights(adapter, device="cpu")
    matrices: Matrices = {}
    for name in [name for name in weights if name.endswith(A_SUFFIX)]:
        key = name.removesuffix(A_SUFFIX)
        if key + B_SUFFIX not in weights:
            raise ValueError(f"{adapter!r} is damaged: it has {name!r}, and no {key + B_SUFFIX!r}.")
        matrices[key.removeprefix(PREFIX)] = weights.pop(name), weights.pop(key + B_SUFFIX)
    if weights or not matrices:
        found = f"holds {sorted(weights)[0]!r}" if weights else "is empty"
        raise ValueError(f"{adapter!r} {found}, and the experts of a bank are LoRA on linear layers alone.")
    return matrices


def _ranks(matrices: list[Matrices]) -> dict[str, Any]:
    """Return `r` and `rank_pattern` of a bank, from the matrices of its adapters."""
    targets = [name for name in matrices[0] if all(name in found for found in matrices)]
    if not targets:
        raise ValueError("The adapters have no targets in common, and the experts of a bank need the same targets.")
    ranks = {name: tuple(len(found[name][0]) for found in matrices) for name in targets}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    as_field = {item: item[0] if len(set(item)) == 1 else list(item) for item in ranks.values()}
    return {
        "r": as_field[usual],
        "rank_pattern": {name: as_field[item] for name, item in ranks.items() if item != usual},
    }


def _check_fit(model: nn.Module, bank: MoeLoraConfig, adapter: str, matrices: Matrices) -> None:
    """Refuse an adapter that has not just the targets of the bank, in the widths of the model."""
    targets = {name: module for name, module in model.named_modules() if check_target_module_exists(bank, name)}
    for names, problem in ((set(targets) - set(matrices), "lacks"), (set(matrices) - set(targets), "has")):
        if names:
            raise ValueError(
                f"The experts of a bank need the same targets, those of the first adapter in the model: {adapter!r} "
                f"{problem} {len(names)} more, such as {sorted(names)[0]!r}."
            )
    for name, (lora_a, lora_b) in matrices.items():
        module = targets[name]
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(f"{adapter!r} adapts {name!r}, a {type(module).__name__}, which is no linear layer.")
        wanted, found = _get_in_out_features(module), (lora_a.shape[1], lora_b.shape[0])
        if found != wanted:
            raise ValueError(
                f"{adapter!r} does not fit the model: its matrices for {name!r}, A {tuple(lora_a.shape)} and B "
                f"{tuple(lora_b.shape)}, lead from {found[0]} to {found[1]} features, the layer from {wanted[0]} to "
                f"{wanted[1]}."
            )


def _warn_of_bases(model: PreTrainedModel, adapters: list[str], configs: list[LoraConfig]) -> None:
    """Warn of adapters that were trained on another model, by its name: a copy may have another one."""
    bases = {adapter: config.base_model_name_or_path for adapter, config in zip(adapters, configs, strict=True)}
    own = model.name_or_path
    if own and any(base and base != own for base in bases.values()) or len({b for b in bases.values() if b}) > 1:
        warnings.warn(
            f"The adapters of the bank name other bases than the model {own!r}: {bases}. An expert is worth something "
            "on the weights that it was trained on alone.",
            stacklevel=3,
        )


@torch.no_grad()
def _fill_expert(model: PeftModel, adapter_name: str, expert: int, config: LoraConfig, matrices: Matrices) -> None:
    bank = model.peft_config[adapter_name]
    for layer in tuner_layers(model):
        key = layer.key[adapter_name]
        lora_a, lora_b = matrices[key]
        rank = len(lora_a)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha)
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        scaled_b = lora_b * (scaling / bank.scaling(layer.lora_alpha[adapter_name], rank))
        target = layer.experts[adapter_name].target
        target.split("A", layer.moe_lora_A[adapter_name])[expert].copy_(lora_a)
        target.split("B", layer.moe_lora_B[adapter_name])[expert].copy_(scaled_b)
