"""Hosts in place answer through their own processors where the package is not: chat template, model, pipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ask_hosts import EXACT, inputs_of
from host_processors import HOSTS
from near import assert_near
from transformers import AutoProcessor

from hf_moe import HfMoeForConditionalGeneration


ASKED = ["qwen2_5_vl", "gemma3", "qwen2_audio", "qwen2_5_omni"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Hosts in place with their processors, each saved to a folder of its name."""
    root, found = tmp_path_factory.mktemp("asked"), {}
    for name in ASKED:
        torch.manual_seed(0)
        host = HOSTS[name]()
        model = HfMoeForConditionalGeneration.from_host(host.model(), moe_config=MOE, noise=0.5).eval()
        model.save_pretrained(root / name)
        host.processor.save_pretrained(root / name)
        (root / name / "kinds.json").write_text(json.dumps(host.kinds))
        found[name] = (model, host, root / name)
    return found


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    """What a process without the package answers."""
    script = Path(__file__).with_name("ask_hosts.py")
    root = tmp_path_factory.mktemp("answers")
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    file, folders = root / "answers.json", [str(folder) for *_, folder in models.values()]
    command = [sys.executable, str(script), str(file), *folders]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", ASKED)
def test_the_processor_of_the_host_asks_the_model_anywhere(models, answers, name):
    model, host, folder = models[name]
    # As it is saved: Qwen2.5-Omni's forgets the size of videos.
    found, inputs = answers[name], inputs_of(AutoProcessor.from_pretrained(folder), host.kinds)
    assert found["processor"] == type(host.processor).__name__
    assert found["module"].startswith("transformers_modules.")
    with torch.no_grad():
        output = model(**inputs, output_routing=True)
    numbers = {("image", "video", "audio").index(kind) + 1 for kind in host.kinds}
    assert set(output.routing.modality_ids.unique().tolist()) == {0, *numbers}
    assert_near(torch.tensor(found["logits"]), output.logits[0, -1])
    assert found["ids"] == model.generate(**inputs, **EXACT).tolist()


def test_the_pipeline_answers_as_the_model_does(models, answers):
    model, host, _ = models["qwen2_5_vl"]
    inputs = inputs_of(host.processor, ("image",))
    ids = model.generate(**inputs, **EXACT)[:, inputs["input_ids"].shape[1] :]
    assert answers["qwen2_5_vl"]["told"] == host.processor.batch_decode(ids, skip_special_tokens=True)[0]
