"""The processor's own class opens a checkpoint as itself: nobody is asked, and none of the checkpoint's code runs."""

import shutil

import pytest
from helpers.hub.checkpoints import TEXT
from helpers.hub.open_checkpoint import sample_image
from transformers import CONFIG_MAPPING, AutoTokenizer

from hf_moe import HfMoeProcessor


@pytest.fixture
def asked(monkeypatch):
    """The questions whether to trust a checkpoint, all answered with no; `hf_moe.register()` has not been called."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "hf_moe", raising=False)
    return questions


def test_a_checkpoint_opens_without_a_question(checkpoint, asked):
    for path in checkpoint.glob("*.py"):
        path.write_text("raise RuntimeError('code of the checkpoint')\n")
    processor = HfMoeProcessor.from_pretrained(checkpoint)
    assert type(processor) is HfMoeProcessor and asked == []
    inputs = processor(images=[sample_image()], text=[TEXT], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == processor.image_seq_length
    AutoTokenizer.from_pretrained(checkpoint)
    assert len(asked) == 1


def test_a_tokenizer_with_code_of_its_own_is_asked_about(checkpoint, asked):
    path = checkpoint / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"auto_map": {', '"auto_map": {"AutoTokenizer": [null, "mine.Mine"],'))
    path.write_text(path.read_text().replace('"TokenizersBackend"', '"Mine"'))
    with pytest.raises(ValueError, match="custom code"):
        HfMoeProcessor.from_pretrained(checkpoint)
    assert len(asked) == 1


def test_a_processor_opens_from_a_folder_of_its_own(checkpoint, tmp_path, asked):
    (tmp_path / "alone").mkdir()
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(checkpoint / name, tmp_path / "alone" / name)
    processor = HfMoeProcessor.from_pretrained(tmp_path / "alone")
    assert type(processor) is HfMoeProcessor and asked == []
