"""A run that is killed and resumed has the losses of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


JOB = """
import sys, time
sys.path.insert(0, {tests!r})
from test_trainer import collate, make_model, make_rows
from transformers import TrainerCallback, TrainingArguments
from hf_moe.training.trainer import HfMoeTrainer

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4 and {stall}:
            open({folder!r} + "/ready", "w").close()
            time.sleep(60)

args = TrainingArguments(
    output_dir={folder!r}, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
    save_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", seed=0,
)
trainer = HfMoeTrainer(
    model=make_model(), args=args, train_dataset=make_rows(16), data_collator=collate, callbacks=[Slow()]
)
trainer.train(resume_from_checkpoint={resume})
"""


def start(folder: Path, stall: bool = False, resume: bool = False) -> subprocess.Popen:
    job = JOB.format(tests=str(Path(__file__).parent), folder=str(folder), stall=stall, resume=resume)
    return subprocess.Popen([sys.executable, "-c", job], stdout=subprocess.DEVNULL)


def losses(folder: Path) -> dict[int, float]:
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    uninterrupted = start(whole)
    victim = start(killed, stall=True)
    deadline = time.monotonic() + 120
    while not (killed / "ready").exists():
        assert time.monotonic() < deadline and victim.poll() is None
        time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert start(killed, resume=True).wait() == 0
    assert uninterrupted.wait() == 0
    assert (killed / "checkpoint-3").is_dir()
    assert losses(killed) == losses(whole)
