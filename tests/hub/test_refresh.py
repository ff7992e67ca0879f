"""A refresh writes the code of a checkpoint anew, or leaves everything as it was and says why."""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.hub.checkpoints import tiny_config, tiny_model, tiny_processor
from transformers import LlamaConfig

from hf_moe.cli import main
from hf_moe.hub import refresh
from hf_moe.hub.inspection import inspect_checkpoint
from hf_moe.hub.probe import ProbeAnswer
from hf_moe.hub.push import PushError, push_checkpoint
from hf_moe.hub.refresh import refresh_checkpoint
from hf_moe.modeling import registry


OLD = Path(__file__).parents[1] / "integration" / "released_code" / "hf_moe_before_digests_transformers_5.23.0"
USER_ROUTER = """
import torch
from hf_moe import ExpertAssignment, Router, register_router
from first_experts import first


@register_router("own_router")
class OwnRouter(Router):
    def forward(self, hidden_states, context):
        index = first(self.spec.num_experts_per_tok).expand(len(hidden_states), -1)
        return ExpertAssignment(index, torch.full(index.shape, 0.5), self.spec.num_experts)
"""


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_old(folder):
    """Give the code of a checkpoint the look of an older version: no digest, and a file that is needed no longer."""
    for path in folder.glob("*.py"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[0], *lines[2 if lines[1].startswith("# SHA-256") else 1 :]]))
    shutil.copy(folder / "routing.py", folder / "forgotten.py")


@pytest.fixture
def same_answers(monkeypatch):
    """Spares the processes: every checkpoint answers the same."""
    asked = []

    def ask(folder, inputs, scratch, installed=False):
        asked.append((Path(folder), installed))
        return ProbeAnswer(logits=torch.ones(1, 2, 3))

    monkeypatch.setattr(refresh, "ask", ask)
    return asked


