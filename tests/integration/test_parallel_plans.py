"""Two processes split a model by Transformers' plans: what they compute together is what one process computes."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig
from transformers.distributed import DistributedConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration


WORLD = 2
BANKS = {"text": {"num_experts": 4, "intermediate_size": 24}, "image": {"num_experts": 2, "intermediate_size": 16}}
SHARED = {"num_shared_experts": 1, "shared_expert_gate": True}
# Host and moe_config; phi's experts have biases and no gate.
MODELS = {
    "top_k": ("llama", {"router": "top_k", "objectives": {"load_balance": 0.3}, **SHARED}),
    "anyexperts": ("llama", {"router": "anyexperts"}),
    "deepseek_v3": ("llama", {"router": "deepseek_v3"}),
    "biases": ("phi", {"router": "top_k"}),
    "banks": ("llama", {"router": "ernie45_vl", "num_experts": None, "expert_banks": BANKS}),
}
# What a rank gets of the batch is its own under FSDP alone.
SPLITS = {
    "tp": {"tp_size": WORLD},
    "ep": {"tp_size": WORLD, "ep_size": WORLD},
    "ep_all_reduce": {"tp_size": WORLD, "ep_size": WORLD, "ep_implementation": "all_reduce"},
    "ep_fsdp": {"fsdp_size": WORLD, "ep_size": WORLD},
}
BF16_WAYS = ("plan", "by_hand")


def build_model(name):
    torch.manual_seed(0)
    host, moe = MODELS[name]
    text = AutoConfig.for_model(
        host,
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.15,
        pad_token_id=0,
    )
    moe = {"layers": "from_1", "num_experts": 4, "num_experts_per_tok": 2, **moe}
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config=moe, initializer_range=0.15))
    for parameter in model.parameters():
        if parameter.dim() < 3 and not parameter.any():
            # Biases, which start at zero.
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def rows():
    """Return four rows with left and right padding; one of two halves has no image."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, 5:] = 0
    kinds = torch.zeros_like(ids)
    kinds[2:, 1:4] = 1
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, "labels": labels}


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run(model, batch):
    """Return logits, loss and gradients of a training forward and the logits of inference."""
    labels = rows()["labels"]
    outputs = model.train()(**batch, num_items_in_batch=int((labels[:, 1:] != -100).sum()))
    share = len(labels) // len(batch["labels"])
    (outputs.loss * share).backward()
    named = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        inferred = model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return {"logits": full(outputs.logits), "inferred": full(inferred), "gradients": named}


def local_share(model):
    """Return the share of the experts' elements that this process holds."""
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in experts]
    return sum(p.numel() for p in local) / sum(p.numel() for p in experts)


def run_in_bf16(model):
    """Return the types of the routers' parameters, gradients and logits in a training step, and the model's logits."""
    outputs = model.train()(**rows(), output_routing=True)
    outputs.loss.backward()
    gates = [p for layer in model.moe_layers().values() for p in layer.gate.parameters()]
    logits = [decision.router_logits for decision in outputs.routing.decisions.values()]
    return {
        "routers": {tensor.dtype for tensor in [*gates, *(p.grad for p in gates), *logits]},
        "logits": outputs.logits,
    }


def shard_in_bf16(folder, way):
    """Return a bf16 model that FSDP2 shards, by Transformers' plan or by hand."""
    config = DistributedConfig(fsdp_size=WORLD) if way == "plan" else None
    model = HfMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=config)
    if way == "by_hand":
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.moe_layers().values():
            fully_shard(layer.gate, mesh=mesh)
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    results = {}
    for split, sizes in SPLITS.items():
        for name in MODELS:
            model = HfMoeForConditionalGeneration.from_pretrained(
                folder / name, distributed_config=DistributedConfig(**sizes)
            )
            batch = rows()
            if "fsdp_size" in sizes:
                batch = {key: value[rank * 2 : rank * 2 + 2] for key, value in batch.items()}
            results[split, name] = {"share": local_share(model), **run(model, batch)}
    for way in BF16_WAYS:
        for name in MODELS:
            model = shard_in_bf16(folder / name, way)
            results[way, name] = run_in_bf16(model)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    for name in MODELS:
        build_model(name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(port, folder), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def one_process(folder):
    return {name: run(HfMoeForConditionalGeneration.from_pretrained(folder / name), rows()) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_equal_one(results, one_process, split, name):
    expected = one_process[name]
    real = rows()["attention_mask"].bool()
    for rank, found in enumerate(results):
        found = found[split, name]
        own = slice(rank * 2, rank * 2 + 2) if "fsdp_size" in SPLITS[split] else slice(None)
        for kind in ("logits", "inferred"):
            assert (found[kind] - expected[kind][own])[real[own]].abs().max() < 1e-5
        assert found["gradients"].keys() == expected["gradients"].keys()
        for parameter, gradient in expected["gradients"].items():
            assert (found["gradients"][parameter] - gradient).abs().max() < 1e-5, parameter


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_process_holds_half_of_the_experts(results, split, name):
    assert all(found[split, name]["share"] <= 0.55 for found in results)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", BF16_WAYS)
def test_fsdp_of_bf16_keeps_routers_float32(results, folder, way, name):
    model = HfMoeForConditionalGeneration.from_pretrained(folder / name, dtype=torch.bfloat16)
    expected = run_in_bf16(model)
    for found in results:
        assert found[way, name]["routers"] == {torch.float32}
        assert (found[way, name]["logits"] - expected["logits"]).abs().max() < 1e-2
