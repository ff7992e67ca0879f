"""Partial LoRA on redundant experts: text stays as it was, images take up what is spare."""

import pytest
import torch
from helpers.adapted import logits
from helpers.hosts.families import HOSTS
from helpers.near import assert_near
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import MoeLoraConfig
from hf_moe.analysis.experts import expert_redundancy
from hf_moe.construction.alignment import gromov_wasserstein_init


def adapt(model, **fields):
    return get_peft_model(model, MoeLoraConfig.from_system("moe_redundancy_plora", **fields)).eval()


def train(model, inputs, steps, learning_rate=0.05):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        model.train()(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def make_redundant(stacks):
    """Make all experts of some stacks nearly the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for stack in stacks:
            stack.copy_(stack[:1] + 0.02 * stack.std() * torch.randn(stack.shape, generator=generator))


def test_text_is_bit_identical_after_training_on_images(own_model, image_rows, text):
    base = own_model()
    before, before_images = logits(base, text), logits(base, image_rows)
    model = adapt(own_model(), target_modules=r".*language_model.*(q_proj|v_proj)")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("experts" in name for name in trained) and not any("router" in name for name in trained)
    train(model, image_rows, steps=3)
    assert torch.equal(logits(model, text), before)
    assert (logits(model, image_rows) - before_images).abs().max() > 0.01


def test_redundant_experts_come_apart_for_images_alone_in_our_own_models(own_model, image_rows, text):
    base = own_model()
    make_redundant(base.moe_layers()[1].experts.parameters())
    model = adapt(base, target_modules=r".*language_model.*(q_proj|v_proj)")
    image, real = image_rows["input_ids"] == 60, text["attention_mask"].bool()

    def redundancy():
        return expert_redundancy(model, image_rows, image)[1], expert_redundancy(model, text, real)[1]

    before = redundancy()
    train(model, image_rows, steps=10, learning_rate=0.02)
    after = redundancy()
    assert before[0] > 0.9 and after[0] < before[0] - 0.1
    assert after[1] == before[1]


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_redundant_experts_come_apart_for_new_tokens_alone_in_a_moe_host(name):
    torch.manual_seed(0)
    host = HOSTS[name].build().eval()
    rows = HOSTS[name].inputs()
    stacks = [p for key, p in host.named_parameters() if ".experts." in key and p.dim() == 3]
    make_redundant(stacks)
    image = rows["attention_mask"].bool() & (torch.arange(9) >= 5)
    images = {**rows, "mm_token_type_ids": image.long()}  # codes of images among the words
    unadapted = logits(host, rows)
    model = adapt(host, target_modules=["q_proj", "v_proj"])
    before_text = logits(model, rows)
    # To the bit with one thread; several add up the host's experts in another order.
    assert_near(before_text, unadapted, 1e-6)
    real = rows["attention_mask"].bool()

    def redundancy():
        return expert_redundancy(model, images, image), expert_redundancy(model, rows, real)

    before = redundancy()
    assert sorted(before[0]) == [0, 1] and min(before[0].values()) > 0.9
    train(model, images, steps=15)
    after = redundancy()
    assert sum(after[0].values()) < sum(before[0].values()) - 0.1
    assert after[1] == before[1]
    assert torch.equal(logits(model, rows), before_text)


def test_the_redundancy_of_a_host_whose_stacks_take_no_adapters_can_be_measured():
    torch.manual_seed(0)
    host, rows = HOSTS["gpt_oss"].build().eval(), HOSTS["gpt_oss"].inputs()
    real = rows["attention_mask"].bool()
    before = expert_redundancy(host, rows, real)
    make_redundant(p for key, p in host.named_parameters() if ".experts." in key and p.dim() == 3)
    after = expert_redundancy(host, rows, real)
    assert all(after[layer] > 0.9 > before[layer] for layer in (0, 1))


def test_the_redundancy_of_a_model_without_experts_is_refused(llama, text):
    with pytest.raises(ValueError, match="no layers with experts"):
        expert_redundancy(llama(), text, text["attention_mask"].bool())


def test_aligned_rows_of_new_tokens_learn_faster_than_drawn_ones():
    """Codes of the same geometry and grammar as the words: with the rows found by geometry, the model knows both."""
    words, generator = 20, torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=words, initializer_range=0.3, tie_word_embeddings=True))

    def batch():
        chain = [torch.randint(0, words, (16,), generator=generator)]
        for _ in range(5):
            chain.append((3 * chain[-1] + 1) % words)
        return torch.stack(chain, 1)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        ids = batch()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    text = model.get_input_embeddings().weight
    codes = text @ torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    losses = {}
    for aligned in (True, False):
        drawn = 0.02 * torch.randn(words, 32, generator=generator)
        rows = nn.Parameter(gromov_wasserstein_init(codes, text) if aligned else drawn)
        optimizer = torch.optim.Adam([rows], lr=0.01)
        for _ in range(100):
            ids = batch()
            hidden = model.model(inputs_embeds=rows[ids]).last_hidden_state
            loss = F.cross_entropy((hidden[:, :-1] @ rows.T).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[aligned] = loss.item()
    assert losses[True] < 0.1 * losses[False]
