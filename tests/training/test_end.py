"""The end of a run: weights first, then whatever fails; a resumed run does what is left and trains nothing again."""

import io
import json
import shutil
from contextlib import redirect_stderr

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.cli import main
from hf_moe.construction.evolution import EVOLUTION_FILE, ExpertEvolution
from hf_moe.construction.tokenizer import train_word_tokenizer
from hf_moe.training import adapter, job, run
from hf_moe.training.resuming import newest_whole_checkpoint


TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
WORDS = "what is it ? a cat dog bird fish yes no red blue"
# Where each stage of the end happens, by kind of recipe: (module, function).
STAGES = {
    "evaluation": {"model": (run, "evaluate_vqa"), "adapter": (adapter, "evaluate_vqa")},
    "routing": {"model": (run, "collect_routing")},
    "generation": {"model": (run, "predict_answers")},
    "report": {"model": (job, "write_report"), "adapter": (job, "write_report")},
    "picture": {"model": (run, "draw_routing")},
    "card": {"model": (run, "write_card"), "adapter": (adapter, "write_adapter_card")},
    "strayed parameters": {"model": (job, "moved_parameters"), "adapter": (job, "moved_parameters")},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [("what is it ?", "cat"), ("is it a dog ?", "no"), ("is it red ?", "yes"), ("a bird ?", "fish")]
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_word_tokenizer([WORDS])
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "vocab_size": len(tokenizer)})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["model", "stages", "adapter"])
def recipe(request, rows, base, tmp_path_factory):
    content = {
        "name": "tiny",
        "data": {"train": {"path": str(rows)}, "eval": {"path": str(rows)}},
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 0.01},
        "evaluation": {"batch_size": 2, "generated": 2},
    }
    if request.param == "adapter":
        content["model"] = {"base": str(base)}
        content["adapter"] = {"num_experts": 2, "r": 2, "target_modules": ["q_proj"]}
        del content["evaluation"]["generated"]
    else:
        content["model"] = {"language_model": TINY, "tokenizer": "words", "moe_config": {"num_experts": 2}}
    if request.param == "stages":
        del content["training"]["max_steps"]
        content["model"]["moe_config"] = {"layers": []}
        trained = {"training": {"max_steps": 4}, "trainable": ["backbone", "experts", "embeddings"]}
        content["stages"] = [
            {"name": "dense", **trained, "evolve": {"layers": "every_2", "beta_ranges": [0.5]}},
            {
                "name": "moe",
                **trained,
                "construct": {"assemble": {"moe_config": {"layers": "every_2", "num_experts": 2}}},
            },
        ]
    path = tmp_path_factory.mktemp(request.param) / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return request.param, path


@pytest.fixture(scope="module")
def whole(recipe):
    """The folder of a run that nothing stopped."""
    folder = recipe[1].parent / "whole"
    assert train(recipe[1], folder) == 0
    return folder


def weights(folder):
    files = [folder / "checkpoint" / name for name in ("model.safetensors", "adapter_model.safetensors")]
    return load_file(next(file for file in files if file.is_file()))


def train(path, folder, *flags):
    return main(["train", str(path), "--output-dir", str(folder), *flags])


def break_after_training(monkeypatch, module, name, failure, begun=False):
    """Let a function fail once a training has begun, and not in the rehearsal before."""
    trainings, original, inner = [begun], getattr(module, name), Trainer.train

    def note_and_train(self, *args, **kwargs):
        trainings.append(True)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", note_and_train)

    def break_(*args, **kwargs):
        if not any(trainings):
            return original(*args, **kwargs)
        if name == "moved_parameters":
            return [], ["lm_head.weight"]
        raise failure

    monkeypatch.setattr(module, name, break_)


@pytest.fixture(
    scope="module", params=[ValueError("broken"), KeyboardInterrupt()], ids=lambda value: type(value).__name__
)
def failed(request, recipe):
    """A run whose evaluation failed after the training: how it ended, its folder and its weights."""
    kind, path = recipe
    failure, folder = request.param, path.parent / type(request.param).__name__
    with pytest.MonkeyPatch.context() as patched:
        break_after_training(patched, *STAGES["evaluation"]["adapter" if kind == "adapter" else "model"], failure)
        error, saved = io.StringIO(), None
        with redirect_stderr(error):
            status = train(path, folder)
    saved = weights(folder)
    return (status, failure, error.getvalue()), folder, saved


def test_a_failed_evaluation_leaves_the_weights_and_says_where(failed):
    (status, failure, noted), folder, saved = failed
    assert status == (2 if isinstance(failure, ValueError) else 130)
    assert str(folder / "checkpoint") in noted and "--resume" in noted
    assert saved and not (folder / "checkpoint.partial").exists() and not list(folder.glob(".rehearsal-*"))


