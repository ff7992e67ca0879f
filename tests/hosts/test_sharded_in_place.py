"""Two processes that share a host layer by layer, as FSDP2 does, train it as one process does."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from helpers.hosts.catalogue import HOSTS, drift_apart, in_place, labels_of
from helpers.near import assert_near
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_moe.modeling.host_layers import decoder_layers
from hf_moe.modeling.parts import text_decoder


WORLD = 2
SHARDED = ["qwen2_5_vl", "qwen3_vl_moe"]


def build(name):
    moe = {"objectives": {"router_z": 0.1}}
    return drift_apart(in_place(name, moe)).train()


def batches_of(name):
    """One row for each process; both have images, for FSDP2 wants every process to use the same parameters."""
    rows = [HOSTS[name].inputs(row) for row in range(WORLD)]
    return [{**inputs, "labels": labels_of(inputs)} for inputs in rows]


def step(model, batches, items, world):
    """One backward pass, with the loss times the processes, since gradients are averaged."""
    losses = []
    for batch in batches:
        loss = model(**batch, num_items_in_batch=items).loss
        (loss * world).backward()
        losses.append(loss.detach())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    full = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return {"loss": sum(losses), "gradients": full}


def items_of(name):
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches_of(name))


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    found = {}
    for name in SHARDED:
        model = build(name)
        model.gradient_checkpointing_enable()
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in decoder_layers(text_decoder(model)):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found[name] = step(model, [batches_of(name)[rank]], items_of(name), WORLD)
        dist.all_reduce(found[name]["loss"])
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(port, folder), nprocs=WORLD)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_shard_a_host_and_train_it_as_one(found, name):
    expected = step(build(name), batches_of(name), items_of(name), 1)
    assert_near(found[name]["loss"], expected["loss"])
    assert found[name]["gradients"].keys() == expected["gradients"].keys()
    for key, gradient in expected["gradients"].items():
        assert_near(found[name]["gradients"][key], gradient, 2e-6)
    assert max(value.abs().max() for key, value in expected["gradients"].items() if ".gate." in key) > 1e-4
