"""The page on sharing does what it says: its commands and programs run, in order, against the double of the Hub."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from hf_moe.cli import main


PAGE = (
    (Path(__file__).resolve().parents[2] / "docs" / "share.md").read_text(encoding="utf-8").replace("you/", "owner/")
)


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def run_folder(saved_checkpoint, tmp_path, monkeypatch):
    """The current folder; `hf-moe train` leaves the tiny checkpoint where a run would, `hf-moe demo` opens no page."""
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "runs" / "easyvqa_demo" / "checkpoint"
    monkeypatch.setattr("hf_moe.training.run.run", lambda args: shutil.copytree(saved_checkpoint, target) and 0)
    monkeypatch.setattr("hf_moe.hub.demo.run", lambda args: 0)
    return target


def test_the_page_shares_a_model_and_its_programs_run(hub, run_folder, capsys):
    train, look, *pushes = blocks("bash")
    assert main(shlex.split(train)[1:]) == 0
    # The general card of the fixture goes, that of the page comes.
    Path("card.py").write_text(blocks("python file=card.py")[0])
    runpy.run_path("card.py")
    for line in look.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    assert not hub.repositories
    for line in "".join(pushes).splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    Path("share.py").write_text(blocks("python file=share.py")[0])
    runpy.run_path("share.py")

    repository = hub.repositories["owner/easyvqa-moe"]
    assert set(repository.refs) == {"refs/heads/main", "refs/heads/next", "refs/tags/v1"}
    assert hub.repositories["owner/easyvqa-moe-draft"].private
    assert hub.repositories["owner/easyvqa-moe-asked"].gated
    assert "app.py" in hub.files("spaces/owner/easyvqa-moe")
    assert {"evaluation.json", ".eval_results/owner_questions.yaml"} <= set(hub.files("owner/easyvqa-moe"))
    assert f"commit {repository.refs['refs/heads/main']}, tag v1" in capsys.readouterr().out


def test_the_loading_code_of_the_page_is_the_one_that_a_push_prints(hub, run_folder, saved_checkpoint, capsys):
    assert main(["push", str(saved_checkpoint), "owner/easyvqa-moe"]) == 0
    printed = capsys.readouterr().out
    (shown,) = blocks("python")
    for line in shown.splitlines():
        assert line.startswith("checkpoint, commit =") or line in printed
