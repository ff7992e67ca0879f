"""`hf-moe build --model`: the checkpoint of a host in place, with the host's processor and generation settings."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.near import assert_near
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, T5Config

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.cli import main
from hf_moe.construction import pretrained


CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a circle ?"}]}]


def inputs_of(processor):
    text = processor.apply_chat_template(CHAT)
    image = Image.linear_gradient("L").resize((20, 12)).convert("RGB")
    return processor(text=text, images=image, return_tensors="pt")


@pytest.fixture(scope="module")
def built(llava_folder, tmp_path_factory):
    """The checkpoint of a build by the command line."""
    output = tmp_path_factory.mktemp("built") / "moe"
    assert main(["build", "--model", llava_folder, "--system", "moiie", "-o", str(output)]) == 0
    return output


def test_the_checkpoint_answers_as_the_host(built, llava_folder):
    host = AutoModelForImageTextToText.from_pretrained(llava_folder).eval()
    model = HfMoeForConditionalGeneration.from_pretrained(built).eval()
    inputs = inputs_of(AutoProcessor.from_pretrained(llava_folder))
    with torch.no_grad():
        assert_near(model(**inputs).logits, host(**inputs).logits, 1e-5)
    assert model.config.host_type == "llava" and model.config.system == "moiie"


def test_the_processor_is_that_of_the_host(built, llava_folder):
    ours, theirs = (
        AutoProcessor.from_pretrained(built, trust_remote_code=False),
        AutoProcessor.from_pretrained(llava_folder),
    )
    assert type(ours) is type(theirs) and ours.chat_template == theirs.chat_template
    expected = inputs_of(theirs)
    found = inputs_of(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_generation_settings_are_those_of_the_host(built):
    assert HfMoeForConditionalGeneration.from_pretrained(built).generation_config.max_new_tokens == 7


def test_the_report_tells_what_was_built(llava_folder, tmp_path, capsys):
    output = str(tmp_path / "moe")
    assert main(["build", "--model", llava_folder, "-o", output, "--moe-config", '{"num_experts": 4}']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(output) and lines[0].endswith("MiB of weights, LlavaProcessor")
    assert [line.split(":")[0] for line in lines[1:]] == [
        "parameters",
        "decoder parameters active per text token",
        "decoder parameters active per image token",
        "largest logit difference to the host at step 0",
    ]
    assert float(lines[-1].split()[-1]) < 1e-5
    folder = tmp_path / "moe"
    assert {"README.md", "chat_template.jinja", "generation_config.json", "modeling_hf_moe.py"} <= {
        path.name for path in folder.iterdir()
    }
    texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja")]
    assert [path.name for path in texts if llava_folder in path.read_text()] == [], "a folder of this machine"


def test_dtype_and_seed_reach_the_build(llava_folder, tmp_path):
    def build(name, *options):
        arguments = ["build", "--model", llava_folder, "-o", str(tmp_path / name), "--noise", "0.1", *options]
        assert main(arguments) == 0
        return HfMoeForConditionalGeneration.from_pretrained(tmp_path / name, dtype="auto")

    one, two, half = build("one", "--seed", "1"), build("two", "--seed", "2"), build("half", "--dtype", "bfloat16")
    assert not torch.equal(one.moe_layers()[0].gate.weight, two.moe_layers()[0].gate.weight)
    assert half.dtype == torch.bfloat16 and one.dtype == torch.float32
    assert half.moe_layers()[0].gate.weight.dtype == torch.float32


def test_a_build_names_what_its_experts_are_made_of(llava_folder, tmp_path, capsys):
    source = '{"name": "drop_upcycling", "reinit_ratio": 0.0}'
    assert main(["build", "--model", llava_folder, "-o", str(tmp_path / "moe"), "--source", source]) == 0
    assert "not exact" not in capsys.readouterr().out
    assert main(["build", "--model", llava_folder, "-o", str(tmp_path / "half"), "--system", "drop_upcycling"]) == 0
    assert "not exact by design" in capsys.readouterr().out
    assert main(["build", "--model", llava_folder, "-o", str(tmp_path / "x"), "--source", "drop_upcyclin"]) == 2
    assert "Did you mean 'drop_upcycling'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x", "--vision-tower", "y"], "--vision-tower belongs to --language-model, and this is a build"),
        (["--language-model", "x", "--revision", "main"], "--revision belongs to --model, and this is a build"),
    ],
)
def test_options_of_the_other_source_are_refused(arguments, message, tmp_path, capsys):
    assert main(["build", *arguments, "-o", str(tmp_path / "moe")]) == 2
    assert message in capsys.readouterr().err


def test_a_refused_host_leaves_nothing(tmp_path, capsys):
    T5Config().save_pretrained(tmp_path / "t5")
    assert main(["build", "--model", str(tmp_path / "t5"), "-o", str(tmp_path / "deep" / "moe")]) == 2
    assert "t5 is an encoder-decoder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t5"]


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["build", "--model", str(tmp_path / "none"), "-o", str(tmp_path / "moe")]) == 2
    assert f"There is no folder {tmp_path / 'none'}" in capsys.readouterr().err


def test_a_host_cut_short_names_its_file(tmp_path, capsys):
    small_host("llama").save_pretrained(tmp_path / "llama")
    weights = tmp_path / "llama" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert main(["build", "--model", str(tmp_path / "llama"), "-o", str(tmp_path / "moe")]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_a_host_without_a_processor_is_built_and_said_so(tmp_path, capsys):
    small_host("llama").save_pretrained(tmp_path / "llama")
    assert main(["build", "--model", str(tmp_path / "llama"), "-o", str(tmp_path / "moe")]) == 0
    assert "MiB of weights, no processor" in capsys.readouterr().out


def test_a_gguf_file_becomes_a_moe_in_place(monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "load_language_model", lambda *args: (asked.append(args), args))
    pretrained.load_host("decoder.gguf")
    assert asked == [("decoder.gguf", torch.float32)]


# Read from /proc, since the maximum of `getrusage` survives fork and exec: it would hold the parent's.
PEAK = """
import json, sys
from hf_moe.construction import command

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

host, small, output, options = *sys.argv[1:4], json.loads(sys.argv[4])
command.build_checkpoint(output + "_small", host=small, **options)  # what is imported on the way is no part of it
before = memory("VmRSS")
report = command.build_checkpoint(output, host=host, **options)
print(json.dumps({"resident": memory("VmHWM") - before, "bytes": report["bytes"]}))
"""
LARGE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "head_dim": 64,
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("model_type", "changes", "options"),
    [
        ("llava", {}, {"moe_config": {"num_experts": 2}}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3}, {"system": "anyexperts"}),
    ],
    ids=["upcycled", "adopted"],
)
def test_peak_memory_stays_under_1_3_times_the_checkpoint(tmp_path, model_type, changes, options):
    """Of the larger of the two checkpoints, the one that is written: upcycling multiplies the feed-forwards."""
    small_host(model_type, **LARGE, **changes).save_pretrained(tmp_path / "host", max_shard_size="50MB")
    small_host(model_type, **changes).save_pretrained(tmp_path / "small")
    folders = [str(tmp_path / name) for name in ("host", "small", "moe")]
    command = [sys.executable, "-c", PEAK, *folders, json.dumps(options)]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert result["bytes"] > 150e6
    assert 0.5 * result["bytes"] < result["resident"] < 1.3 * result["bytes"], result
