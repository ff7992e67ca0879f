"""Published systems of LoRA experts, each with what its authors' claim rests on, on toys."""

import pytest
import torch
from helpers.adapted import decisions, logits, with_cache
from helpers.near import assert_near
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_moe import MoeLoraConfig, list_systems
from hf_moe.adapters import find_centroids, intuition
from hf_moe.adapters.layer import tuner_layers
from hf_moe.adapters.low_rank import SharedAssignment, add_experts
from hf_moe.adapters.stacks import Weights
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.routing_context import RoutingContext


TOY = {"target_modules": ["linear"], "router_input": "target"}
END = 61


def adapt(model, key, **fields):
    return get_peft_model(model, MoeLoraConfig.from_system(key, **fields)).eval()


class Toy(nn.Module):
    """One frozen linear layer."""

    def __init__(self, inputs, outputs=None):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(inputs, outputs or inputs, bias=False)

    def forward(self, x):
        return self.linear(x)


def fit(model, batch, steps, learning_rate=0.02):
    """Train on what `batch()` draws, and return the loss on a fresh batch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        x, y = batch()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        x, y = batch()
        return F.mse_loss(model(x), y).item()


def conflicting_tasks(tasks, width=16, rank=2, seed=0):
    """Return a toy's batches: `tasks` low-rank changes of its layer, told apart by a one-hot in the input."""
    generator = torch.Generator().manual_seed(seed)
    changes = torch.randn(tasks, width, rank, generator=generator) @ torch.randn(
        tasks, rank, width, generator=generator
    )
    changes[1] = -changes[0]
    base = Toy(width + tasks, width).linear.weight

    def batch(size=128):
        task = torch.randint(0, tasks, (size,), generator=generator)
        x = torch.cat([torch.randn(size, width, generator=generator), 2.0 * F.one_hot(task, tasks)], dim=-1)
        y = F.linear(x, base) + torch.einsum("toi,ti->to", changes[task], x[:, :width]) / width**0.5
        return x, y.detach()

    return batch, width + tasks, width


