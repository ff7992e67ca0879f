"""The benchmark of routers: it measures every registered one, and sees what makes a GPU wait."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hf_moe import list_mechanisms
from hf_moe.modeling.mechanisms import get_mechanism


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("routers_benchmark", FOLDER / "routers.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize("name", list_mechanisms("router"))
def test_every_router_of_the_registry_is_measured(benchmark, name):
    subject = benchmark.Subject(name, benchmark.QUICK)
    subject.both()
    assert all(value.isfinite().all() for value in subject.upstream.values())
    assert subject.upstream or not subject.parameters()
    assert benchmark.waits(name, benchmark.QUICK) is not None


def test_rows_hold_the_facts_and_the_reference_is_one(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "list_mechanisms", lambda kind: ["top_k", "constant", "ming_multi_router"])
    rows = benchmark.measure(benchmark.QUICK, 2)
    top_k, constant, gates = rows
    assert top_k["both_ratio"] == 1.0 and top_k["compiles"] is True and not top_k["waits"]
    assert (top_k["parameters"], gates["parameters"]) == (16 * 32, 3 * 16 * 32)
    # The logits, and the gradients of the weights and of 32 tokens.
    assert top_k["flops"] == 3 * 2 * 32 * 32 * 16 == gates["flops"] / 3
    assert constant["flops"] == constant["parameters"] == 0
    assert f"| top_k | {top_k['forward_ms']:.2f} | 1.00 |" in benchmark.table(rows)


@pytest.mark.parametrize(
    "wait",
    [
        lambda index: index.unique(),
        lambda index: index[index > 0],
        lambda index: index.max().item(),
        lambda index: index[:3].tolist(),
        lambda index: torch.tensor([1, 2], device=index.device),
    ],
    ids=["unique", "mask", "item", "tolist", "from_the_host"],
)
def test_a_wait_for_the_device_is_counted(benchmark, monkeypatch, wait):
    router = get_mechanism("router", "top_k")
    forward = router.forward

    def waiting(self, hidden_states, context):
        wait(context.modality_ids)
        return forward(self, hidden_states, context)

    assert benchmark.waits("top_k", benchmark.QUICK) == []
    monkeypatch.setattr(router, "forward", waiting)
    assert len(benchmark.waits("top_k", benchmark.QUICK)) == 1
