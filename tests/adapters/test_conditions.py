"""The conditions of the rows: how they come to the routers, and which are refused."""

import pytest
import torch
from datasets import Dataset
from helpers.adapted import logits
from helpers.trl_runs import arguments, tokenizer
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_moe import MoeLoraConfig
from hf_moe.adapters import ConditionCollator, merge_for, routing_inputs
from hf_moe.adapters.layer import tuner_layers


BY_TASK = {"target_modules": ["q_proj"], "router": "condition", "num_experts": 3}
TASKS = torch.tensor([2, 0])


@pytest.fixture
def adapt(llama, randomise):
    def build(**fields):
        model = get_peft_model(llama(), MoeLoraConfig(**{**BY_TASK, **fields})).eval()
        randomise(model)
        return model

    return build


def test_ids_arrive_also_where_peft_has_a_name_of_its_own_for_them(adapt, text):
    expected = logits(adapt(), text, task_ids=TASKS)
    typed = adapt(task_type="CAUSAL_LM")
    torch.testing.assert_close(logits(typed, text, condition_ids={"task": TASKS}), expected)
    torch.testing.assert_close(logits(typed, text, condition_ids=TASKS), expected)
    with pytest.raises(ValueError, match="task_ids never arrives"):
        logits(typed, text, task_ids=TASKS)
    with pytest.raises(ValueError, match=r"the model's routers read \['place', 'task'\]"):
        override = {"q_proj": {"router": {"name": "condition", "condition": "place"}}}
        logits(adapt(target_modules=["q_proj", "v_proj"], target_overrides=override), text, condition_ids=TASKS)


def test_a_column_trains_the_expert_of_its_row_under_trl(llama, tmp_path):
    words = tokenizer()
    rows = Dataset.from_list([{"text": "w4 w5 w6 w7", "task_ids": 2 * (n % 2)} for n in range(4)])
    trainer = SFTTrainer(
        llama(),
        arguments(SFTConfig, tmp_path, 1, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=ConditionCollator(DataCollatorForLanguageModeling(words.pad_token_id), ["task"]),
        processing_class=words,
        peft_config=MoeLoraConfig(**BY_TASK, task_type="CAUSAL_LM"),
    )
    trainer.train()
    moved = next(tuner_layers(trainer.model)).moe_lora_B["default"].detach().abs().sum((1, 2)) > 0
    assert moved.tolist() == [True, False, True]


WRONG = [
    (torch.tensor([1]), "one value for each of 2 rows"),
    (torch.tensor([0, 1, 2, 0]), "one value for each of 2 rows"),
    (torch.tensor(1), "one value for each of 2 rows"),
    (torch.tensor([[0], [1]]), "values for 1 tokens, and the call has 9"),
    (torch.tensor([0.0, 1.0]), "must be integers"),
    (torch.tensor([0, 3]), "must be less than 3"),
]


@pytest.mark.parametrize("ids,message", WRONG, ids=lambda value: str(getattr(value, "tolist", lambda: "")()))
def test_ids_that_are_not_one_known_number_for_each_row_are_refused(adapt, text, ids, message):
    model = adapt()
    with pytest.raises(ValueError, match=message):
        logits(model, text, task_ids=ids)


def test_the_beams_of_a_row_share_its_id(adapt, text):
    model = adapt()
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    with routing_inputs(task=TASKS):
        together = model.generate(**inputs, **options)
    with routing_inputs(task=TASKS[1:]):
        alone = model.generate(**{name: value[1:] for name, value in inputs.items()}, **options)
    assert torch.equal(together[1:], alone)
    with routing_inputs(task=torch.tensor([0, 1, 2])), pytest.raises(ValueError, match="each of 4 rows"):
        model.generate(**inputs, **options)


@pytest.mark.parametrize("task", [3, -1])
def test_no_task_without_an_expert_is_merged_for(adapt, task):
    with pytest.raises(ValueError, match=r"must lie in \[0, 3\)"):
        merge_for(adapt(), condition_ids={"task": task})