def single_lora(inputs, outputs, rank):
    return get_peft_model(Toy(inputs, outputs), LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"]))


def test_every_preset_can_be_listed_and_built():
    keys = [system.key for system in list_systems("adapter")]
    assert keys == sorted(keys)
    with pytest.raises(ValueError, match="octavius"):
        MoeLoraConfig.from_system("octavus")
    with pytest.raises(ValueError, match="variant of 'perft'"):
        MoeLoraConfig.from_system("perft", variant="X")
    assert MoeLoraConfig.from_system("perft").num_experts == 8
    assert MoeLoraConfig.from_system("smora", num_experts=16).num_experts == 16


def test_octavius_gates_by_the_instruction_alone_and_merges_for_one_request(llama, text, randomise):
    fields = {"router": {"name": "sequence", "modalities": ["text"], "end_token_id": END}}
    base = logits(llama(), text)
    model = adapt(llama(), "octavius", **fields)
    assert_near(logits(model, text), base, 1e-6)
    randomise(model)
    request = text["input_ids"][:1].clone()
    request[0, 4] = END
    made = decisions(model)
    with torch.no_grad():
        cache = with_cache(model, model(input_ids=request[:, :5], use_cache=True))
        routed = model(input_ids=request[:, 5:], **cache, attention_mask=torch.ones(1, 9)).logits
        prefilled = with_cache(model, model(input_ids=request[:, :5], use_cache=True))
    gates = SharedAssignment.of(made[1]).gates
    assert torch.equal(gates, gates[:1].expand_as(gates)) and (gates[0] > 0).sum() == 2
    torch.testing.assert_close(gates.sum(-1), torch.ones(4))
    merged = llama()
    layers = tuner_layers(model)
    linear = [m for name, m in merged.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    for layer, own in zip(layers, linear, strict=True):
        own.weight.data += layer.get_delta_weight("default", gates[0]).detach()
    with torch.no_grad():
        found = merged(input_ids=request[:, 5:], **prefilled, attention_mask=torch.ones(1, 9)).logits
    assert_near(found, routed, 1e-4)


def test_octavius_with_one_expert_is_plain_lora(llama, text, randomise):
    targets = {"target_modules": ["q_proj", "down_proj"]}
    model = adapt(llama(), "octavius", num_experts=1, num_experts_per_tok=1, **targets)
    randomise(model)
    plain = get_peft_model(llama(), LoraConfig(r=8, lora_alpha=8, **targets)).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "moe_lora_A"):
                theirs = plain.get_submodule(name)
                theirs.lora_A["default"].weight.copy_(module.moe_lora_A["default"][0])
                theirs.lora_B["default"].weight.copy_(module.moe_lora_B["default"][0])
    real = text["attention_mask"].bool()
    assert_near(logits(model, text)[real], logits(plain, text)[real], 1e-5)


@pytest.mark.parametrize("variant", ["top_k", "top_p", "switch"])
def test_mixlora_equals_the_naive_path_through_every_expert(llama, text, randomise, variant):
    base = logits(llama(), text)
    model = adapt(llama(), "mixlora", variant=variant, num_experts=4, r=2)
    assert_near(logits(model, text), base, 1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    per_layer = 4 * 2 * 3 * (32 + 48) + 4 * 32 + 2 * (32 + 32) + 2 * (32 + 16)
    assert sum(model.get_parameter(name).numel() for name in trained) == 2 * per_layer
    randomise(model)
    model(**text).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name
    mlp = model.base_model.model.model.layers[0].mlp
    gates = torch.rand(5, 4).masked_fill(torch.rand(5, 4) < 0.4, 0.0)
    gates[0] = 0.0
    index = torch.where(gates > 0, torch.arange(4), 4)
    mlp.gate_proj.decision = lambda *args: SharedAssignment.of(ExpertAssignment(index, gates, 4))
    x = torch.randn(5, 32)

    def linear(name, expert, inputs):
        layer = getattr(mlp, name)
        return layer.base_layer(inputs) + F.linear(
            F.linear(inputs, layer.moe_lora_A["default"][expert]), layer.scaled_b("default")[expert]
        )

    expected = (1 - gates.sum(-1, keepdim=True)) * mlp.down_proj.base_layer(
        F.silu(mlp.gate_proj.base_layer(x)) * mlp.up_proj.base_layer(x)
    )
    for expert in range(4):
        inner = F.silu(linear("gate_proj", expert, x)) * linear("up_proj", expert, x)
        expected = expected + gates[:, [expert]] * linear("down_proj", expert, inner)
    assert_near(mlp(x), expected, 1e-5)


def test_mov_and_molora_mix_all_experts_and_tell_tasks_apart(llama, text):
    for variant in ("mov", "molora"):
        base = logits(llama(), text)
        model = adapt(llama(), "mov_molora", variant=variant)
        assert torch.equal(logits(model, text), base)
        made = decisions(model)
        logits(model, text)
        assert all(decision.expert_index.shape[1] == 10 for decision in made)
    batch, inputs, outputs = conflicting_tasks(4)
    losses, spread = {}, 0.0
    for count in (1, 4):
        model = get_peft_model(
            Toy(inputs, outputs), MoeLoraConfig.from_system("mov_molora", variant="molora", num_experts=count, **TOY)
        )
        losses[count] = fit(model, batch, 150)
        if count == 4:
            made = decisions(model)
            with torch.no_grad():
                x, _ = batch(400)
                model(x)
            task = x[:, -4:].argmax(-1)
            means = torch.stack([made[0].router_probs[task == number].mean(0) for number in range(4)])
            spread = (means[:, None] - means[None]).abs().sum(-1).amax().item()
    assert losses[4] < 0.8 * losses[1] and spread > 0.2


def test_a_merged_vector_does_what_the_separate_ones_do_on_average_and_nothing_else_is_trained(llama, text, randomise):
    model = adapt(llama(), "mov_molora")
    randomise(model)
    layer = next(tuner_layers(model))
    x = torch.randn(1, 5, 32)
    made = decisions(model)
    found = layer(x)
    vectors, share = layer.moe_lora_vector["default"], made[0].router_probs  # (E, out), (T, E)
    separate = torch.stack([vector * layer.base_layer(x[0]) for vector in vectors], dim=1)  # (T, E, out)
    assert_near(found[0], (share[..., None] * separate).sum(1), 1e-6)
    for variant in ("mov", "molora"):
        model = adapt(llama(), "mov_molora", variant=variant)
        randomise(model)
        model(**text).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == ("moe_lora_" in name), name


def test_smora_is_a_mixture_of_loras_when_gates_are_constant_on_blocks_and_balances_its_ranks():
    torch.manual_seed(0)
    x, a, b = torch.randn(6, 12), torch.randn(8, 12), torch.randn(8, 12)
    index, weight = torch.tensor([[0, 2]] * 6), torch.rand(6, 2)
    blocks = SharedAssignment(index, weight, 4)
    slots = torch.stack([2 * index, 2 * index + 1], -1).flatten(1)
    ranks = SharedAssignment(slots, weight.repeat_interleave(2, dim=1), 8)
    of_blocks = Weights(a.view(4, 2, 12), b.view(4, 2, 12).transpose(1, 2))
    by_block = add_experts(torch.zeros(6, 12), x, of_blocks, blocks)
    by_rank = add_experts(torch.zeros(6, 12), x, Weights(a[:, None], b[..., None]), ranks)
    assert_near(by_rank, by_block, 1e-5)

    model = get_peft_model(
        Toy(12),
        MoeLoraConfig.from_system(
            "smora", num_experts=16, num_experts_per_tok=4, router={"name": "smora", "bias_update_rate": 1e-3}, **TOY
        ),
    )
    router = next(tuner_layers(model)).moe_lora_router["default"]
    skew = torch.linspace(-1, 1, 16)
    counts = []
    with torch.no_grad():
        router.weight.copy_(torch.randn(16, 12) * 0.3)
        router.weight[:, 0] = skew
        for _ in range(500):
            tokens = torch.randn(256, 12)
            tokens[:, 0] = 1.0
            decision = router(tokens, RoutingContext.all_text(tokens[None]))
            filled = decision.expert_weight > 0
            assert (filled.sum(-1) == 4).all()
            torch.testing.assert_close(decision.expert_weight.sum(-1), torch.ones(256))
            router.accumulate(decision, RoutingContext.all_text(tokens[None]))
            counts.append(router.load.float().clone())
            router.end_step()
    variation = [torch.stack(part).sum(0) for part in (counts[:10], counts[-50:])]
    first, last = ((part.std() / part.mean()).item() for part in variation)
    assert last < first / 10


def test_smora_beats_single_loras_on_conflicting_tasks():
    batch, inputs, outputs = conflicting_tasks(6)
    model = get_peft_model(
        Toy(inputs, outputs),
        MoeLoraConfig.from_system("smora", num_experts=16, num_experts_per_tok=4, lora_alpha=4, **TOY),
    )
    routed = fit(model, batch, 400)
    assert routed < 0.1 * min(fit(single_lora(inputs, outputs, rank), batch, 400) for rank in (4, 16))


def test_intuition_decides_between_pairs_and_sharpens_specialisation(llama, text, randomise):
    base = logits(llama(), text)
    fields = {"num_experts": 9, "num_experts_per_tok": 1, "router": {"name": "intuition_mor1e", "num_clusters": 4}}
    generator = torch.Generator().manual_seed(0)
    embeddings = F.one_hot(torch.arange(40) % 4, 8) + 0.1 * torch.randn(40, 8, generator=generator)
    centroids = find_centroids(embeddings, 4)
    prior = intuition(embeddings, centroids)
    torch.testing.assert_close(prior.sum(-1), torch.ones(40))
    assert len(prior[:4].argmax(-1).unique()) == 4 and torch.equal(prior[:4].argmax(-1), prior[4:8].argmax(-1))
    model = adapt(llama(), "intuition_mor1e", **fields, target_modules=["q_proj", "up_proj"])
    assert_near(logits(model, text, intuition_ids=prior[:2]), base, 1e-6)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and "layers.0" in name}
    assert sum(sizes.values()) == 3 * (32 + 32) + 3 * (32 + 48) + 2 * (6 * 32 + 6 * 4)
    randomise(model)
    for layer in tuner_layers(model):
        layer.moe_lora_router["default"].prior.data *= 10
    made = decisions(model)
    logits(model, text, intuition_ids=prior[:2])
    logits(model, text, intuition_ids=prior[:2].flip(0))
    assert (made[0].expert_index != made[len(made) // 2].expert_index).any()
    layer = next(tuner_layers(model))
    with torch.no_grad():
        x = torch.randn(18, 32)
        layer.decision = lambda *args: SharedAssignment.of(made[0])
        change = layer(x) - layer.base_layer(x)
    up = layer.moe_lora_B["default"][made[0].expert_index[:, 0].clamp(max=8) // 3, :, 0]
    real = made[0].expert_index[:, 0] < 9
    torch.testing.assert_close(F.cosine_similarity(change, up)[real].abs(), torch.ones(int(real.sum())))


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_intuition_ties_pairs_to_clusters(llama, steps):
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(32) % 4
    ids = torch.randint(1, 60, (1, 4), generator=generator).expand(32, -1).contiguous()
    labels = torch.cat([torch.full((32, 3), -100), 10 + cluster[:, None]], dim=1)  # told by the cluster alone
    prior = intuition(F.one_hot(cluster, 4), torch.eye(4))
    found = {}
    for clusters in (0, 4):
        router = {"name": "intuition_mor1e", "num_clusters": clusters}
        fields = {"num_experts": 9, "num_experts_per_tok": 2, "lora_alpha": 4, "router": router}
        torch.manual_seed(0)
        model = adapt(llama(), "intuition_mor1e", **fields, target_modules=["q_proj", "up_proj", "down_proj"])
        extra = {"intuition_ids": prior} if clusters else {}
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(steps):
            model(input_ids=ids, labels=labels, **extra).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        made = decisions(model)
        logits(model, {"input_ids": ids}, **extra)
        best = torch.stack([decision.expert_index.view(32, 4, 2)[:, 2, 0] for decision in made])
        found[clusters] = sum(mutual_information(cluster, row, 4, 9) for row in best) / len(best)
    assert found[0] == 0.0 and found[4] > 0.02  # 0.1 to 0.6 over five seeds


def mutual_information(first, second, num_first, num_second):
    """Return the mutual information of two lists of numbers, in nats."""
    joint = torch.zeros(num_first, num_second).index_put((first, second), torch.ones(len(first)), accumulate=True)
    joint = joint / joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float((joint * (joint / independent.clamp(min=1e-12)).clamp(min=1e-12).log()).sum())
