"""Checkpoints kept with the code that saved them open and generate, without the package, under the release at hand.

CI runs this file with the lowest release of Transformers and with the newest: each opens what the other saved.
"""

import shutil

import pytest
from helpers.hub.checkpoints import TEXT, open_without_package
from helpers.release_checkpoint import RELEASED_CODE
from packaging.version import Version


# The releases of Transformers differ in the order of a few sums.
TOLERANCE = 1e-5
# The code of this one names fields that Transformers 5.24 has renamed; `hf-moe refresh` is for it.
DEAD = "hf_moe_before_digests_transformers_5.23.0"
KEPT = sorted(path.name for path in RELEASED_CODE.iterdir() if path.name != DEAD)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("released")
    folders = [shutil.copytree(RELEASED_CODE / name, root / name) for name in KEPT]
    return open_without_package(folders, root / "modules")


def test_a_checkpoint_of_each_release_is_kept():
    releases = {Version(name.rpartition("_")[2]) for name in KEPT}
    assert {Version("5.23.0"), Version("5.24.0")} <= releases


@pytest.mark.parametrize("name", KEPT)
def test_it_answers_as_when_it_was_saved(found, name):
    assert "error" not in found[name], found[name]
    assert max(found[name]["difference"], found[name]["AutoModel"], found[name]["AutoModelForCausalLM"]) < TOLERANCE
    assert found[name]["ids_equal"] and found[name]["inputs_equal"]


@pytest.mark.parametrize("name", KEPT)
def test_what_it_saves_again_answers_so_too(found, name):
    again = found[name]["again"]
    assert again["difference"] < TOLERANCE and again["ids_equal"] and again["inputs_equal"]
    assert found[name]["pipeline"].startswith(TEXT)
