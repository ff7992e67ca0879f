"""All tiny hosts by name, and the selections of them that tests run over."""

import audio_hosts
import llava_hosts
import pytest
import qwen_hosts
import text_hosts
import vision_hosts


MULTIMODAL = {**qwen_hosts.HOSTS, **llava_hosts.HOSTS, **vision_hosts.HOSTS, **audio_hosts.HOSTS}
HOSTS = {**MULTIMODAL, **text_hosts.HOSTS}
DENSE = [name for name, host in HOSTS.items() if not host.adopted]
ADOPTED = [name for name, host in HOSTS.items() if host.adopted]
# One of every way in which a host differs from others: what CI runs where all of them would take too long.
FEW = ["qwen2_5_vl", "qwen2_5_omni_thinker", "gemma3", "smolvlm", "llava_onevision", "qwen2_audio", "qwen3_vl_moe"]


def some_fast(names, fast=FEW):
    """Parameters of a test over hosts of which CI runs a few; the rest is slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
