"""The benchmark of experts: it measures every registered kind, and their slots are sorted once."""

import importlib.util
from pathlib import Path

import pytest

from hf_moe import list_mechanisms


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("experts_benchmark", FOLDER / "experts.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_every_kind_is_measured_and_sorts_its_slots_once(benchmark):
    rows = benchmark.measure(benchmark.QUICK, 1)
    assert {row["kind"] for row in rows} == set(list_mechanisms("experts"))
    assert {row["kind"]: row["dispatches"] for row in rows if row["dispatches"] > 1} == {}
    ffn = {row["backend"]: row for row in rows if row["kind"] == "ffn"}
    assert ffn.keys() == {"ragged", *benchmark.BACKENDS} and ffn["ragged"]["dispatches"] == 1
    # Products of filled slots alone.
    assert ffn["ragged"]["emptied_flops_over_full"] == pytest.approx(0.6, abs=0.1)
    assert "| ffn | ragged |" in benchmark.table(rows, benchmark.measure_widths(benchmark.QUICK, 1))


def test_unequal_widths_have_the_products_of_equal_ones(benchmark):
    assert benchmark.measure_widths(benchmark.QUICK, 1)["flops_unequal_over_equal"] == pytest.approx(1, abs=0.05)
