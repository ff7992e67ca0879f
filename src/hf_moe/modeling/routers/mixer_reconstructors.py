"""MixER routing: one expert for a sample, by an affine gate that is fitted to clusters and never trained.

    x_t = mean over the counted tokens s <= t of h_s / rms(h_s)        expert = argmax_e of (W x + b)_e, with weight 1

A training forward leaves the x of every sample, of its last token or its answer, in a buffer of the last
`reservoir_size` samples. Every `refit_every` optimizer steps, without gradients and the same in every process:

    1. K-means with E clusters on the buffer, from the centroids of before, so that clusters keep their numbers
    2. Y = the one-hot numbers of the samples' clusters
    3. W, b = argmin ||X W^T + 1 b^T - Y||^2 + ridge ||W||^2

The first centroids are samples that are far apart; before them W is drawn at random. The signal `silhouette` says how
apart the clusters were at the last fit: near 0, the samples have no such structure, and the paper found its method to
hurt there.

At inference the gate of a token has read the tokens up to it, as in every pooled router: with `end_token_id` it has
read the prompt, and stays for the whole answer. W, b, centroids and samples are buffers: float32 and saved.

Source: Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via Mixture of
Experts, arXiv:2502.05335.
"""

import torch
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt, Positive, PositiveInt
from ..clustering import farthest_points, k_means, nearest_centroid, silhouette
from ..decisions import Decision, ExpertAssignment
from ..gating import apply_overrides, gate_logits
from ..layer_spec import MoELayerSpec
from ..pooling import PooledRouter
from ..registry import register_router
from ..routing_context import RoutingContext
from ..running_statistics import gather_rows


# Of K-means, at a fit.
ITERATIONS = 20


@register_router("mixer_reconstructors")
class MixerRouter(PooledRouter):
    """Top-1 by a gate in closed form.

    Args:
        spec (`MoELayerSpec`): facts of the layer, with K = 1.
        refit_every (`int`, *optional*, defaults to 50): optimizer steps from fit to fit.
        reservoir_size (`int`, *optional*, defaults to 512): samples that are kept, N d numbers in every layer.
        ridge (`float`, *optional*, defaults to 1e-4): see above.
        modalities, end_token_id, end: what is pooled, see [`PooledRouter`].

    Raises:
        ValueError: if K is not 1, or there are more experts than samples in the reservoir.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    centroids: torch.Tensor
    samples: torch.Tensor
    silhouette: torch.Tensor
    counts: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        refit_every: PositiveInt = 50,
        reservoir_size: PositiveInt = 512,
        ridge: Positive = 1e-4,
        modalities: list[str] | tuple[str, ...] | None = None,
        end_token_id: NonNegativeInt | None = None,
        end: str = "last",
    ):
        super().__init__(spec, modalities, end_token_id, end)
        if spec.num_experts_per_tok != 1 or spec.num_experts > reservoir_size:
            raise ValueError(
                f"Router 'mixer_reconstructors' of layer {spec.layer_idx} gives a sample one expert, by clusters of "
                f"reservoir_size={reservoir_size} samples: set num_experts_per_tok=1, not {spec.num_experts_per_tok}, "
                f"and no more than that many experts, not {spec.num_experts}."
            )
        self.refit_every = refit_every
        self.ridge = ridge
        sizes = {"weight": spec.num_experts, "centroids": spec.num_experts, "samples": reservoir_size}
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, spec.hidden_size, dtype=torch.float32))
        self.register_buffer("bias", torch.empty(spec.num_experts, dtype=torch.float32))
        self.register_buffer("silhouette", torch.empty((), dtype=torch.float32))
        # Optimizer steps, samples and fits so far.
        self.register_buffer("counts", torch.empty(3, dtype=torch.long))

    def initialize(self, std: float) -> None:
        for buffer in self.buffers():
            init.zeros_(buffer)
        init.normal_(self.weight, mean=0.0, std=std)

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        directions = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:])
        self.leave_samples(directions, context)
        logits, known = self.pool(gate_logits(directions, self.weight), context)  # (T, E)
        logits = apply_overrides(logits + self.bias, self.spec, context)
        index = logits.argmax(-1, keepdim=True)  # (T, 1)
        weight = torch.ones_like(logits[:, :1])
        decision = ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits)
        decision.signals["silhouette"] = self.silhouette.expand(len(index))
        return decision.drop(~known)

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        super().accumulate(decision, context)
        left = self.left_samples(context)
        if left is None:
            return
        samples, known = left
        rows = gather_rows(samples[known & samples.isfinite().all(-1)])[-len(self.samples) :]
        place = (self.counts[1] + torch.arange(len(rows), device=rows.device)) % len(self.samples)
        self.samples[place] = rows.to(self.samples)
        self.counts[1] += len(rows)

    def end_step(self) -> None:
        self.counts[0] += 1
        steps, seen, _ = self.counts.tolist()
        if steps % self.refit_every == 0 and seen >= self.spec.num_experts:
            self.refit()

    @torch.no_grad()
    def refit(self) -> None:
        """Fit the gate to the clusters of the samples that are kept."""
        _, seen, fits = self.counts.tolist()
        points = self.samples[:seen]  # (n, d)
        start = self.centroids if fits else farthest_points(points, self.spec.num_experts)
        self.centroids.copy_(k_means(points, start, ITERATIONS))
        self.silhouette.copy_(silhouette(points, self.centroids))
        targets = F.one_hot(nearest_centroid(points, self.centroids), self.spec.num_experts)
        # Among n unknowns, of which there are fewer than d; float64, since the kernel of similar samples is singular.
        inputs, targets = points.double(), targets.double()
        centred, middle = inputs - inputs.mean(0), targets.mean(0)
        kernel = centred @ centred.T
        kernel.diagonal().add_(self.ridge)
        weight = torch.linalg.solve(kernel, targets - middle).T @ centred  # (E, d)
        self.weight.copy_(weight)
        self.bias.copy_(middle - weight @ inputs.mean(0))
        self.counts[2] += 1
