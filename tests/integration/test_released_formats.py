"""Checkpoints of every released config format, kept as they were written, open in this version."""

import json

import pytest
import torch
from helpers.release_checkpoint import RELEASED, inputs

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.configuration.configuration_hf_moe import CONFIG_FORMAT


def test_a_checkpoint_of_every_format_is_kept():
    assert {path.name for path in RELEASED.iterdir()} == {str(number) for number in range(1, CONFIG_FORMAT + 1)}


@pytest.mark.parametrize("folder", sorted(RELEASED.iterdir()), ids=lambda folder: f"format_{folder.name}")
def test_it_answers_as_it_did(folder):
    model, report = HfMoeForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        logits = model.eval()(**inputs()).logits[0, -1]
    torch.testing.assert_close(
        logits, torch.tensor(json.loads((folder / "logits.json").read_text())), atol=1e-5, rtol=0
    )


def test_a_setting_that_a_reader_loses_changes_the_answer(tmp_path):
    """Without this the fixture could not tell a misread option from a read one."""
    folder = RELEASED / str(CONFIG_FORMAT)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["moe_config"]["num_experts_per_tok"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = HfMoeForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = model(**inputs()).logits[0, -1]
    assert (logits - torch.tensor(json.loads((folder / "logits.json").read_text()))).abs().max() > 1e-4
