"""A run that is killed and resumed has the losses of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_trainer import collate, make_model, make_rows
from transformers import TrainerCallback, TrainingArguments

from hf_moe.training.trainer import HfMoeTrainer


TESTS = Path(__file__).parent
JOB = """
import sys
sys.path.insert(0, {tests!r})
from test_resume import train
train({folder!r}, stall=True)
"""


class Stall(TrainerCallback):
    """Wait after a step to be killed."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            (self.folder / "ready").touch()
            time.sleep(60)


def train(folder, stall: bool = False, resume: bool = False) -> None:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", seed=0,
    )  # fmt: skip
    trainer = HfMoeTrainer(
        model=make_model(),
        args=args,
        train_dataset=make_rows(16),
        data_collator=collate,
        callbacks=[Stall(folder)] if stall else [],
    )
    trainer.train(resume_from_checkpoint=resume)


def losses(folder: Path) -> dict[int, float]:
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    job = JOB.format(tests=str(TESTS), folder=str(killed))
    victim = subprocess.Popen([sys.executable, "-c", job], stdout=subprocess.DEVNULL)
    train(whole)
    deadline = time.monotonic() + 120
    while not (killed / "ready").exists():
        assert time.monotonic() < deadline and victim.poll() is None
        time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    train(killed, resume=True)
    assert (killed / "checkpoint-3").is_dir()
    assert losses(killed) == losses(whole)
