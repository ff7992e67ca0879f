"""Hash layers: a fixed table sends every token to experts by its id. No gate, no balance loss.

    expert of hash m = table[m, row]        y = sum over the K hashes m of FFN_{table[m, row]}(x)        weights 1

    hash_of="token"       row = id_t
    hash_of="previous"    row = id_{t-1}
    hash_of="bigram"      row = hash(id_{t-1}, id_t)        so that a word of several tokens has experts of its own

The table is balanced: row after row, in order of falling frequency, goes to the expert with the least load so far.
Before `fit_token_tables` has seen data it is drawn at random. With K > 1 the experts are K groups of E / K, and every
hash chooses in its own: with `granularity` K, each picks a slice of a feed-forward, as in MultiHash.

Training and inference are the same, and a token's experts depend on earlier ids alone. After padding, or the border of
a packed document, there is no previous token. `token_tables.py` says what image, video and audio tokens do.

Sources: Hash Layers For Large Sparse Models, arXiv:2106.04426; Memory Augmented Language Models through Mixture of
Word Experts, arXiv:2311.10768.
"""

import heapq
from typing import Literal

import torch
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt, PositiveInt
from ..decisions import ExpertAssignment
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext
from ..token_tables import TokenTableRouter


# The id before the first token of a document.
NOTHING = -1


@register_router("hash_layers")
class HashRouter(TokenTableRouter):
    """Experts by a table, `table` (K, R) int32; no parameters.

    Args:
        spec: facts of the layer; K is the number of hashes.
        hash_of: what is looked up, as above.
        num_rows: rows for text, into which bigrams are hashed; the size of the vocabulary when `None`.
        codebook_size: rows for each other modality, see [`TokenTableRouter`] (256 for images in our catalogue).
        seed: of the table before data are seen, and of what tells the hashes apart.

    Raises:
        ValueError: if K does not divide E, and as [`TokenTableRouter`].
    """

    table: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        hash_of: Literal["token", "previous", "bigram"] = "token",
        num_rows: PositiveInt | None = None,
        codebook_size: PositiveInt = 1,
        seed: NonNegativeInt = 0,
    ):
        super().__init__(spec, num_rows, codebook_size)
        if spec.num_experts % spec.num_experts_per_tok:
            raise ValueError(
                f"Router 'hash_layers' of layer {spec.layer_idx}: num_experts_per_tok={spec.num_experts_per_tok} "
                f"hashes must divide num_experts={spec.num_experts} into groups, one for each."
            )
        self.hash_of = hash_of
        self.seed = seed
        if hash_of != "token":
            self.reads = self.reads | {"sequence"}
        self.register_buffer("table", torch.empty(spec.num_experts_per_tok, self.num_rows, dtype=torch.int32))

    def initialize(self, std: float) -> None:
        super().initialize(std)
        # On the CPU whatever the default device is, so that the table is the same on all.
        drawn = torch.randint(self.group_size, self.table.shape, generator=self.seeded(self.seed), device="cpu")
        init.copy_(self.table, self._in_groups(drawn))

    @property
    def group_size(self) -> int:
        """E / K."""
        return self.spec.num_experts // self.spec.num_experts_per_tok

    def _in_groups(self, experts: torch.Tensor) -> torch.Tensor:
        """Return experts (K, R) of a group by their numbers among all."""
        return experts + self.group_size * torch.arange(len(experts), device="cpu")[:, None]

    @torch.no_grad()
    def fit(self, counts: torch.Tensor) -> None:
        generator, size = self.seeded(self.seed), self.group_size
        falling = counts.cpu().argsort(descending=True, stable=True)  # (R,)
        tables = [balanced_table(counts, falling, size)]
        for _ in range(1, len(self.table)):  # other companions for every row, at about the same balance
            blocks = [block[torch.randperm(len(block), generator=generator)] for block in falling.split(size)]
            tables.append(balanced_table(counts, torch.cat(blocks), size))
        self.table.copy_(self._in_groups(torch.stack(tables)))

    def text_rows(self, context: RoutingContext) -> torch.Tensor:
        if self.hash_of == "token":
            return super().text_rows(context)
        ids, previous = self.input_ids(context), self._previous_ids(context)  # (B, S) both
        if self.hash_of == "bigram":
            # A linear hash modulo a prime, in which int64 does not overflow.
            previous = ((previous + 1) * 2654435761 + ids * 2246822519) % 2147483647
        return previous % self.num_text_rows

    def _previous_ids(self, context: RoutingContext) -> torch.Tensor:
        """Return the id before every token in its document, (B, S)."""
        ids = self.input_ids(context).long()
        held = context.remember(
            self.spec.site, ids.masked_fill(~context.token_mask.to(ids.device), NOTHING)
        )  # (B, n + S)
        previous = F.pad(held, (1, 0), value=NOTHING)[:, -ids.shape[1] - 1 : -1]
        if context.documents is None:
            return previous
        documents = context.documents.to(ids.device)
        return previous.masked_fill(documents.diff(dim=1, prepend=documents[:, :1]) != 0, NOTHING)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        index = self.table[:, self.rows(context, hidden_states.device)].T.long()  # (T, K)
        weight = torch.ones(index.shape, device=index.device)
        return ExpertAssignment(index, weight, self.spec.num_experts)


def balanced_table(counts: torch.Tensor, order: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return an expert for every row (R,), so that the sums of their `counts` (R,) differ as little as they may.

    Row after row of `order` (R,) goes to the expert with the least load; rows that were never seen go to all in turn.
    """
    sizes = counts.cpu()[order]
    seen, unseen = order[sizes > 0], order[sizes == 0]
    loads = [(0.0, expert) for expert in range(num_experts)]
    experts = []
    for size in sizes[sizes > 0].tolist():
        load, expert = loads[0]
        heapq.heapreplace(loads, (load + size, expert))
        experts.append(expert)
    table = torch.empty(len(counts), dtype=torch.long, device="cpu")
    table[seen] = torch.tensor(experts, dtype=torch.long, device="cpu")
    table[unseen] = torch.arange(len(unseen), device="cpu") % num_experts
    return table
