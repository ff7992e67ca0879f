"""What the ablation sets against evolution: expert dropout, expert contrast and the local entropy loss."""

import pytest
import torch
from helpers.near import assert_near
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.objectives.expert_contrast import ExpertContrast
from hf_moe.modeling.objectives.local_entropy import LocalEntropy
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing_context import RoutingContext


SPEC = MoELayerSpec(0, 8, 3, 1, 8)


def context_of(rows: int, positions: int, index: list[int], outputs: torch.Tensor | None = None, probs=None):
    context = RoutingContext(
        torch.zeros(rows, positions, dtype=torch.long), torch.ones(rows, positions, dtype=torch.bool)
    )
    chosen = torch.tensor(index)[:, None]
    if probs is None:
        probs = torch.full((rows * positions, 3), 1 / 3)
    context.decisions[0] = ExpertAssignment(chosen, torch.ones_like(chosen).float(), 3, router_probs=probs)
    if outputs is not None:
        context.outputs[0] = outputs.view(rows, positions, -1)
    return context


def test_local_entropy_is_log_e_for_uniform_and_zero_for_certain_tokens():
    probs = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3]])
    context = context_of(2, 2, [0, 0, 0, 0], probs=probs)
    values = LocalEntropy([SPEC], 1.0)(context.decisions, context)
    torch.testing.assert_close(values, torch.tensor([0.0, torch.log(torch.tensor(3.0))]))


def test_contrast_is_low_for_experts_that_differ_and_log_n_for_equal_ones():
    different = torch.eye(8)[[0, 0, 1, 2]]
    equal = torch.eye(8)[[0, 0, 0, 0]]
    context = context_of(2, 4, [0, 0, 1, 2, 0, 0, 1, 2], torch.cat([different, equal]))
    low, high = ExpertContrast([SPEC], 1.0)(context.decisions, context)
    assert low < 1e-3 and high == pytest.approx(torch.log(torch.tensor(3.0)).item())


def test_contrast_counts_only_the_experts_in_use_and_no_empty_slot():
    equal = torch.eye(8)[[0, 0, 0, 0]].requires_grad_()
    context = context_of(1, 4, [0, 1, 3, 3], equal)
    context.token_mask[0, 2:] = False
    value = ExpertContrast([SPEC], 1.0)(context.decisions, context)
    assert value.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    value.sum().backward()
    assert equal.grad.isfinite().all()


def test_contrast_pulls_the_experts_of_a_model_apart_when_trained():
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    moe = {"num_experts": 3, "num_experts_per_tok": 1, "layers": [1], "objectives": {"expert_contrast": 1.0}}
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, initializer_range=0.3, moe_config=moe)).train()
    ids = torch.randint(0, 40, (4, 16))
    optimizer = torch.optim.Adam(model.moe_layers()[1].experts.parameters(), lr=1e-2)
    values = []
    for _ in range(10):
        outputs = model(input_ids=ids, labels=ids)
        values.append(outputs.objective_values["expert_contrast"].item())
        optimizer.zero_grad()
        outputs.aux_loss.backward()
        optimizer.step()
    assert values[-1] < 0.5 * values[0]


def test_contrast_needs_one_expert_per_token():
    with pytest.raises(ValueError, match=r"num_experts_per_tok=1 in the layers \[4\]"):
        ExpertContrast([SPEC, MoELayerSpec(4, 8, 3, 2, 8)], 1.0)
    with pytest.raises(ValueError, match="temperature"):
        build("objective", ExpertContrast, {"temperature": 0}, [SPEC], 1.0)


@pytest.mark.parametrize("backend", ["eager", "ragged", "grouped_mm"])
def test_expert_dropout_acts_in_training_only_in_every_backend(tiny_model, text_batch, backend):
    batch = {name: value for name, value in text_batch.items() if name != "labels"}
    plain = tiny_model(tower=False)
    dropping = tiny_model(tower=False, moe_config={"experts": {"name": "ffn", "dropout": 0.5}})
    dropping.load_state_dict(plain.state_dict())
    dropping.set_experts_implementation(backend)
    with torch.no_grad():
        assert_near(dropping(**batch).logits, plain(**batch).logits, 1e-5)
        dropping.train()
        assert (dropping(**batch).logits - dropping(**batch).logits).abs().max() > 1e-3
