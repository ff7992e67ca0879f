"""The double of the Hub, and a small complete checkpoint to push to it."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.hub.checkpoints import tiny_config, tiny_model, tiny_processor
from helpers.hub.open_checkpoint import sample_image
from helpers.hub.pages import free_port
from helpers.hub.server import running_hub

from hf_moe.cli import main


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without the last ones it keeps looking for its maker's servers.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# tiny

checkpoint = "{folder}"  # this folder, or the id of its repository
ask = pipeline("image-text-to-text", model="{folder}", trust_remote_code=True)
"""


@pytest.fixture
def hub(tmp_path):
    with running_hub(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def saved_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_model(tiny_config(router="moiie", objectives={"load_balance": 0.01})).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(folder="tiny"))
    return folder


@pytest.fixture
def checkpoint(saved_checkpoint, tmp_path):
    """A complete checkpoint that the test may change."""
    return shutil.copytree(saved_checkpoint, tmp_path / "tiny")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    sample_image().save(path)
    return path


@pytest.fixture(params=["nothing", "truncated"])
def broken_picture(request, tmp_path, picture):
    content = {"nothing": b"no picture", "truncated": picture.read_bytes()[:60]}[request.param]
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        message = "no Chromium on the PATH: apt-get install chromium"
        # The tests over HTTP hold the same promises; where CI lacks the browser, that is a defect of CI.
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def demo(monkeypatch):
    """Start `hf-moe demo` in this process and return its client."""
    import gradio
    from gradio_client import Client

    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: None)

    def start(folder: Path) -> Any:
        port = free_port()
        assert main(["demo", str(folder), "--port", str(port)]) == 0
        return Client(f"http://127.0.0.1:{port}", verbose=False)

    yield start
    gradio.close_all()
