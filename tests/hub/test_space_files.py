"""The folder of a Space holds what the page needs and no more, and is pushed as it is."""

import ast
import shutil

import gradio
import pytest
from helpers.hub.hosted import save_hosted
from helpers.hub.pages import REPO
from huggingface_hub import ModelCard, constants
from packaging.version import Version

from hf_moe.cli import main
from hf_moe.hub.push import PushError, push_checkpoint
from hf_moe.hub.space import BESIDE, GRADIO_VERSION, push_space, write_space


WRITTEN = {"README.md", "app.py", "requirements.txt", *BESIDE}


def test_a_space_holds_the_application_what_it_needs_and_its_metadata(saved_checkpoint, tmp_path):
    output = write_space(saved_checkpoint, REPO, tmp_path / "space", revision="v1")
    assert {path.name for path in output.iterdir()} == WRITTEN
    metadata = ModelCard.load(output / "README.md").data.to_dict()
    expected = {"sdk": "gradio", "app_file": "app.py", "models": [REPO], "license": "apache-2.0"}
    assert expected.items() <= metadata.items()
    assert (output / "requirements.txt").read_text().splitlines() == ["torch", "transformers>=5.23.0", "pillow"]
    constants = {
        node.targets[0].id: node.value.value
        for node in ast.parse((output / "app.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert (constants["CHECKPOINT"], constants["REVISION"]) == (REPO, "v1")


def test_a_space_asks_for_the_gradio_that_the_tests_ran():
    installed, asked = Version(gradio.__version__), Version(GRADIO_VERSION)
    assert installed.major == asked.major and installed >= asked


def test_pictures_in_the_folder_examples_come_along(checkpoint, picture):
    (checkpoint / "examples").mkdir()
    shutil.copy(picture, checkpoint / "examples")
    (checkpoint / "examples" / "notes.txt").write_text("no picture")
    output = write_space(checkpoint, REPO)
    assert output == checkpoint.with_name("tiny-space")
    assert [path.name for path in (output / "examples").iterdir()] == ["picture.png"]


def test_of_the_examples_a_host_gets_those_that_it_takes(tmp_path):
    folder = tmp_path / "hearing"
    save_hosted("qwen2_audio", folder)
    (folder / "examples").mkdir()
    for name in ("voice.wav", "seen.png", "film.mp4"):
        (folder / "examples" / name).write_bytes(b"content")
    output = write_space(folder, REPO)
    assert [path.name for path in (output / "examples").iterdir()] == ["voice.wav"]
    assert (output / "requirements.txt").read_text().splitlines()[2:] == ["torchcodec"]
    assert "every part of the sound and every word" in (output / "README.md").read_text()


def test_a_space_is_pushed_in_one_commit_and_again_without_what_is_gone(hub, checkpoint, picture):
    push_checkpoint(checkpoint, REPO)
    (checkpoint / "examples").mkdir()
    shutil.copy(picture, checkpoint / "examples")
    output = write_space(checkpoint, REPO)
    (output / "notes.txt").write_text("of mine")
    assert push_space(output, REPO, private=True) == f"{constants.ENDPOINT}/spaces/{REPO}"
    stored = hub.files(f"spaces/{REPO}")
    assert set(stored) == WRITTEN | {"examples/picture.png"}
    assert hub.repositories[f"spaces/{REPO}"].private and not hub.repositories[REPO].private
    shutil.rmtree(output / "examples")
    push_space(output, REPO)
    assert set(hub.files(f"spaces/{REPO}")) == WRITTEN
    assert len(hub.repositories[f"spaces/{REPO}"].commits) == 3


def test_a_space_without_its_model_is_not_pushed(hub, checkpoint):
    with pytest.raises(PushError, match="no model owner/tiny that you can see: push it first"):
        push_space(write_space(checkpoint, REPO), REPO)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["space", "missing", REPO], "missing holds no config.json"),
        (["space", "tiny", "tiny"], "has no owner"),
        (["space", "tiny", REPO, "--private"], "needs --push"),
        (["demo", "missing"], "missing holds no config.json"),
    ],
)
def test_what_cannot_be_done_is_one_line(checkpoint, monkeypatch, capsys, arguments, hint):
    monkeypatch.chdir(checkpoint.parent)
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err.strip().splitlines()[-1]
