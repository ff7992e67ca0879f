"""Two processes accumulate without gradient sync, as `Trainer` does: statistics count steps, not micro-batches."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from helpers.training_loops import SUBJECTS, batch
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


WORLD = 2
STEPS = 3
MICRO_BATCHES = 5
KINDS = ("ddp", "fsdp2", "fsdp2_root")


def train(kind, subject, rank):
    """Return the closings, the last population and the bias of a run in which the ranks have batches of their own."""
    model = subject.model
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        if kind == "fsdp2":
            for layer in subject.model.get_decoder().layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    rows = {name: value[rank : rank + 1] for name, value in batch().items()}
    for _ in range(STEPS):
        for index in range(MICRO_BATCHES):
            last = index == MICRO_BATCHES - 1
            if kind == "ddp":
                model.require_backward_grad_sync = last
            else:
                model.set_requires_gradient_sync(last)
            model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"closed": subject.closed, "population": subject.population, "left": subject.left, "slots": subject.slots}


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {(kind, name): train(kind, SUBJECTS[name](), rank) for kind in KINDS for name in SUBJECTS}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(port, folder), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_without_sync_are_one_step(results, kind, name):
    for found in results:
        found = found[kind, name]
        assert found["closed"] == [MICRO_BATCHES * found["slots"]] * STEPS
        assert found["population"] == MICRO_BATCHES * found["slots"]
        assert found["left"] == 0
