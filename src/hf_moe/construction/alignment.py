"""Embedding rows for the tokens of a new modality, from the geometry that they share with those of text.

    P = argmin  sum_{i, i', j, j'} (C1_{i i'} - C2_{j j'})^2 P_{i j} P_{i' j'} - epsilon H(P)
    row i = sum_j P_ij text_j / sum_j P_ij

C1 are the cosine distances between the code vectors of the new tokens, C2 those between text embeddings, both with
uniform weights; P is found by mirror descent with Sinkhorn steps while epsilon falls to its last value.

Sources: Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities, arXiv:2503.22517;
Gromov-Wasserstein Averaging of Kernel and Distance Matrices (ICML 2016).
"""

import torch
from torch.nn import functional as F


# From where epsilon falls, in how many steps; and Sinkhorn iterations of each.
FIRST_EPSILON = 0.2
STEPS = 60
SINKHORN_ITERATIONS = 50


def gromov_wasserstein_init(
    new_vectors: torch.Tensor,
    text_embeddings: torch.Tensor,
    *,
    epsilon: float = 0.01,
    max_samples: int = 2000,
    seed: int = 0,
) -> torch.Tensor:
    """Return the first embeddings (M, d) of M new tokens; the rows of the head are found from its text rows likewise.

    Args:
        new_vectors (`torch.Tensor` of shape `(M, c)`): code vectors of the new tokens.
        text_embeddings (`torch.Tensor` of shape `(N, d)`).
        epsilon: weight of the plan's entropy, > 0; smaller plans are sharper.
        max_samples: how many text embeddings are drawn at most.
        seed: of the draw.

    Raises:
        ValueError: if `epsilon` is not positive.
    """
    if len(text_embeddings) > max_samples:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(text_embeddings), generator=generator)[:max_samples]
        text_embeddings = text_embeddings[chosen.to(text_embeddings.device)]
    plan = gromov_wasserstein_plan(new_vectors, text_embeddings, epsilon=epsilon)
    shares = plan / plan.sum(1, keepdim=True)
    return (shares @ text_embeddings.to(shares)).to(text_embeddings.dtype)


def gromov_wasserstein_plan(first: torch.Tensor, second: torch.Tensor, *, epsilon: float = 0.01) -> torch.Tensor:
    """Return the plan (M, N) float64 between two sets of vectors, (M, c) and (N, d), by their cosine distances."""
    if epsilon <= 0:
        raise ValueError(f"epsilon={epsilon} must be greater than 0.")
    distances = [1.0 - vectors @ vectors.T for vectors in (F.normalize(v.double(), dim=-1) for v in (first, second))]
    c1, c2 = (distance / distance.mean() for distance in distances)
    rows, columns = c1.new_full((len(c1),), 1 / len(c1)), c1.new_full((len(c2),), 1 / len(c2))
    constant = (c1.square() @ rows)[:, None] + (c2.square() @ columns)[None]
    plan = rows[:, None] * columns[None]
    start = max(FIRST_EPSILON, epsilon)
    for step in range(STEPS):
        current = start * (epsilon / start) ** (step / (STEPS - 1))
        plan = _sinkhorn(constant - 2.0 * c1 @ plan @ c2.T, rows, columns, current)
    return plan


def _sinkhorn(cost: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the plan of least cost and most entropy with the given sums, in the log domain."""
    kernel = -cost / epsilon
    f, g = torch.zeros_like(rows), torch.zeros_like(columns)
    for _ in range(SINKHORN_ITERATIONS):
        f = rows.log() - (kernel + g[None]).logsumexp(1)
        g = columns.log() - (kernel + f[:, None]).logsumexp(0)
    return (kernel + f[:, None] + g[None]).exp()
