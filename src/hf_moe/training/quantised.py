"""LoRA experts on a base whose weights are held in 8 or 4 bit, as in QLoRA.

    base = AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization_config(4))
    model = get_peft_model(prepare_quantised(base), MoeLoraConfig(...))

The frozen weights are stored in few bits and expanded for each product; the experts stay in float32.

Source: QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314.
"""

import importlib.util

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from ..modeling.gating import check_choice


BACKENDS = ("bitsandbytes", "torchao")
# What quantisers leave alone by design: tables that are looked up, and the head, which needs the precision.
KEPT = ("embed", "lm_head")
LEAST_SHARE = 0.9


def quantization_config(
    bits: int, backend: str = "bitsandbytes", *, compute_dtype: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig | TorchAoConfig:
    """Return the `quantization_config` with which Transformers loads a base in 8 or 4 bit.

    Args:
        bits: 8, or 4: NF4 with `"bitsandbytes"`, groups of int4 with `"torchao"`.
        backend: the library that holds the weights. bitsandbytes does both on a CPU and on a GPU; torchao's 4 bit
            needs a GPU.
        compute_dtype: of the products.

    Raises:
        ImportError: if the library is not installed.
        ValueError: if bits or backend are others, or torchao is to hold 4 bit without a GPU.
    """
    check_choice("backend", backend, BACKENDS)
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: a base can be held in 8 or 4 bit.")
    if importlib.util.find_spec(backend) is None:
        raise ImportError(f"A base in {bits} bit needs {backend}, which is not installed: pip install {backend}")
    if backend == "bitsandbytes":
        if bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
    if bits == 4 and not torch.cuda.is_available():
        raise ValueError("torchao holds 4 bit on a GPU only, and there is none: take 8 bit, or bitsandbytes.")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig())


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a weight is held in another form than plain numbers of floating point."""
    return type(weight.data) is not torch.Tensor or not weight.dtype.is_floating_point


def check_quantised(model: nn.Module, least_share: float = LEAST_SHARE) -> float:
    """Return the share of a model's matrix weights that is quantised, embeddings and head not counted.

    Args:
        model: the loaded base.
        least_share: the least share that is accepted, 0 to 1.

    Raises:
        ValueError: if less is quantised, naming what is not. Quantisers look for linear layers and pass without a word
            over the stacked experts of a MoE model, which are most of its weights.
    """
    done, left = 0, {}
    for name, module in model.named_modules():
        if any(part in name for part in KEPT):
            continue
        if isinstance(module, nn.Linear):
            number = module.in_features * module.out_features  # packed weights have another shape
            if is_quantised(module.weight):
                done += number
            else:
                left[f"{name}.weight"] = number
        else:
            stacks = {key: item for key, item in module.named_parameters(recurse=False) if item.dim() == 3}
            left |= {f"{name}.{key}": item.numel() for key, item in stacks.items() if not is_quantised(item)}
    share = done / max(1, done + sum(left.values()))
    if share < least_share:
        largest = sorted(left, key=lambda name: -left[name])[:3]
        raise ValueError(
            f"Only {share:.0%} of the model's matrix weights are quantised, and {least_share:.0%} were asked for. "
            f"Among the others are {largest}: quantisers reach linear layers, and no stacked experts."
        )
    return share


def prepare_quantised(model: PreTrainedModel, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Make a quantised base ready to train adapters on, and return it.

    What [`check_quantised`] and PEFT's `prepare_model_for_kbit_training` do, and one thing more: on some CPUs
    bitsandbytes packs 4-bit weights at the first evaluation into a form that passes no gradient on, and a training
    after it would learn nothing without a word. It is kept from doing so.

    Args:
        model: the loaded base, which has not computed anything yet.
        gradient_checkpointing: whether to recompute layers in the backward pass.

    Raises:
        ValueError: if too little is quantised, or if weights are packed for evaluation already.
    """
    check_quantised(model)
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has packed {name!r} for evaluation, which trains no more: load the base again, and "
                "call prepare_quantised before it computes anything."
            )
        module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
