"""StableMoE: a gate learns where tokens go, a light router by token ids learns it from the gate, and then it is fixed.

    s_i = e_i x                              the gate, e (E, d)
    l_i = c_i D[row of the token]            the light router, D (R, 50) and c (E, 50), blind to hidden states

    stage 1, training:              a = argmax s        stage 1, inference:        a = argmax l
    stage 2, both:                  a = table[row], the argmax l of every row when stage 1 ended
    y = sigmoid(s_a) FFN_a(x)       always, so that e goes on learning; top-1

Stage 1 ends after the first optimizer step at or after `switch_fraction` of the training, as the progress of
`HfMoeTrainer` tells; where no trainer tells it, as with LoRA experts on a plain host, stage 1 lasts. From then on the
experts of a token depend on its id alone, and no statistic or optimizer can move them. At inference they always do.

Two losses of stage 1 are signals of a token for the objective `signal`, 0 in stage 2:

    overload     = (E f_a - 1) sigmoid(s_a)     f the shares of tokens that the experts got in the previous step
    distillation = - log softmax(l)_a           moves D and c alone

`token_tables.py` says which row tokens of images, videos and audio have.

Source: StableMoE: Stable Routing Strategy for Mixture of Experts, arXiv:2204.08396, and its released code.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import PositiveInt, Share
from ..decisions import Decision, ExpertAssignment
from ..gating import apply_overrides, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext
from ..running_statistics import sum_over_ranks
from ..token_tables import TokenTableRouter


@register_router("stablemoe")
class StableMoERouter(TokenTableRouter):
    """Top-1 by a gate, then by a table that was distilled from it.

    Args:
        spec: facts of the layer; `num_experts_per_tok` must be 1.
        switch_fraction (`float`, *optional*, defaults to 0.1): share of the training that is stage 1.
        distill_dim (`int`, *optional*, defaults to 50): width of the light router.
        codebook_size (`int`, *optional*, defaults to 1): rows for each modality other than text, see
            [`TokenTableRouter`].

    Raises:
        ValueError: if K is not 1, and as [`TokenTableRouter`].
    """

    reads = frozenset({"hidden_states", "input_ids", "modality"})

    table: torch.Tensor
    load: torch.Tensor
    share: torch.Tensor
    switched: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        switch_fraction: Share = 0.1,
        distill_dim: PositiveInt = 50,
        codebook_size: PositiveInt = 1,
    ):
        super().__init__(spec, None, codebook_size)
        if spec.num_experts_per_tok != 1:
            raise ValueError(
                f"Router 'stablemoe' of layer {spec.layer_idx} sends a token to one expert, got num_experts_per_tok="
                f"{spec.num_experts_per_tok}: set it to 1, or take the router 'top_k'."
            )
        self.switch_fraction = switch_fraction
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))  # e
        self.light_weight = nn.Parameter(torch.empty(spec.num_experts, distill_dim))  # c
        self.token_features = nn.Parameter(torch.empty(self.num_rows, distill_dim))  # D
        self.register_buffer("table", torch.zeros(self.num_rows, dtype=torch.int32))
        self.register_buffer("switched", torch.zeros((), dtype=torch.bool))
        # Tokens of every expert in the current step, and their shares in the previous one.
        self.register_buffer("load", torch.zeros(spec.num_experts, dtype=torch.long))
        self.register_buffer("share", torch.zeros(spec.num_experts, dtype=torch.float32))
        self._due = False

    def initialize(self, std: float) -> None:
        super().initialize(std)
        init.orthogonal_(self.weight, gain=0.1)
        init.orthogonal_(self.light_weight, gain=0.1)
        init.normal_(self.token_features)
        for buffer in (self.table, self.switched, self.load):
            init.zeros_(buffer)
        init.constant_(self.share, 1 / self.spec.num_experts)

    def fit(self, counts: torch.Tensor) -> None:
        """Leave the table to training; only the centroids of images are computed before."""

    def idle_parameters(self) -> int:
        return self.token_features.numel() - self.token_features.shape[1]

    def light_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Return l (N, E) of rows (N,)."""
        return gate_logits(self.token_features[rows], self.light_weight)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        rows = self.rows(context, hidden_states.device)  # (T,)
        logits = apply_overrides(gate_logits(hidden_states, self.weight), self.spec, context)  # s (T, E)
        light = self.light_logits(rows)  # (T, E)
        # In the table's place among the light logits, an expert that is disabled has a next best.
        fixed = light.detach().scatter(
            1, self.table[rows].long()[:, None], light.detach().amax(-1, keepdim=True) + 1.0
        )
        choice = torch.where(self.switched, fixed, logits.detach() if self.training else light.detach())
        index = apply_overrides(choice, self.spec, context).argmax(-1, keepdim=True)  # (T, 1)
        weight = logits.sigmoid().gather(1, index)
        overload = (self.spec.num_experts * self.share[index] - 1.0) * weight
        distillation = F.cross_entropy(light, index.squeeze(1), reduction="none")  # (T,)
        return ExpertAssignment(
            index,
            weight,
            self.spec.num_experts,
            router_logits=logits,
            router_probs=logits.softmax(-1),
            signals={
                "overload": overload.squeeze(1) * ~self.switched,
                "distillation": distillation * ~self.switched,
            },
        )

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        if not isinstance(decision, ExpertAssignment):
            return
        mask = context.tokens("token_mask", decision.expert_index.device)
        self.load += sum_over_ranks(decision.slot_counts(torch.zeros_like(mask).long(), 1, mask)[0])
        # At 1, no trainer tells how far it is.
        self._due = self.switch_fraction <= context.progress < 1.0

    @torch.no_grad()
    def end_step(self) -> None:
        self.share.copy_(torch.where(self.load.any(), self.load / self.load.sum().clamp(min=1), self.share))
        self.load.zero_()
        if self._due and not self.switched:
            rows = torch.arange(self.num_rows, device=self.table.device)
            self.table.copy_(self.light_logits(rows).argmax(-1))
            self.switched.fill_(True)
