"""MaskMoE: a rare word always has the same experts, a frequent one may choose.

    p = softmax over the experts e that row r sees of W_e x        S = the K largest of p        w_i = p_i for i in S

Every row of the vocabulary sees some experts, drawn at random once for each layer: a rare word `visible_experts_rare`
of them, a frequent one `visible_experts_frequent`. Frequent are the words that together make up `frequent_mass` of the
text, which `fit_token_tables` counts; before it has, all are. With one visible expert the weight is 1, and all that a
rare word teaches goes to one place. A token that sees fewer than K experts uses those, and its other slots are empty.

Image, video and audio tokens see all experts, unless `image_experts` or a codebook says otherwise; `token_tables.py`
has their rows. Training and inference are the same, and a token's experts depend on itself alone. Balance losses count
the masked probabilities, where an expert that is not seen has none.

Source: MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts, arXiv:2407.09816.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt, PositiveInt, Share
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits, seen_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext
from ..token_tables import TokenTableRouter


@register_router("maskmoe")
class MaskMoeRouter(TokenTableRouter):
    """Softmax top-k over the experts that a token's row sees, `visible` (R, E) bool.

    Args:
        spec: facts of the layer.
        visible_experts_frequent: how many experts a frequent word sees; all of them when `None`.
        visible_experts_rare: how many a rare word sees.
        frequent_mass: share of the text that frequent words make up.
        image_experts: those that tokens of images and videos see; all of them when `None`.
        codebook_size: rows for each other modality, see [`TokenTableRouter`]; with more than one, codes are frequent
            or rare as words are.
        seed: of the draw.

    Raises:
        ValueError: if K does not lie in [1, E], or a word cannot see those experts; and as [`TokenTableRouter`].
    """

    reads = TokenTableRouter.reads | {"hidden_states"}
    visible: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        visible_experts_frequent: PositiveInt | None = None,
        visible_experts_rare: PositiveInt = 1,
        frequent_mass: Share = 0.9,
        image_experts: list[NonNegativeInt] | None = None,
        codebook_size: PositiveInt = 1,
        seed: NonNegativeInt = 0,
    ):
        super().__init__(spec, None, codebook_size)
        check_slots(spec, spec.num_experts, "maskmoe")
        self.seen = visible_experts_rare, visible_experts_frequent or spec.num_experts
        if max(self.seen) > spec.num_experts:
            raise ValueError(
                f"Router 'maskmoe' of layer {spec.layer_idx}: visible_experts_rare={self.seen[0]} and "
                f"visible_experts_frequent={self.seen[1]} must lie in [1, num_experts={spec.num_experts}]."
            )
        if image_experts is not None and not (image_experts and max(image_experts) < spec.num_experts):
            raise ValueError(
                f"Router 'maskmoe' of layer {spec.layer_idx}: image_experts={image_experts} must name at least one "
                f"expert, each in [0, num_experts={spec.num_experts}); leave it out for all of them."
            )
        self.frequent_mass = frequent_mass
        self.image_experts = image_experts
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.register_buffer("visible", torch.empty(self.num_rows, spec.num_experts, dtype=torch.bool))

    def initialize(self, std: float) -> None:
        super().initialize(std)
        init.normal_(self.weight, mean=0.0, std=std)
        init.copy_(self.visible, self._draw(torch.ones(self.num_rows, dtype=torch.bool, device="cpu")))

    @torch.no_grad()
    def fit(self, counts: torch.Tensor) -> None:
        parts = counts.cpu().split([self.num_text_rows, len(counts) - self.num_text_rows])
        self.visible.copy_(self._draw(torch.cat([most_frequent(part, self.frequent_mass) for part in parts])))

    def _draw(self, frequent: torch.Tensor) -> torch.Tensor:
        """Return what rows see, (R, E) bool, by whether they are `frequent` (R,)."""
        # On the CPU whatever the default device is, so that the draw is the same on all.
        scores = torch.rand(self.num_rows, self.spec.num_experts, generator=self.seeded(self.seed), device="cpu")
        rare, often = self.seen
        number = torch.where(frequent, often, rare)  # (R,)
        visible = scores.argsort(-1).argsort(-1) < number[:, None]
        if self.codebook_size == 1:
            visible[self.num_text_rows :] = True
        if self.image_experts is not None:
            images = slice(self.num_text_rows, self.num_text_rows + 2 * self.codebook_size)  # and videos
            visible[images] = False
            visible[images, self.image_experts] = True
        return visible

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(hidden_states, self.weight)  # (T, E)
        visible = self.visible[self.rows(context, hidden_states.device)]  # (T, E)
        return assign(seen_logits(logits, visible, self.spec, context), self.spec, context, norm=False)


def most_frequent(counts: torch.Tensor, mass: float) -> torch.Tensor:
    """Return which rows are the most frequent ones that make up the share `mass` of `counts` (R,), (R,) bool."""
    falling, order = counts.double().sort(descending=True, stable=True)
    before = falling.cumsum(0) - falling
    frequent = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    frequent[order] = (before < mass * counts.sum()) & (falling > 0)
    return frequent
