"""Matrices as tensor trains, also known as matrix product operators: a chain of cores over factors of both sizes.

    W[i, j] = T_1[i_1, j_1] T_2[i_2, j_2] ... T_n[i_n, j_n]        i = (i_1 ... i_n), j = (j_1 ... j_n), row-major

T_k is of shape (d_(k-1), I_k, J_k, d_k) with d_0 = d_n = 1. The bonds d_k of an exact train are the smaller of the
products of I_m J_m on either side; smaller ones approximate. The core in the middle, of the largest factors, holds
most of the numbers; from a decomposition the cores before and after it are orthonormal.
"""

import math
from collections.abc import Sequence

import torch


def balanced_factors(size: int, number: int) -> list[int]:
    """Return `number` factors of a size, the largest in the middle and the smallest at both ends."""
    factors, middle = [1] * number, number // 2
    # By size, an end counts half of the others.
    weight = [1.0 if place in (0, number - 1) else 2.0 for place in range(number)]
    for prime in prime_factors(size):
        places = sorted(range(number), key=lambda place: (abs(place - middle), place))
        chosen = min(places, key=lambda place: round(math.log2(factors[place] * prime) / weight[place], 9))
        factors[chosen] *= prime
    return factors


def prime_factors(size: int) -> list[int]:
    """Return the prime factors of a number, the largest first."""
    found, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            found.append(divisor)
            size //= divisor
        divisor += 1
    return sorted(found + [size] * (size > 1), reverse=True)


def core_shapes(rows: int, columns: int, number: int, bond_dim: int | None) -> list[tuple[int, int, int, int]]:
    """Return the shapes of the cores of a matrix, with bonds of at most `bond_dim`, exact ones when absent."""
    pairs = list(zip(balanced_factors(rows, number), balanced_factors(columns, number), strict=True))
    sizes = [row * column for row, column in pairs]
    bonds = [min(math.prod(sizes[:place]), math.prod(sizes[place:])) for place in range(number + 1)]
    bonds = [min(bond, bond_dim or bond) for bond in bonds]
    return [(bonds[place], *pair, bonds[place + 1]) for place, pair in enumerate(pairs)]


def decompose(matrix: torch.Tensor, shapes: Sequence[tuple[int, int, int, int]]) -> list[torch.Tensor]:
    """Return the cores of a matrix (I, J), float32."""
    number, middle = len(shapes), len(shapes) // 2
    rest = matrix.float().reshape([shape[1] for shape in shapes] + [shape[2] for shape in shapes])
    rest = rest.permute([axis for place in range(number) for axis in (place, number + place)])
    cores: list[torch.Tensor] = [rest] * number
    for place in range(middle):
        left, values, right = torch.linalg.svd(rest.reshape(math.prod(shapes[place][:3]), -1), full_matrices=False)
        bond = shapes[place][3]
        cores[place] = left[:, :bond].reshape(shapes[place])
        rest = values[:bond, None] * right[:bond]
    for place in range(number - 1, middle, -1):
        left, values, right = torch.linalg.svd(rest.reshape(-1, math.prod(shapes[place][1:])), full_matrices=False)
        bond = shapes[place][0]
        cores[place] = right[:bond].reshape(shapes[place])
        rest = left[:, :bond] * values[:bond]
    cores[middle] = rest.reshape(shapes[middle])
    return cores


def contract(before: Sequence[torch.Tensor], central: torch.Tensor, after: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the matrices (E, I, J) of trains that share their central core.

    Args:
        before, after (`Sequence[torch.Tensor]`): the cores (E, d, I_k, J_k, d') on both sides of it.
        central (`torch.Tensor` of shape `(d, I_c, J_c, d')`).
    """
    left, right = before[0].squeeze(1), after[-1].squeeze(-1)  # (E, I, J, d) and (E, d, I, J)
    for core in before[1:]:
        left = torch.einsum("exya,eauvb->exuyvb", left, core).flatten(1, 2).flatten(2, 3)
    for core in reversed(after[:-1]):
        right = torch.einsum("eauvb,ebst->eausvt", core, right).flatten(2, 3).flatten(3, 4)
    return (
        torch.einsum("exyuvb,ebst->exusyvt", torch.einsum("exya,auvb->exyuvb", left, central), right)
        .flatten(1, 3)
        .flatten(2, 4)
    )
