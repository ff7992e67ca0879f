"""Two processes against one: DDP over image and text-only batches, FSDP2 per decoder layer, objectives on."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from helpers.near import assert_near
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.running_statistics import gather_rows


IMAGE = 95
WORLD = 2
STEPS = 2


def build_model():
    torch.manual_seed(0)
    config = HfMoeConfig(
        text_config=LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            initializer_range=0.15,
            pad_token_id=0,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        moe_config={
            "layers": "from_1",
            "num_experts": 4,
            "router": {"name": "moiie"},
            "objectives": {"load_balance": 0.3, "router_z": 0.1},
        },
        image_token_id=IMAGE,
        initializer_range=0.15,
    )
    return HfMoeForConditionalGeneration(config).train()


def batches_of(step):
    """Return what each process gets: rows with images for one, text alone for the other, and back again."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(3, 90, (2, 8), generator=generator)
    span = torch.tensor([[IMAGE] * 4, [IMAGE] * 4])
    images = {
        "input_ids": torch.cat([words[:, :2], span, words[:, 2:]], dim=1),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
    }
    text = {"input_ids": torch.randint(3, 90, (3, 12), generator=generator)}
    for batch in (images, text):
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
        batch["labels"][0, :5] = -100
    return [images, text] if step % 2 == 0 else [text, images]


def items_of(step):
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches_of(step))


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(model, batches, world):
    """Run `STEPS` optimizer steps as `Trainer` does: the loss times the processes, since gradients are averaged."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for batch in batches(step):
            loss = model(**batch, num_items_in_batch=items_of(step)).loss
            (loss * world).backward()
            losses.append(loss.detach())
        named = [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]
        assert [name for name, p in named if p.grad is None] == []
        history.append({"loss": sum(losses), "gradients": {name: full(p.grad) for name, p in named}})
        optimizer.step()
    return history


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {}
    for kind in ("ddp", "fsdp2", "fsdp2_checkpointing"):
        model = build_model()
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            if kind == "fsdp2_checkpointing":
                model.gradient_checkpointing_enable()
            mesh = init_device_mesh("cpu", (WORLD,))
            for layer in model.model.language_model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert type(model.model.language_model.layers[1]).__name__ == "FSDPLlamaDecoderLayer"
        results[kind] = train(model, lambda step: [batches_of(step)[rank]], WORLD)
        for step in results[kind]:
            dist.all_reduce(step["loss"])
    results["gathered"] = gather_rows(torch.full((1 + rank, 3), float(rank)))
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(port, folder), nprocs=WORLD)
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def one_process():
    return train(build_model(), batches_of, 1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2_checkpointing"])
@pytest.mark.parametrize("step", range(STEPS))
def test_two_processes_equal_one(results, one_process, kind, step):
    actual, expected = results[kind][step], one_process[step]
    assert actual["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert actual["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert_near(actual["gradients"][name], gradient, 1e-5)
    gates = [gradient.abs().max() for name, gradient in expected["gradients"].items() if ".gate." in name]
    assert min(gates) > 1e-3


def test_rows_of_all_processes_are_gathered(results):
    assert results["gathered"].tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3]
