"""Matrices as tensor trains: factors of their sizes, cores that hold them, and the way back."""

import math

import pytest
import torch
from helpers.near import assert_near

from hf_moe.modeling.tensor_train import balanced_factors, contract, core_shapes, decompose


def test_the_largest_factors_are_in_the_middle():
    assert balanced_factors(256, 5) == [2, 4, 4, 4, 2] and balanced_factors(512, 5) == [2, 4, 8, 4, 2]
    assert balanced_factors(1408, 5) == [2, 8, 11, 4, 2] and balanced_factors(7, 3) == [1, 7, 1]


def rebuilt(cores):
    middle = len(cores) // 2
    own = [core[None] for core in cores]
    return contract(own[:middle], cores[middle], own[middle + 1 :])[0]


@pytest.mark.parametrize(("rows", "columns"), [(256, 512), (96, 50), (7, 64)])
@pytest.mark.parametrize("number", [3, 5, 7])
def test_full_bonds_hold_a_matrix(rows, columns, number):
    matrix, shapes = torch.randn(rows, columns), core_shapes(rows, columns, number, None)
    assert math.prod(balanced_factors(rows, number)) == rows
    cores = decompose(matrix, shapes)
    assert [tuple(core.shape) for core in cores] == shapes
    assert (rebuilt(cores) - matrix).norm() < 1e-5 * matrix.norm()


def test_a_train_is_the_product_of_its_cores():
    cores = [torch.randn(shape) for shape in core_shapes(12, 30, 3, 4)]
    expected = torch.einsum("aijb,bklc,cmnd->ikmjln", *cores).reshape(12, 30)
    assert_near(rebuilt(cores), expected, 1e-5)


def test_short_bonds_approximate_the_better_the_longer():
    matrix = torch.randn(64, 64)
    errors = [(rebuilt(decompose(matrix, core_shapes(64, 64, 5, bond))) - matrix).norm() for bond in (4, 8, 12)]
    assert errors[0] > errors[1] > errors[2] > 0
