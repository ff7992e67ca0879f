"""DeepSeek-VL2: a balance within every row, and a router by size."""

import pytest
import torch
from helpers.balance import balance
from transformers import LlamaConfig

from hf_moe import HfMoeConfig
from hf_moe.configuration.systems import load_system


BALANCE = load_system("deepseek_vl2").fields("model")["objectives"]["load_balance"]


def test_the_balance_is_that_of_the_batch_where_all_rows_use_the_same_experts():
    index = torch.tensor([[0, 0, 1, 2], [2, 1, 0, 0]])
    assert balance(BALANCE, index, 4) == pytest.approx(balance({**BALANCE, "scope": "batch"}, index, 4))


def test_rows_that_use_experts_of_their_own_are_penalised():
    index = torch.tensor([[0, 1, 0, 1], [2, 3, 2, 3]])
    assert balance(BALANCE, index, 4) == pytest.approx(2.0)
    assert balance({**BALANCE, "scope": "batch"}, index, 4) == pytest.approx(1.0)


@pytest.mark.parametrize(("variant", "scores", "experts"), [("softmax", "softmax", 64), ("sigmoid", "sigmoid", 72)])
def test_variants_choose_the_router(variant, scores, experts):
    moe = HfMoeConfig.from_system("deepseek_vl2", variant=variant, text_config=LlamaConfig()).moe_config
    assert (moe.router.get("score_function", "softmax"), moe.num_experts) == (scores, experts)
    assert moe.moe_layers(3) == [1, 2] and ("bias_update_rate" in moe.router) == (variant == "sigmoid")
