"""Tables and centroids of the routers that look tokens up, computed from a few batches of the data.

Source: Hash Layers For Large Sparse Models, arXiv:2106.04426; the centroids of images are this library's.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..data.intuition import find_centroids
from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.routing_context import RoutingContext
from ..modeling.token_tables import TokenTableRouter


# The centroids are those of so many tokens at most, the first ones.
MOST_TOKENS = 16384


def fit_token_tables(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> int:
    """Compute the centroids and the tables of every router with a table, in place; they are saved with the model.

    Do so before training: a token's experts change. The same batches give the same tables.

        fit_token_tables(model, itertools.islice(loader, 100))

    Args:
        model: whose routers are fitted, those of LoRA experts too.
        batches: keyword arguments of its forward pass, enough for the frequencies of words to show.

    Returns:
        How many routers were fitted.

    Raises:
        ValueError: if there is no such router, or no batch, or fewer tokens of images than centroids.
    """
    routers = [module for module in model.modules() if isinstance(module, TokenTableRouter)]
    batches = list(batches)
    if not routers or not batches:
        raise ValueError(
            f"fit_token_tables found {len(routers)} routers with a table, such as 'hash_layers', and {len(batches)} "
            "batches; it needs one of each."
        )
    coded = [router for router in routers if router.codebook_size > 1]
    if coded:
        _fit_centroids(model, coded, batches)
    counts = {router: torch.zeros(router.num_rows) for router in routers}

    def count(router: Any, args: tuple[torch.Tensor, RoutingContext]) -> None:
        rows = router.rows(args[1], args[0].device)[args[1].tokens("token_mask", args[0].device)]
        counts[router] += torch.bincount(rows, minlength=router.num_rows).cpu()

    _run(model, routers, batches, count)
    for router in routers:
        router.fit(counts[router])
    return len(routers)


def _fit_centroids(model: nn.Module, routers: list[TokenTableRouter], batches: list[Mapping[str, Any]]) -> None:
    """Fill the centroids of the routers, which all see the same embeddings."""
    found: list[torch.Tensor] = []

    def collect(router: Any, args: tuple[torch.Tensor, RoutingContext]) -> None:
        embeddings, context = router.embeddings(args[1]), args[1]
        coded = (context.tokens("modality_ids", embeddings.device) > 0) & context.tokens(
            "token_mask", embeddings.device
        )
        found.append(embeddings[coded].cpu())

    _run(model, routers[:1], batches, collect)
    embeddings = torch.cat(found)[:MOST_TOKENS]
    centroids = {size: find_centroids(embeddings, size) for size in {router.codebook_size for router in routers}}
    for router in routers:
        router.centroids.copy_(centroids[router.codebook_size])


@torch.no_grad()
def _run(model: nn.Module, routers: list[Any], batches: list[Mapping[str, Any]], hook: Any) -> None:
    """Run the model on every batch, and the hook before these routers."""
    with evaluation_mode(model), ExitStack() as hooks:
        for router in routers:
            hooks.enter_context(router.register_forward_pre_hook(hook))
        for batch in batches:
            model(**batch)
