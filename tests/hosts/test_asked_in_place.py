"""Hosts in place answer through their own processors where the package is not: chat template, model, pipeline."""

import json

import pytest
import torch
from helpers.hosts.ask_hosts import EXACT, inputs_of
from helpers.hosts.processors import HOSTS
from helpers.near import assert_near
from helpers.programs import last_line, start
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
    root = tmp_path_factory.mktemp("answers")
    file, folders = root / "answers.json", [folder for *_, folder in models.values()]
    last_line(start("hosts.ask_hosts", file, *folders, HF_MODULES_CACHE=str(root / "modules")))
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
