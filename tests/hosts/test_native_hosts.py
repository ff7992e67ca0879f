"""The tiny hosts themselves: their rows reach every part of the native model, so that a comparison can fail."""

import pytest
import torch
import transformers
from helpers.hosts.catalogue import ALL, HOSTS, MULTIMODAL
from helpers.hosts.native import MODALITY_OF


def logits_of(host, inputs):
    with torch.no_grad():
        return host.build()(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", [name for name in MULTIMODAL if name in ALL])
def test_every_medium_shows_in_the_native_logits(name):
    host = HOSTS[name]
    inputs = host.inputs()
    expected = logits_of(host, inputs)
    # Seconds per frame reach Qwen2.5-VL's positions alone, and no other frame of so short a video.
    media = [key for key, value in inputs.items() if value.is_floating_point() and "second" not in key]
    for medium in media:
        changed = {**inputs, medium: inputs[medium].flip(0).flip(-1) + 0.5}
        assert (logits_of(host, changed) - expected).abs().max() > 1e-2, medium


def test_rows_hold_every_modality():
    seen = {name: set(HOSTS[name].modality_ids().unique().tolist()) - {0} for name in MULTIMODAL}
    # Idefics sees through cross-attention alone.
    assert [name for name, modalities in seen.items() if not modalities] == ["idefics"]
    assert set().union(*seen.values()) == set(MODALITY_OF.values())
    assert seen["qwen2_5_omni_thinker"] == {1, 2, 3}


@pytest.mark.parametrize("name", [name for name in HOSTS if HOSTS[name].broken is not None])
def test_a_host_that_is_said_to_be_broken_is(name):
    if not HOSTS[name].is_broken:
        pytest.skip(f"not broken in Transformers {transformers.__version__}")
    with pytest.raises(AttributeError):
        HOSTS[name].build()(**HOSTS[name].inputs())
