"""The double of the Hub, and a small complete checkpoint to push to it."""

import shutil
from contextlib import contextmanager

import pytest
from hub_checkpoints import tiny_config, tiny_model, tiny_processor
from hub_server import OWNER_TOKEN, HubServer
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub


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


@contextmanager
def running_hub(folder):
    """The double; the client of this process talks to it as its owner."""
    with HubServer(folder / "hub") as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        # Transformers keeps the client that it made first, with that one's address.
        patch.setattr(transformers_hub, "_hf_api", None)
        patch.setenv("HF_TOKEN", OWNER_TOKEN)
        yield server


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
