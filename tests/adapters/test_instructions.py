"""The gate of an answer has read the system's turn and the user's, not only what a template puts first."""

import warnings

import pytest
import torch
from helpers.adapted import decisions, logits, with_cache
from helpers.near import assert_near
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters.low_rank import SharedAssignment


END, HEADER = 61, 62
SYSTEM = [10, 11, 12, END]  # as a chat template adds it to every row
QUESTIONS = [[20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43], [50, 51, 52, 53]]


def chat(questions=QUESTIONS, system=SYSTEM):
    """Rows of a chat: the default system turn, a question, and an answer with its end mark, which have labels."""
    rows = [[*system, *question, END, HEADER, 5, 6, END] for question in questions]
    input_ids = torch.tensor(rows)
    labels = input_ids.clone()
    labels[:, :-3] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def adapted(model, router_input="decoder_layer", **options):
    router = {"name": "sequence", "end_token_id": END, **options}
    fields = {
        "num_experts": 4,
        "num_experts_per_tok": None,
        "target_modules": ["q_proj"],
        "router_input": router_input,
    }
    return get_peft_model(model, MoeLoraConfig(router=router, **fields))


def gates(model, inputs):
    made = decisions(model)
    logits(model, inputs)
    return SharedAssignment.of(made[0]).gates.view(*inputs["input_ids"].shape, -1)


@pytest.mark.parametrize("options", [{}, {"centred": True}, {"pooling": "sum"}, {"modalities": ["text"]}], ids=str)
def test_the_gate_of_an_answer_has_read_the_question(llama, randomise, options):
    model, rows = adapted(llama(), **options), chat()
    randomise(model)
    answer = gates(model, rows)[:, 10:12]  # behind the header
    assert torch.equal(answer[:, 0], answer[:, 1])
    assert (answer[1:, 0] - answer[:1, 0]).abs().amax(-1).min() > 1e-3
    first = adapted(llama(), **options, end="first")
    randomise(first)
    answer = gates(first, rows)[:, 10]
    assert torch.allclose(answer, answer[:1].expand_as(answer), atol=1e-6)


def test_the_gate_of_an_answer_pools_all_up_to_the_last_end(llama, randomise):
    model, rows = adapted(llama()), chat()
    randomise(model)
    seen = gates(model, rows)
    prompt = {name: value[:, :9] for name, value in rows.items()}  # up to the end of the question
    assert_near(seen[:, 9:12], gates(model, prompt)[:, 8:9].expand(-1, 3, -1), 1e-5)
    # Until the next one, nothing of a turn moves the gate.
    assert torch.allclose(seen[:, 3:8], seen[:, 3:4].expand(-1, 5, -1), atol=1e-6)


@pytest.mark.parametrize("end", ["last", "first"])
@pytest.mark.parametrize("pieces", [(4, 8, 9, 13), (3, 5, 13), (9, 10, 11, 12, 13)])
@torch.no_grad()
def test_the_gate_is_the_same_with_what_is_cached(llama, randomise, end, pieces):
    model, rows = adapted(llama(), end=end), chat()
    rows["attention_mask"][1, :2] = 0
    randomise(model)
    whole, cache, steps = logits(model, rows), {}, []
    for start, stop in zip((0, *pieces), pieces, strict=False):
        mask = rows["attention_mask"][:, :stop]
        output = model(input_ids=rows["input_ids"][:, start:stop], attention_mask=mask, use_cache=True, **cache)
        cache = with_cache(model, output)
        steps.append(output.logits)
    real = rows["attention_mask"].bool()
    assert_near(torch.cat(steps, 1)[real], whole[real], 1e-4)


def test_packed_chats_are_read_each_for_itself(llama, randomise):
    model, rows = adapted(llama()), chat()
    randomise(model)
    packed = {
        "input_ids": rows["input_ids"].reshape(1, -1),
        "position_ids": torch.arange(13).repeat(4)[None],
    }
    apart = {name: value for name, value in rows.items() if name == "input_ids"}
    assert_near(gates(model, packed).view(4, 13, -1), gates(model, apart), 1e-4)


SAME = {
    "last": ({}, [QUESTIONS[0]] * 4, SYSTEM),
    "first": ({"end": "first"}, QUESTIONS, SYSTEM),
}
OTHERS = {
    "last": ({}, QUESTIONS, SYSTEM),
    "first": ({"end": "first"}, QUESTIONS, []),
    "no end": ({"end_token_id": None}, [QUESTIONS[0]] * 4, SYSTEM),
}


def train(model, rows, batch):
    for _ in range(3):
        for start in range(0, 4, batch):
            model.train()(**{name: value[start : start + batch] for name, value in rows.items()}).loss.backward()


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("case", SAME)
def test_rows_that_all_pool_the_same_are_warned_of_once(llama, case, batch):
    options, questions, system = SAME[case]
    model = adapted(llama(), "model", **options)
    with pytest.warns(UserWarning, match="gives all rows the same gates: up to end_token_id=61") as caught:
        train(model, chat(questions, system), batch)
    assert sum("same gates" in str(item.message) for item in caught) == 1


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("case", OTHERS)
def test_rows_that_pool_different_tokens_are_not_warned_of(llama, case, batch):
    options, questions, system = OTHERS[case]
    model = adapted(llama(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, chat(questions, system), batch)


def test_a_centred_gate_subtracts_what_the_gates_of_answers_read(llama):
    model, rows = adapted(llama(), centred=True), chat()
    router = next(module for module in model.modules() if type(module).__name__ == "SequenceRouter")
    states = []
    router.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model.train()(**rows).loss.backward()
    directions = torch.nn.functional.rms_norm(states[0].view(4, 13, -1), (32,))
    assert_near(router.accumulated[:-1] / 4, directions[:, :9].mean((0, 1)), 1e-4)
    assert router.accumulated[-1] == 4
