"""The end of a run: weights first, then whatever fails; a resumed run does what is left and trains nothing again."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
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


@pytest.fixture(params=["model", "stages", "adapter"])
def recipe(request, rows, base, tmp_path):
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
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return request.param, path


def weights(folder):
    files = [folder / "checkpoint" / name for name in ("model.safetensors", "adapter_model.safetensors")]
    return load_file(next(file for file in files if file.is_file()))


def train(path, folder, *flags):
    return main(["train", str(path), "--output-dir", str(folder), *flags])


def break_after_training(monkeypatch, module, name, failure):
    """Let a function fail once a training has begun, and not in the rehearsal before."""
    begun, original, inner = [], getattr(module, name), Trainer.train

    def note_and_train(self, *args, **kwargs):
        begun.append(True)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", note_and_train)

    def break_(*args, **kwargs):
        if not begun:
            return original(*args, **kwargs)
        if name == "moved_parameters":
            return [], ["lm_head.weight"]
        raise failure

    monkeypatch.setattr(module, name, break_)


@pytest.mark.parametrize(
    ("stage", "failure"),
    [*((stage, ValueError("broken")) for stage in STAGES), ("evaluation", KeyboardInterrupt())],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_failed_end_leaves_weights_and_resumes_without_training(
    recipe, stage, failure, tmp_path, monkeypatch, capsys
):
    kind, path = recipe
    place = STAGES[stage].get("adapter" if kind == "adapter" else "model")
    if place is None or (stage, kind) == ("strayed parameters", "stages"):
        pytest.skip("this kind of recipe has no such stage")
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        break_after_training(patched, *place, failure)
        if stage == "strayed parameters":
            with pytest.raises(RuntimeError, match="frozen parameters moved") as raised:
                train(path, folder)
            noted = " ".join(raised.value.__notes__)
        else:
            assert train(path, folder) == (2 if isinstance(failure, ValueError) else 130)
            noted = capsys.readouterr().err
    assert str(folder / "checkpoint") in noted and "--resume" in noted
    saved = weights(folder)
    assert saved and not (folder / "checkpoint.partial").exists() and not list(folder.glob(".rehearsal-*"))
    if stage == "strayed parameters":
        return

    def no_training(*args, **kwargs):
        raise AssertionError("it trained again")

    monkeypatch.setattr(Trainer, "train", no_training)
    assert train(path, folder, "--resume") == 0
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights(folder).items())
    report = json.loads((folder / "report.json").read_text())
    assert report["evaluated"] == 4 and len(report["log_history"]) > 0 and report["trainable_parameters"]
    assert (folder / "checkpoint" / "README.md").is_file()


@pytest.mark.parametrize("answer", [7, 0, True, False, 1.5, "007"])
def test_answers_of_every_type_are_trained_and_scored(recipe, answer, tmp_path, rows):
    kind, path = recipe
    if kind == "stages":
        pytest.skip("its data are read as those of one stage are")
    turns = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": answer}]
    lines = [{"messages": turns, "answer": answer}, {"messages": turns, "answers": [answer, "cat"]}]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = f"{{path: {tmp_path / 'odd.jsonl'}}}"
    flags = ["--set", f"data.eval={source}", "--set", "training.max_steps=1"]
    assert train(path, tmp_path / "run", *flags) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["evaluated"] == 2


def test_an_answer_that_cannot_be_scored_is_found_before_training(recipe, tmp_path, rows, monkeypatch, capsys):
    kind, path = recipe
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[3]["answer"] = {"text": "fish"}
    for line in lines[:3]:
        line["answer"] = {"text": None}
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    assert train(path, tmp_path / "run", "--set", f"data.eval={{path: {tmp_path / 'odd.jsonl'}}}") == 2
    assert "answer" in capsys.readouterr().err


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


def test_an_interrupted_training_says_from_where_it_continues(recipe, tmp_path, monkeypatch, capsys):
    kind, path = recipe
    assert train(path, tmp_path / "whole") == 0
    capsys.readouterr()
    for step, expected in ((1, "No checkpoint has been written yet"), (3, "--resume continues from")):
        with monkeypatch.context() as patched:
            interrupt(patched, step)
            assert train(path, tmp_path / "stopped") == 130
        noted = capsys.readouterr().err
        assert expected in noted and (step == 1 or "checkpoint-2" in noted)
    assert train(path, tmp_path / "stopped", "--resume") == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def weights_file(folder):
    return next(path for path in folder.glob("*model.safetensors"))


DAMAGES = {
    "weights cut": (lambda folder: cut(weights_file(folder)), "model.safetensors is damaged"),
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


def test_a_run_killed_while_saving_resumes_from_the_one_before(recipe, tmp_path, monkeypatch, caplog):
    kind, path = recipe
    assert train(path, tmp_path / "whole") == 0
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    (killed / "training.json").unlink()
    saved = killed
    if kind == "stages":
        saved = killed / "stages" / "2_moe"
        (saved / "stage.json").unlink()
    cut(weights_file(saved / "checkpoint-4"))
    assert train(path, killed, "--resume") == 0
    assert "checkpoint-4, which is not whole" in caplog.text
    expected, resumed = weights(tmp_path / "whole"), weights(killed)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
