"""Test-time adaptation learns from what the model and its source are sure of, and forgets on purpose."""

import pytest
import torch
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.inference.adaptation import TestTimeAdapter


@pytest.fixture
def adapted(vit, randomise):
    model = get_peft_model(vit(), MoeLoraConfig(target_modules=["q_proj", "v_proj"]))
    randomise(model)
    return model


@pytest.fixture
def images():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def changed(adapter):
    return {name for name, value in adapter.trained.items() if not torch.equal(value, adapter.source[name])}


@pytest.mark.parametrize("training", [True, False])
def test_a_step_leaves_the_mode_of_every_part(adapted, images, training):
    adapted.train(training)
    adapted.get_base_model().vit.layers[0].eval()  # as a frozen part
    modes = [module.training for module in adapted.modules()]
    TestTimeAdapter(adapted, confidence=0.0).step(pixel_values=images)
    assert [module.training for module in adapted.modules()] == modes
    with pytest.raises(ValueError):
        TestTimeAdapter(adapted).step(pixel_values=images[..., :8])
    assert [module.training for module in adapted.modules()] == modes


def test_it_learns_only_from_predictions_above_the_confidence(adapted, images):
    with torch.no_grad():
        best = adapted.eval()(pixel_values=images).logits.softmax(-1).amax(-1)
    above = TestTimeAdapter(adapted, learning_rate=1e-3, confidence=float(best.max()) + 1e-4, restore_prob=0.0)
    above.step(pixel_values=images)
    assert not changed(above)
    below = TestTimeAdapter(adapted, learning_rate=1e-3, confidence=float(best.max()) - 1e-4, restore_prob=0.0)
    below.step(pixel_values=images)
    assert changed(below)


def test_predictions_below_the_confidence_change_nothing_of_what_is_learnt(adapted, images):
    with torch.no_grad():
        best = adapted.eval()(pixel_values=images).logits.softmax(-1).amax(-1)
    first, second = best.topk(2).values
    results = []
    for pixels in (images, images[best.argmax()][None]):
        adapter = TestTimeAdapter(adapted, learning_rate=1e-3, confidence=float(first + second) / 2, restore_prob=0.0)
        adapter.step(pixel_values=pixels)
        results.append({name: value.detach().clone() for name, value in adapter.trained.items()})
        with torch.no_grad():
            for name, value in adapter.trained.items():
                value.copy_(adapter.source[name])
    for name, value in results[0].items():
        # Adam makes whole steps of gradients that are nearly zero, whatever their last digits say.
        assert ((value - results[1][name]).abs() > 1e-4).float().mean() < 0.01, name


def test_it_does_not_learn_where_the_source_is_surer(adapted, images):
    """Adapted weights that have become less sure than their source are not followed."""
    adapter = TestTimeAdapter(adapted, learning_rate=1e-3, confidence=0.0, restore_prob=0.0)
    with torch.no_grad():
        adapted.eval()
        source = adapted(pixel_values=images).logits.softmax(-1)
        for name, value in adapter.trained.items():
            if "moe_lora_B" in name:
                value.mul_(0.5)
        probs, label = adapted(pixel_values=images).logits.softmax(-1).max(-1)
        surer = probs >= source.gather(-1, label[:, None]).squeeze(-1)
    assert surer.any() and not surer.all()
    before = {name: value.detach().clone() for name, value in adapter.trained.items()}
    adapter.step(pixel_values=images[~surer])
    assert all(torch.equal(value, before[name]) for name, value in adapter.trained.items())
    adapter.step(pixel_values=images[surer])
    assert not all(torch.equal(value, before[name]) for name, value in adapter.trained.items())


def test_a_share_of_the_weights_returns_after_every_step(adapted, images):
    adapter = TestTimeAdapter(adapted, learning_rate=1e-2, confidence=0.0, restore_prob=0.3)
    adapter.step(pixel_values=images)
    same = total = 0
    for name, value in adapter.trained.items():
        if "moe_lora_A" in name:  # every entry has a gradient, which Adam makes a step of like size
            same += int((value == adapter.source[name]).sum())
            total += value.numel()
    assert 0.25 < same / total < 0.35


@pytest.mark.parametrize("field, value", [("confidence", 1.0), ("confidence", -0.1), ("restore_prob", 1.1)])
def test_numbers_out_of_range_are_refused(adapted, field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        TestTimeAdapter(adapted, **{field: value})