def refuse_training(monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))


def test_a_resumed_end_does_the_rest_and_trains_nothing(failed, recipe, tmp_path, monkeypatch):
    _, folder, saved = failed
    shutil.copytree(folder, tmp_path / "run")
    refuse_training(monkeypatch)
    assert train(recipe[1], tmp_path / "run", "--resume") == 0
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights(tmp_path / "run").items())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["evaluated"] == 4 and len(report["log_history"]) > 0 and report["trainable_parameters"]
    assert (tmp_path / "run" / "checkpoint" / "README.md").is_file()


PHASES = (
    "Reading the data",
    "Rehearsing the end",
    "Training",
    "Writing the weights to",
    "Scoring answers, and writing",
)


def test_a_run_says_what_it_is_at(failed, recipe):
    lines = failed[0][2].splitlines()
    said = [next(index for index, line in enumerate(lines) if line.startswith(phase)) for phase in PHASES]
    assert said == sorted(said)
    assert ("Stage dense" in lines) == (recipe[0] == "stages")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "strayed parameters"])
def test_every_stage_of_the_end_may_fail_and_keeps_the_weights(whole, recipe, stage, tmp_path, monkeypatch, capsys):
    kind, path = recipe
    place = STAGES[stage].get("adapter" if kind == "adapter" else "model")
    if place is None:
        pytest.skip("this kind of recipe has no such stage")
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    break_after_training(monkeypatch, *place, ValueError("broken"), begun=True)
    assert train(path, folder, "--resume") == 2
    noted = capsys.readouterr().err
    assert "broken" in noted and str(folder / "checkpoint") in noted and "--resume" in noted
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in weights(whole).items())


def test_parameters_that_strayed_are_refused_and_their_weights_kept(recipe, tmp_path, monkeypatch):
    kind, path = recipe
    if kind == "stages":
        pytest.skip("a stage that strayed is refused before the next")
    break_after_training(monkeypatch, *STAGES["strayed parameters"]["model"], None)
    with pytest.raises(RuntimeError, match="frozen parameters moved") as raised:
        train(path, tmp_path / "run")
    assert "--resume" in " ".join(raised.value.__notes__) and weights(tmp_path / "run")


@pytest.mark.parametrize("answer", [7, 0, True, False, 1.5, "007"])
def test_answers_of_every_type_are_trained_and_scored(recipe, answer, tmp_path, rows):
    kind, path = recipe
    if kind == "stages" or (kind == "adapter" and answer in (7, True, 1.5)):
        pytest.skip("its data are read as those of one stage are, and the half of them tells that an adapter's are")
    turns = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": answer}]
    lines = [{"messages": turns, "answer": answer}, {"messages": turns, "answers": [answer, "cat"]}]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = f"{{path: {tmp_path / 'odd.jsonl'}}}"
    flags = ["--set", f"data.eval={source}", "--set", "training.max_steps=1"]
    assert train(path, tmp_path / "run", *flags) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["evaluated"] == 2


def test_a_row_that_cannot_be_scored_is_found_before_training(recipe, tmp_path, rows, monkeypatch, capsys):
    kind, path = recipe
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    del lines[3]["messages"][1]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    refuse_training(monkeypatch)
    assert train(path, tmp_path / "run", "--set", f"data.eval={{path: {tmp_path / 'odd.jsonl'}}}") == 2
    assert "Row 3 of the dataset: A row to be scored needs" in capsys.readouterr().err


def test_a_question_that_cannot_be_asked_is_found_before_training(recipe, tmp_path, rows, monkeypatch, capsys):
    kind, path = recipe
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[3]["messages"][0]["mood"] = "glad"
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    refuse_training(monkeypatch)
    assert train(path, tmp_path / "run", "--set", f"data.eval={{path: {tmp_path / 'odd.jsonl'}}}") == 2
    error = capsys.readouterr().err
    assert "Row 3 of the dataset has mood" in error


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupt(monkeypatch, step):
    inner = Trainer.train

    def train_until(self, *args, **kwargs):
        self.add_callback(Interrupt(step))
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train_until)


