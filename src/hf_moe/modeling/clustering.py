"""K-means, the same on every run and every process."""

import torch
from torch.nn import functional as F


def farthest_points(points: torch.Tensor, number: int, first: torch.Tensor | int = 0) -> torch.Tensor:
    """Return points (number, C) of (N, C), each the farthest from those before it, beginning with the `first`."""
    chosen = [points[first]]
    distance = torch.cdist(points, chosen[0][None]).squeeze(1)  # (N,), to the nearest of those chosen
    for _ in range(number - 1):
        chosen.append(points[distance.argmax()])
        distance = torch.minimum(distance, torch.cdist(points, chosen[-1][None]).squeeze(1))
    return torch.stack(chosen)


def nearest_centroid(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the number (N,) of the centroid (E, C) that is nearest to each of the points (N, C)."""
    return torch.cdist(points, centroids).argmin(1)


def k_means(points: torch.Tensor, centroids: torch.Tensor, steps: int, spherical: bool = False) -> torch.Tensor:
    """Return the centroids (E, C) after some steps of Lloyd's algorithm; one without points stays where it is.

    Args:
        points (`torch.Tensor` of shape `(N, C)`): of length 1 where `spherical`.
        centroids (`torch.Tensor` of shape `(E, C)`): where they start.
        steps: how many.
        spherical: whether centroids have length 1 too, so that the nearest is that of the largest cosine.
    """
    for _ in range(steps):
        nearest = nearest_centroid(points, centroids)
        sums = torch.zeros_like(centroids).index_add(0, nearest, points)
        count = torch.bincount(nearest, minlength=len(centroids))[:, None]  # (E, 1)
        moved = F.normalize(sums, dim=-1) if spherical else sums / count.clamp(min=1)
        centroids = torch.where(count > 0, moved, centroids)
    return centroids


def silhouette(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return how apart clusters are, in [0, 1]: the mean over points of 1 - a / b.

    a and b are the distances to the nearest and the second nearest of the centroids (E, C): the simplified silhouette.
    """
    if len(centroids) < 2:
        return points.new_zeros(())
    own, other = torch.cdist(points, centroids).topk(2, dim=1, largest=False).values.unbind(1)  # (N,) both
    return (1 - own / other.clamp(min=1e-20)).mean()
