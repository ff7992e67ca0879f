"""Which adapters of a bank are worth assembling: accuracy, perplexity and the difference of updates all count."""

import pytest
import torch
from helpers.near import assert_near
from peft import LoraConfig, get_peft_model

from hf_moe.construction.selection import score_adapters, select_adapters, update_similarities


ALIKE = torch.eye(4)  # equally different from each other


def test_accuracy_decides_among_equal_perplexities():
    assert select_adapters([0.1, 0.9, 0.2, 0.8], [2.0] * 4, ALIKE, num_selected=2, shortlist=2) == [1, 3]


def test_perplexity_decides_among_equal_accuracies():
    assert select_adapters([0.5] * 4, [9.0, 3.0, 8.0, 2.0], ALIKE, num_selected=2, shortlist=2) == [1, 3]


def test_both_ranks_add_up():
    """The best in one alone loses to what is second in both."""
    assert select_adapters([0.9, 0.8, 0.1, 0.0], [4.0, 2.0, 3.0, 1.0], ALIKE, num_selected=1, shortlist=1) == [1]


def test_of_the_shortlist_the_most_different_are_taken():
    similarities = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.8], [0.1, 0.8, 1.0]])
    scores = [0.9, 0.8, 0.7], [1.0, 2.0, 3.0]
    assert select_adapters(*scores, similarities, num_selected=2, shortlist=3) == [0, 2]
    assert select_adapters(*scores, similarities, num_selected=2, shortlist=2) == [0, 1]


@pytest.fixture
def saved(llama, tmp_path):
    def save(name, seed_a, seed_b):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for part, seed in (("lora_A", seed_a), ("lora_B", seed_b)):
                generator = torch.Generator().manual_seed(seed)
                for key, parameter in model.named_parameters():
                    if part in key:
                        parameter.normal_(generator=generator)
        model.save_pretrained(tmp_path / name)
        products = [
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            for layer in model.modules()
            if hasattr(layer, "lora_A") and "default" in layer.lora_A
        ]
        return str(tmp_path / name), torch.cat([product.detach().flatten() for product in products])

    return save


def test_similarities_are_those_of_the_whole_updates(saved):
    """Of the first three, two have the same A and two the same B; only B A tells how near they are."""
    adapters = [saved("a", 0, 0), saved("same_a", 0, 1), saved("same_b", 1, 0), saved("copy", 0, 0)]
    updates = torch.stack([update for _, update in adapters])
    expected = torch.nn.functional.cosine_similarity(updates[:, None], updates[None], dim=-1)
    found = update_similarities([folder for folder, _ in adapters])
    assert_near(found, expected, 1e-5)
    assert found[0, 1] < 0.7 and found[0, 2] < 0.7 and found[0, 3] > 0.999


def test_scoring_leaves_the_model_bare_and_every_part_in_its_mode(llama, saved):
    folder, _ = saved("a", 0, 0)
    host = llama().train()
    host.model.layers[0].eval()
    modes = {name: module.training for name, module in host.named_modules()}
    shot = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[3, 4, 5]])}
    accuracies, perplexities = score_adapters(host, [folder], [shot])
    assert accuracies[0] in (0.0, 1.0) and perplexities[0] > 1
    with pytest.raises(KeyError, match="labels"):
        score_adapters(host, [folder], [shot, {"input_ids": shot["input_ids"]}])
    assert {name: module.training for name, module in host.named_modules()} == modes