def test_a_checkpoint_of_older_code_is_refreshed(tmp_path, capsys):
    folder = shutil.copytree(OLD, tmp_path / "old")
    before = contents(folder)
    assert inspect_checkpoint(folder)["refresh"]
    assert main(["refresh", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "Largest difference of the logits from those of the " in output
    assert float(output.rpartition(":")[2]) < 1e-6
    after = contents(folder)
    assert {path for path in before if path.suffix != ".py" and before[path] != after[path]} == {Path("config.json")}
    found = inspect_checkpoint(folder)
    assert found["refresh"] == [] and found["problems"] == []
    assert found["written_by"]["hf_moe"] is not None
    assert os.listdir(tmp_path) == ["old"]
    assert main(["refresh", str(folder)]) == 0
    assert "has the code of hf-moe" in capsys.readouterr().out
    assert contents(folder) == after


def test_a_users_router_that_travels_alone_is_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_router.py").write_text(USER_ROUTER)
    (tmp_path / "first_experts.py").write_text("import torch\n\n\ndef first(slots):\n    return torch.arange(slots)\n")
    importlib.import_module("own_router")
    folder = tmp_path / "own"
    tiny_model(tiny_config(router="own_router")).save_pretrained(folder)
    del registry._REGISTERED["router"]["own_router"]
    make_old(folder)
    users = {name: (folder / name).read_text() for name in ("own_router.py", "first_experts.py")}
    result = refresh_checkpoint(folder)
    assert result.kept == ["first_experts.py", "own_router.py"] and result.removed == ["forgotten.py"]
    assert (result.compared_with, result.difference) == ("old code", 0.0)
    for name, text in users.items():
        assert (folder / name).read_text().split("\n", 2)[2] == text.split("\n", 1)[1]
    assert inspect_checkpoint(folder)["refresh"] == []
    (folder / "first_experts.py").unlink()
    with pytest.raises(ValueError, match=r"first_experts.py, which the checkpoint's mechanisms need, is missing"):
        refresh_checkpoint(folder)


@pytest.mark.parametrize("what", ["logits", "no number", "no answer", "a tensor unread", "the last rename"])
def test_a_refresh_that_fails_leaves_the_checkpoint_whole(checkpoint, monkeypatch, what):
    make_old(checkpoint)
    before, names = contents(checkpoint), sorted(os.listdir(checkpoint.parent))

    def ask(folder, inputs, scratch, installed=False):
        new = Path(folder) != checkpoint.resolve()
        if new and what == "no answer":
            return ProbeAnswer(error="TypeError: new")
        value = {"logits": 1.1, "no number": float("nan")}.get(what, 1.0) if new else 1.0
        wrong = {"missing_keys": ["lm_head.weight"]} if new and what == "a tensor unread" else {}
        return ProbeAnswer(logits=torch.full((1, 2, 3), value), wrong=wrong)

    monkeypatch.setattr(refresh, "ask", ask)
    if what == "the last rename":
        rename = os.replace

        def replace(source, target):
            if Path(target) == checkpoint.resolve() and "forgotten.py" not in os.listdir(source):
                raise OSError("disk full")
            rename(source, target)

        monkeypatch.setattr(os, "replace", replace)
    with pytest.raises((ValueError, OSError), match="stays as it was|disk full"):
        refresh_checkpoint(checkpoint)
    assert contents(checkpoint) == before
    assert sorted(os.listdir(checkpoint.parent)) == names


def test_old_code_that_is_dead_is_said(checkpoint, monkeypatch, capsys):
    make_old(checkpoint)

    def ask(folder, inputs, scratch, installed=False):
        dead = Path(folder) == checkpoint.resolve() and not installed
        return ProbeAnswer(error="TypeError: dead") if dead else ProbeAnswer(logits=torch.ones(1, 2, 3))

    monkeypatch.setattr(refresh, "ask", ask)
    assert main(["refresh", str(checkpoint)]) == 0
    output = capsys.readouterr().out
    assert "The old code does not run under Transformers" in output and "TypeError: dead" in output
    assert "from those of the installed classes, on text and image: 0.0e+00" in output


def test_a_mechanism_that_is_nowhere_is_named(checkpoint):
    (checkpoint / "router_moiie.py").unlink()
    text = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(text.replace('"moiie"', '"lost_router"'))
    before = contents(checkpoint)
    with pytest.raises(ValueError, match="needs the router 'lost_router', which neither hf-moe"):
        refresh_checkpoint(checkpoint)
    assert contents(checkpoint) == before


def test_what_is_no_model_of_ours_is_refused_by_name(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "llama": "model_type 'llama'",
        "adapter": "is an adapter .*: it holds no code",
        "empty": "holds no config.json",
        "absent": "There is no folder",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            refresh_checkpoint(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "empty", "llama"]


def test_a_repository_is_refreshed_in_one_commit_of_its_code(checkpoint, hub, same_answers):
    make_old(checkpoint)
    first = push_checkpoint(checkpoint, "owner/tiny")
    shown = refresh_checkpoint("owner/tiny")
    assert shown.commit is None and hub.files("owner/tiny") == hub.files("owner/tiny", first.commit)

    result = refresh_checkpoint("owner/tiny", push=True)
    old, new = hub.files("owner/tiny", "v1"), hub.files("owner/tiny", "v2")
    assert result.commit == hub.repositories["owner/tiny"].refs["refs/heads/main"]
    assert {name for name in old if old[name] != new.get(name)} == set(result.changed) & set(old) | {"forgotten.py"}
    assert "model.safetensors" not in result.changed and b"# SHA-256 of the model's code" in new["base.py"]

    assert inspect_checkpoint("owner/tiny")["refresh"] == []
    assert refresh_checkpoint("owner/tiny", push=True).changed == []


def test_push_is_for_repositories(checkpoint, hub):
    with pytest.raises(ValueError, match="run `hf-moe push .* user/name` after the refresh"):
        refresh_checkpoint(checkpoint, push=True)
    with pytest.raises(PushError, match="owner/absent .* Nothing has been changed"):
        refresh_checkpoint("owner/absent", push=True)


def test_inspect_tells_when_a_refresh_is_due(checkpoint, capsys):
    assert inspect_checkpoint(checkpoint)["refresh"] == []
    tiny_processor().save_pretrained(checkpoint)
    assert inspect_checkpoint(checkpoint)["refresh"] == []
    text = (checkpoint / "gating.py").read_text()
    (checkpoint / "gating.py").write_text(text + "from transformers import no_such_name\n")
    reasons = "\n".join(inspect_checkpoint(checkpoint)["refresh"])
    assert "1 of " in reasons and "gating.py imports no_such_name of transformers" in reasons
    assert "one was changed after the save" in reasons
    (checkpoint / "gating.py").write_text(text)
    make_old(checkpoint)
    assert "without the digest" in "\n".join(inspect_checkpoint(checkpoint)["refresh"])
    config = json.loads((checkpoint / "config.json").read_text())
    assert main(["inspect", str(checkpoint)]) == 0
    output = capsys.readouterr().out
    assert f"Written by hf-moe {config['hf_moe_version']} with Transformers {config['transformers_version']}" in output
    assert f"with `hf-moe refresh {checkpoint}`:" in output