def test_an_interrupted_training_says_from_where_it_continues(recipe, whole, tmp_path, monkeypatch, capsys):
    kind, path = recipe
    for step, expected in ((1, "No checkpoint has been written yet"), (3, "--resume continues from")):
        with monkeypatch.context() as patched:
            interrupt(patched, step)
            assert train(path, tmp_path / "stopped") == 130
        noted = capsys.readouterr().err
        assert expected in noted and (step == 1 or "checkpoint-2" in noted)
    assert train(path, tmp_path / "stopped", "--resume") == 0
    expected, resumed = weights(whole), weights(tmp_path / "stopped")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_zeros(path):
    """Leave a file as long as it is, and its tensors without content."""
    if path.suffix == ".safetensors":
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
    else:
        path.write_bytes(bytes(path.stat().st_size))


def blank(path):
    """Fill the middle of a file with zeros, as a disk does that ran out of power."""
    content, third = path.read_bytes(), path.stat().st_size // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])


def weights_file(folder):
    return next(path for path in folder.glob("*model.safetensors"))


DAMAGES = {
    "weights cut": (lambda folder: cut(weights_file(folder)), "model.safetensors is damaged"),
    "weights zero": (
        lambda folder: fill_with_zeros(weights_file(folder)),
        "model.safetensors holds nothing but zeros",
    ),
    "optimizer zero": (lambda folder: fill_with_zeros(folder / "optimizer.pt"), "optimizer.pt is cut off"),
    "optimizer blank": (lambda folder: blank(folder / "optimizer.pt"), "optimizer.pt is damaged"),
    "experts zero": (lambda folder: fill_with_zeros(folder / EVOLUTION_FILE), "holds nothing but zeros"),
    "weights missing": (lambda folder: weights_file(folder).unlink(), "it has no weights"),
    "state missing": (lambda folder: (folder / "trainer_state.json").unlink(), "it has no trainer_state.json"),
    "state cut": (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is cut off"),
    "state empty": (lambda folder: (folder / "trainer_state.json").write_text(""), "trainer_state.json is cut off"),
    "state of another step": (
        lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 1}'),
        "is of step 1",
    ),
    "optimizer missing": (lambda folder: (folder / "optimizer.pt").unlink(), "it has no optimizer.pt"),
    "optimizer cut": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut off"),
    "scheduler missing": (lambda folder: (folder / "scheduler.pt").unlink(), "it has no scheduler.pt"),
    "random state missing": (lambda folder: (folder / "rng_state.pth").unlink(), "it has no rng_state"),
    "random state cut": (lambda folder: cut(folder / "rng_state.pth"), "rng_state.pth is cut off"),
    "config cut": (lambda folder: cut(next(folder.glob("*config.json"))), "config.json is cut off"),
    "nothing in it": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "it has no trainer_state.json"),
    "experts missing": (lambda folder: (folder / EVOLUTION_FILE).unlink(), f"it has no {EVOLUTION_FILE}"),
    "experts cut": (lambda folder: cut(folder / EVOLUTION_FILE), f"{EVOLUTION_FILE} is damaged"),
    "a shard missing": (
        lambda folder: (
            weights_file(folder).rename(folder / "x.safetensors")
            and (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
        ),
        "names gone.safetensors, which is missing",
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with two whole checkpoints of a dense model whose experts evolve."""
    folder = tmp_path_factory.mktemp("checkpoints")
    text = LlamaConfig(**{**TINY, "vocab_size": 20})
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config={"layers": []}))
    ids = torch.randint(3, 20, (8, 6))
    options = {"max_steps": 4, "save_steps": 2, "use_cpu": True, "report_to": "none"}
    Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[ExpertEvolution([1], beta_ranges=[0.5])],
    ).train()
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken_and_the_rest_named(checkpoints, damage, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(checkpoints, folder)
    needed = (EVOLUTION_FILE,)
    assert newest_whole_checkpoint(folder, needed) == folder / "checkpoint-4" and not caplog.text
    make, reason = DAMAGES[damage]
    make(folder / "checkpoint-4")
    assert newest_whole_checkpoint(folder, needed) == folder / "checkpoint-2"
    assert f"Passing over {folder / 'checkpoint-4'}, which is not whole: " in caplog.text and reason in caplog.text
    make(folder / "checkpoint-2")
    assert newest_whole_checkpoint(folder, needed) is None
    assert "starting from the beginning" in caplog.text


def test_a_run_killed_while_saving_resumes_from_the_one_before(recipe, whole, tmp_path, caplog):
    kind, path = recipe
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    (killed / "training.json").unlink()
    saved = killed
    if kind == "stages":
        saved = killed / "stages" / "2_moe"
        (saved / "stage.json").unlink()
    cut(weights_file(saved / "checkpoint-4"))
    assert train(path, killed, "--resume") == 0
    assert "checkpoint-4, which is not whole" in caplog.text
    expected, resumed = weights(whole), weights(killed)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
