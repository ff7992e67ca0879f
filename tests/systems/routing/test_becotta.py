"""BECoTTA on its toy: a stream of four rotating domains, and a frozen classifier of two layers."""

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers
from hf_moe.inference.adaptation import TestTimeAdapter


DOMAINS = 4
EXPERTS = 4


def draw(domain, generator):
    """Return images of three classes, turned by a quarter for every domain, and their labels."""
    label = torch.randint(0, 3, (len(domain),), generator=generator)
    patterns = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    images = patterns[label] + 0.7 * torch.randn(len(domain), 3, 8, 8, generator=generator)
    turned = torch.stack([images.rot90(turns, (2, 3)) for turns in range(DOMAINS)])
    return {"pixel_values": turned[domain, torch.arange(len(domain))], "labels": label, "domain_ids": domain}


def train(model, steps, learning_rate, domains, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        rows = draw(torch.randint(0, domains, (32,), generator=generator), generator)
        if domains == 1:
            rows.pop("domain_ids")
        model.train()(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def classifier():
    """Return weights of a classifier that knows the first domain."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    model = ViTForImageClassification(config)
    train(model, 40, 0.005, domains=1)

    def build():
        twin = ViTForImageClassification(config)
        twin.load_state_dict(model.state_dict())
        return twin.eval()

    return build


def warmed_up(classifier, weight, steps):
    objective = {"condition_information": {"coef": weight, "condition": "domain", "num_conditions": DOMAINS}}
    torch.manual_seed(0)
    config = MoeLoraConfig.from_system(
        "becotta", num_experts=EXPERTS, num_experts_per_tok=1, r=4, lora_alpha=4, objectives=objective
    )
    model = get_peft_model(classifier(), config)
    train(model, steps, 0.02, DOMAINS)
    return model


def information(model):
    """Return the mutual information of the domain and the expert that is chosen for a row, in nats, by layer."""
    generator = torch.Generator().manual_seed(5)
    domain = torch.arange(256) % DOMAINS
    chosen = []
    handles = [
        layer.moe_lora_router["default"].register_forward_hook(
            lambda module, args, decision: chosen.append(decision.expert_index.view(256, -1)[:, 0])
        )
        for layer in tuner_layers(model)
    ]
    with torch.no_grad():
        model.train()(**draw(domain, generator))  # with the noise that the gates were trained with
    for handle in handles:
        handle.remove()
    found = []
    for expert in chosen:
        joint = torch.zeros(DOMAINS, EXPERTS).index_put((domain, expert), torch.ones(256), accumulate=True) / 256
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        found.append(float((joint * (joint / independent).clamp(min=1e-9).log()).nansum()))
    return sum(found) / len(found)


@pytest.mark.parametrize("steps", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_the_objective_ties_experts_to_domains(classifier, steps):
    without, tied = (information(warmed_up(classifier, weight, steps)) for weight in (0.0, 1.0))
    assert tied > 2 * without and tied > 0.2  # 0.59 to 0.92 against 0.01 to 0.03 over five seeds


def test_the_gradient_of_the_objective_reaches_the_gates(classifier):
    model = warmed_up(classifier, 1.0, steps=0)
    train(model, 1, 0.0, DOMAINS)  # the objective compares with the experts of the step before
    rows = draw(torch.arange(32) % DOMAINS, torch.Generator().manual_seed(0))
    model.train()(**rows).loss.backward()  # fresh experts add nothing, so the task has no gradient here
    for layer in tuner_layers(model):
        assert layer.moe_lora_router["default"].weight.grad.any() and not layer.moe_lora_A["default"].grad.any()


def accuracy(model, rows):
    with torch.no_grad():
        found = model.eval()(**{name: value for name, value in rows.items() if name != "labels"}).logits
    return (found.argmax(-1) == rows["labels"]).float().mean()


def test_three_rounds_of_a_stream_change_adapters_alone_and_keep_the_first_domain(classifier):
    model = warmed_up(classifier, 0.1, steps=40)
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held_out = draw(torch.zeros(128).long(), torch.Generator().manual_seed(7))
    before = accuracy(model, held_out)
    assert before > 0.5
    adapter = TestTimeAdapter(model, learning_rate=1e-4)
    generator = torch.Generator().manual_seed(8)
    for _ in range(3):
        for domain in range(DOMAINS):
            stream = draw(torch.full((32,), domain), generator)
            adapter.step(**{name: value for name, value in stream.items() if name != "labels"})
    assert accuracy(model, held_out) > before - 0.05
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, source[name])}
    assert changed and all("moe_lora_" in name for name in changed)
    adapter.restore_prob = 1.0
    adapter.step(pixel_values=stream["pixel_values"], domain_ids=stream["domain_ids"])
    assert all(torch.equal(tensor, adapter.source[name]) for name, tensor in adapter.trained.items())
