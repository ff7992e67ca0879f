"""Every multimodal type of Transformers is supported, adopted, or refused with a reason and a remedy."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import transformers
from helpers.hosts.catalogue import HOSTS
from transformers import CONFIG_MAPPING

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.construction.refused_hosts import REFUSED


ROOT = Path(__file__).resolve().parents[2]


def load(path):
    """Import a file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table():
    return load(ROOT / "tools" / "host_table.py")


@pytest.fixture(scope="module")
def rows(table):
    return {model_type: table.survey(model_type) for model_type in table.model_types()}


@pytest.fixture(scope="module")
def written(table):
    """The types in docs/hosts.md, and the release of Transformers that it was written from."""
    text = table.PAGE.read_text(encoding="utf-8")
    release = re.search(r"types of Transformers (\S+) that", text)
    return set(re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE)), release[1]


def test_every_type_is_supported_adopted_or_refused(rows):
    unknown = {row.model_type: row.note for row in rows.values() if row.status == "unknown"}
    assert not unknown, f"list these in refused_hosts.py, or make them hosts: {unknown}"
    counts = {status: sum(row.status == status for row in rows.values()) for status in ("supported", "adopted")}
    assert counts["supported"] >= 60 and counts["adopted"] >= 10


def test_a_type_of_a_later_release_is_named(rows, written):
    known, release = written
    new = sorted(set(rows) - known)
    assert not new, f"Transformers {transformers.__version__} has what {release} had not: {new}; run `make docs`"


def test_a_refusal_has_a_reason_and_a_remedy_that_works(rows):
    for model_type, refusal in REFUSED.items():
        message = refusal.message(model_type)
        assert message.startswith(f"{model_type} cannot become a MoE: ") and len(refusal.reason) > 20
        named = set(re.findall(r"[a-z0-9_]+", refusal.instead)) & (set(rows) | set(HOSTS))
        working = {name for name in named if name in HOSTS or rows[name].status != "refused"}
        assert working or "Thinker" in refusal.instead, message
        assert named == working, f"{model_type} sends its user to a refused type"


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_asking_for_a_refused_type_tells_why(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {model_type}")
    with pytest.raises(ValueError) as error:
        HfMoeForConditionalGeneration.from_host({"model_type": model_type})
    assert str(error.value) == REFUSED[model_type].message(model_type)


# What the code alone would let through: the reason is not in the shape of the decoder.
SEMANTIC = {"evolla", "phi4_multimodal", "t5gemma2"}


def test_no_type_is_refused_that_would_work(table, rows, written, monkeypatch):
    refused = [row.model_type for row in rows.values() if row.status == "refused"]
    assert set(refused) == set(REFUSED) & set(rows)
    for model_type in refused:
        monkeypatch.delitem(table.REFUSED, model_type)
    read = {model_type for model_type in refused if table.survey(model_type).status != "unknown"}
    assert read <= SEMANTIC
    if written[1] == transformers.__version__:
        assert read == SEMANTIC


def test_tiny_hosts_are_what_the_survey_says(rows):
    for name, host in HOSTS.items():
        row = rows.get(host.config["model_type"])
        if row is not None:  # text decoders are none of them
            assert row.status == ("adopted" if host.adopted else "supported"), name


def test_every_adopted_block_is_compared_in_small(rows):
    """`tests/construction` fills a layer from a small block of each class, and compares the two."""
    text = (ROOT / "tests" / "helpers" / "hosts" / "blocks.py").read_text(encoding="utf-8")
    compared = set(re.findall(r'"([A-Z]\w+(?:MoE|Moe|MoeBlock|MoELayer|Block|MLP))"', text.split("REFUSED")[0]))
    blocks = {block: row.model_type for row in rows.values() if row.status == "adopted" for block in row.blocks}
    moe = {block: kind for block, kind in blocks.items() if "moe" in block.lower() and not block.endswith("MLP")}
    assert {block: kind for block, kind in moe.items() if block not in compared} == {}


def test_the_page_is_up_to_date(table, rows, written):
    if written[1] != transformers.__version__:
        pytest.skip(f"docs/hosts.md is written from Transformers {written[1]}")
    assert table.page(list(rows.values())) == table.PAGE.read_text(encoding="utf-8"), "run `make docs`"
