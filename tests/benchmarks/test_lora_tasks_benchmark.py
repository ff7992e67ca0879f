"""The benchmark of contradicting tasks: what its contestants share, and that it runs and reads what is finished."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("lora_tasks_benchmark", FOLDER / "lora_tasks.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def base(benchmark):
    return benchmark.Base(quick=True)


def test_the_tasks_contradict_each_other_and_the_test_words_are_new(benchmark):
    train, test = (set(benchmark.questions(part)) for part in (False, True))
    assert len(train) == 192 and len(test) == 96
    words = [{question.split()[2] for question, _ in part} for part in (train, test)]
    assert not words[0] & words[1] and len(words[1]) == 48
    assert sum(truth for _, truth in test) == 48
    answers = {task: {q: answer for _, q, answer in benchmark.rows_of([task], test=True)} for task in ("truth", "lie")}
    assert all(answers["lie"][question] is not answer for question, answer in answers["truth"].items())


def test_all_contestants_run_with_equal_trainable_parameters(benchmark, base):
    results = {arm: benchmark.train(base, arm, 0, 1) for arm in benchmark.ARMS}
    single = results["lora"]["trainable"]
    assert results["task"]["trainable"] == single
    assert results["alone_truth"]["trainable"] + results["alone_lie"]["trainable"] == single
    assert single < results["token"]["trainable"] < 1.03 * single  # the learned router
    assert all(0 <= results["lora"][task] <= 1 for task in ("truth", "lie"))


def test_the_instruction_picks_the_expert(benchmark, base):
    model = benchmark.get_peft_model(base.model, base.config("task"))
    chosen = []
    router = next(module for module in model.modules() if isinstance(module, benchmark.ByInstructionRouter))
    router.register_forward_hook(lambda module, args, output: chosen.append(output.expert_index))
    rows = [row for row in base.inputs if row[0] == "truth"][:2] + [row for row in base.inputs if row[0] == "lie"][:1]
    base.answer_logits(model, rows)
    model.unload()
    assert chosen[0].view(3, -1).unique(dim=1).flatten().tolist() == [0, 0, 1]


def test_a_finished_cell_is_read_and_not_run_again(benchmark, base, tmp_path, monkeypatch):
    arguments = argparse.Namespace(quick=False, runs=tmp_path)
    calls = []
    monkeypatch.setattr(benchmark, "train", lambda *args: calls.append(args) or {"seed": 3, "final": len(calls)})
    first = benchmark.cell(base, "lora", 3, arguments)
    assert benchmark.cell(base, "lora", 3, arguments) == first and len(calls) == 1
    path = tmp_path / "lora-3.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "settings": {**kept["settings"], "rank": 1}}))
    assert benchmark.cell(base, "lora", 3, arguments)["final"] == 2
