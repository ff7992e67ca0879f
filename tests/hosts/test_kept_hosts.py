"""What one release of Transformers saved, another opens: the lowest and the newest run this file."""

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.hosts.keep_hosts import KEPT, RELEASED, kept_answer
from helpers.near import assert_near

from hf_moe import HfMoeForConditionalGeneration


FOLDERS = sorted(folder for release in RELEASED.iterdir() for folder in release.iterdir())


def test_hosts_of_two_releases_are_kept():
    releases = {folder.parent.name for folder in FOLDERS}
    assert {"transformers_5.23.0", "transformers_5.24.0"} <= releases
    assert {folder.name for folder in FOLDERS} == set(KEPT)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_kept_host_answers_as_it_did(folder):
    model, report = HfMoeForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    inputs, expected = kept_answer(folder)
    assert inputs.keys() == HOSTS[folder.name].inputs().keys()
    with torch.no_grad():
        assert_near(model.eval()(**inputs).logits[:, -1], expected, 3e-6)
