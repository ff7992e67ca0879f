"""The intuition of a row: how close its embedding is to the centroids of the training rows.

    intuition(z) = softmax over the C centroids c of cos(z, c) / tau

Source: Intuition-aware Mixture-of-Rank-1-Experts for Parameter Efficient Finetuning, arXiv:2404.08985.
"""

import torch
from torch.nn import functional as F

from ..modeling.clustering import farthest_points, k_means


ITERATIONS = 25


def find_centroids(embeddings: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Return the centroids (C, m) of K-means by cosine over the embeddings (N, m) of the training rows.

    Raises:
        ValueError: if there are fewer embeddings than clusters.
    """
    if len(embeddings) < num_clusters:
        raise ValueError(f"{num_clusters} clusters need at least as many embeddings, got {len(embeddings)}.")
    points = F.normalize(embeddings.float(), dim=-1)
    first = torch.randint(len(points), (1,), generator=torch.Generator().manual_seed(0)).item()
    return k_means(points, farthest_points(points, num_clusters, int(first)), ITERATIONS, spherical=True)


def intuition(embeddings: torch.Tensor, centroids: torch.Tensor, *, tau: float = 0.1) -> torch.Tensor:
    """Return `softmax(cos(z, centroid) / tau)`, (B, C), for rows with embeddings z (B, m)."""
    similarity = F.normalize(embeddings.float(), dim=-1) @ F.normalize(centroids.float(), dim=-1).T
    return (similarity / tau).softmax(-1)
