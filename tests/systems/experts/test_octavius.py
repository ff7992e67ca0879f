"""Octavius: one gate for a sample, from the text of its instruction, and experts that keep opposite tasks apart."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers
from hf_moe.adapters.low_rank import SharedAssignment
from hf_moe.modeling.routing_context import RoutingContext


IMAGE, END = 60, 61
WIDTH, TASKS = 12, 4


def preset(target_modules, **fields):
    config = MoeLoraConfig.from_system("octavius", target_modules=target_modules, **fields)
    config.router = {**config.router, "end_token_id": END}
    return config


def watch(model):
    """Collect the gates (T, E) of the one router."""
    gates = []
    (router,) = [layer.moe_lora_router["default"] for layer in tuner_layers(model) if layer.moe_lora_router]
    router.register_forward_hook(lambda module, args, decision: gates.append(SharedAssignment.of(decision).gates))
    return gates


def test_the_gate_is_the_renormalised_top_two_of_what_the_instruction_says_on_average():
    config = preset(["q_proj"])
    settings = config.settings("q_proj")
    router = config.build_router(config.spec(0, 3, settings), settings)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 3, generator=generator), torch.randn(4, 3, generator=generator)
    router.weight.data = weight
    context = RoutingContext(
        modality_ids=torch.tensor([[0, 1, 1, 0, 0, 0]]),
        token_mask=torch.ones(1, 6, dtype=torch.bool),
        input_ids=torch.tensor([[5, IMAGE, IMAGE, 7, END, 9]]),
    )
    found = SharedAssignment.of(router(hidden, context)).gates
    scores = (hidden / hidden.square().mean(-1, keepdim=True).sqrt()) @ weight.T
    for token, read in enumerate([[0], [0], [0], [0, 3], [0, 3, 4], [0, 3, 4]]):
        best, chosen = scores[read].mean(0).softmax(-1).topk(2)
        expected = torch.zeros(4).scatter(0, chosen, best / best.sum())
        torch.testing.assert_close(found[token], expected, msg=f"token {token}")


def test_another_image_leaves_the_gate_as_it_is_and_another_question_moves_it(own_model, image_rows, randomise):
    model = get_peft_model(own_model(), preset(["q_proj", "down_proj"])).eval()
    randomise(model)
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 6, 7, END, 9]] * 2)  # the image stands before the question
    pixels = image_rows["pixel_values"]
    gates = watch(model)
    with torch.no_grad():
        model(input_ids=ids, pixel_values=pixels)
        model(input_ids=ids, pixel_values=pixels.flip(0) + 1.0)
        ids[:, 6] = 8
        model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(gates[1], gates[0], atol=0, rtol=0)
    before, after = (gate.view(2, 9, 4) for gate in (gates[0], gates[2]))
    assert torch.equal(after[:, :6], before[:, :6])
    assert (after[:, 6:] != before[:, 6:]).any(-1).all()
    assert torch.equal(before[:, 8], before[:, 7])


class Layer(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states, **kwargs):
        return self.linear(hidden_states)


class Host(PreTrainedModel):
    """One frozen linear layer as a model whose inputs tell which tokens are text."""

    config_class = LlamaConfig

    def __init__(self):
        super().__init__(LlamaConfig(hidden_size=WIDTH, num_attention_heads=1))
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer()])

    def forward(self, inputs_embeds, mm_token_type_ids=None, **kwargs):
        return self.layers[0](inputs_embeds, **kwargs)


def fit(model, batch, steps=300, learning_rate=0.02):
    """Train on what `batch()` draws, and return the loss on fresh rows."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        inputs, y = batch(64)
        F.mse_loss(model(**inputs), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        inputs, y = batch(512)
        return F.mse_loss(model(**inputs), y).item()


@pytest.mark.parametrize("seed", range(4))
def test_four_experts_keep_opposite_tasks_apart_where_one_lora_of_their_active_rank_cannot(seed):
    """Seeds 4 and 5 agree. With other questions or rates, some seeds are as good with one pair, weighed in reverse."""
    generator = torch.Generator().manual_seed(seed)
    changes = torch.randn(TASKS, WIDTH, 3, generator=generator) @ torch.randn(TASKS, 3, WIDTH, generator=generator) / 6
    changes[1] = -changes[0]
    questions = torch.randn(TASKS, WIDTH, generator=generator)
    base = Host().layers[0].linear.weight.detach()

    def batch(size):
        task = torch.randint(0, TASKS, (size,), generator=generator)
        data = torch.randn(size, 3, WIDTH, generator=generator)
        x = torch.cat([questions[task][:, None], data], dim=1)  # the question, then what it is asked about
        y = F.linear(x, base) + torch.einsum("boi,bsi->bso", changes[task], x)
        return {"inputs_embeds": x, "mm_token_type_ids": torch.tensor([[0, 1, 1, 1]]).expand(size, -1)}, y

    torch.manual_seed(seed)
    config = MoeLoraConfig.from_system("octavius", target_modules=["linear"], r=4, lora_alpha=4)
    routed = get_peft_model(Host(), config)
    single = get_peft_model(Host(), LoraConfig(r=8, lora_alpha=8, target_modules=["linear"]))
    assert fit(routed, batch) < 0.7 * fit(single, batch)
    gates = watch(routed)
    with torch.no_grad():
        routed(inputs_embeds=questions[:2, None], mm_token_type_ids=torch.zeros(2, 1, dtype=torch.long))
    pairs = [set(row.nonzero().flatten().tolist()) for row in gates[0]]
    assert len(pairs[0]) == len(pairs[1]) == 2 and pairs[0] != pairs[1]
