"""From a bank of public LoRA adapters and a few labelled examples to the adapters worth assembling.

    1. score every adapter on the examples: accuracy, and perplexity of a worked answer
    2. shortlist by rank(accuracy) + rank(perplexity)
    3. of the shortlist, take the N adapters whose updates B_i A_i differ most from each other (mean of 1 - cosine)

`assemble_lora_experts` makes a routed bank of them. `select_data` picks what to train it on besides the examples.

Source: Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models, arXiv:2408.15915.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import torch
from peft import PeftModel
from peft.utils import load_peft_weights
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..modeling.evaluation_mode import evaluation_mode


def select_adapters(
    accuracies: Sequence[float],
    perplexities: Sequence[float],
    similarities: torch.Tensor,
    *,
    num_selected: int = 4,
    shortlist: int = 10,
) -> list[int]:
    """Return the indices of the adapters to assemble.

    Args:
        accuracies: of every adapter on the examples; higher is better.
        perplexities: of every adapter on worked answers to them; lower is better.
        similarities (`torch.Tensor` of shape `(n, n)`): cosines of the adapters' updates, see [`update_similarities`].
        num_selected: N.
        shortlist: how many are kept before their differences count, at least N.

    Raises:
        ValueError: if the numbers do not fit together.
    """
    count = len(accuracies)
    if not 1 <= num_selected <= min(shortlist, count) or len(perplexities) != count or len(similarities) != count:
        raise ValueError(
            f"num_selected={num_selected} must lie in [1, shortlist={shortlist}], and there must be as many "
            f"perplexities ({len(perplexities)}) and similarities ({len(similarities)}) as accuracies ({count})."
        )
    places = _ranks([-value for value in accuracies]) + _ranks(perplexities)
    kept = sorted(places.argsort(stable=True)[:shortlist].tolist())

    def difference(subset: Iterable[int]) -> float:
        pairs = list(combinations(subset, 2))
        return sum(1.0 - float(similarities[pair]) for pair in pairs) / max(len(pairs), 1)

    # Among equally different subsets the better scored one.
    return list(max(combinations(kept, num_selected), key=lambda s: (difference(s), -float(places[list(s)].sum()))))


def _ranks(values: Sequence[float]) -> torch.Tensor:
    """Return the place of every value from below; equal values share the lower one."""
    ordered = sorted(values)
    return torch.tensor([float(ordered.index(value)) for value in values])


def score_adapters(
    model: PreTrainedModel, adapters: Sequence[str], shots: Sequence[dict[str, torch.Tensor]]
) -> tuple[list[float], list[float]]:
    """Return accuracy and perplexity of every adapter on labelled examples; `model` is left as it was.

    An example is answered right if every labelled token is the most probable one. Labels that spell out a worked
    answer make the perplexity the paper's, which lucky guesses do not lower.

    Args:
        model: the base model.
        adapters: folders or Hub names of its adapters.
        shots: keyword arguments of the model, with `labels`; one row each.
    """
    accuracies, perplexities = [], []
    for adapter in adapters:
        with evaluation_mode(model):
            adapted = PeftModel.from_pretrained(model, adapter).eval()
            try:
                right, losses = zip(*(_answer(adapted, shot) for shot in shots), strict=True)
            finally:
                adapted.unload()
        accuracies.append(torch.stack(right).mean().item())
        perplexities.append(torch.stack(losses).mean().exp().item())
    return accuracies, perplexities


@torch.no_grad()
def _answer(model: PeftModel, shot: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether all labelled tokens of an example are the most probable ones, 0.0 or 1.0, and its loss."""
    logits = model(**{name: value for name, value in shot.items() if name != "labels"}).logits
    labels = shot["labels"][:, 1:]
    wanted = labels != -100
    predicted = logits[:, :-1].float()
    right = (predicted.argmax(-1) == labels)[wanted].all().float()
    return right, F.cross_entropy(predicted[wanted], labels[wanted])


def update_similarities(adapters: Sequence[str]) -> torch.Tensor:
    """Return the cosines (n, n) of the updates B A of LoRA adapters, all targets together.

    Computed from the factors: <B_i A_i, B_j A_j> is the sum of (B_i^T B_j) * (A_i A_j^T).
    """
    factors = [_factors(load_peft_weights(adapter, device="cpu")) for adapter in adapters]
    products = torch.zeros(len(adapters), len(adapters))
    for i, first in enumerate(factors):
        for j, second in enumerate(factors[: i + 1]):
            shared = first.keys() & second.keys()
            product = sum(((first[n][1].T @ second[n][1]) * (first[n][0] @ second[n][0].T)).sum() for n in shared)
            products[i, j] = products[j, i] = float(product)
    norms = products.diagonal().clamp(min=1e-20).sqrt()
    return products / (norms[:, None] * norms[None, :])


def _factors(weights: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A (r, in) and B (out, r) of every target, by its name."""
    names = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    return {
        name: (weights[f"{name}.lora_A.weight"].float(), weights[f"{name}.lora_B.weight"].float()) for name in names
    }


def select_data(
    shots: torch.Tensor, pool: torch.Tensor, *, num_selected: int, dedup_threshold: float = 0.9
) -> list[int]:
    """Return the items of a pool that are nearest to the examples, without near-duplicates, nearest first.

    Args:
        shots (`torch.Tensor` of shape `(k, m)`): embeddings of the examples.
        pool (`torch.Tensor` of shape `(n, m)`): embeddings of the pool.
        num_selected: how many at most.
        dedup_threshold: cosine in [-1, 1] above which an item is a duplicate of one that was taken.
    """
    shots, pool = F.normalize(shots.float(), dim=-1), F.normalize(pool.float(), dim=-1)
    taken: list[int] = []
    for index in (pool @ shots.T).amax(1).argsort(descending=True).tolist():
        if len(taken) == num_selected:
            break
        if not taken or (pool[taken] @ pool[index]).max() <= dedup_threshold:
            taken.append(index)
    return taken
