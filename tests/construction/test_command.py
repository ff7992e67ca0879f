"""Checkpoints that `build_checkpoint` writes: complete or absent, and small in memory while they are made."""

import json
import subprocess
import sys

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from hf_moe import HfMoeForConditionalGeneration, HfMoeProcessor
from hf_moe.construction.command import build_checkpoint
from hf_moe.hub.push import push_checkpoint


# Read from /proc, since the maximum of `getrusage` survives fork and exec: it would hold the parent's.
PEAK = """
import json, sys
from hf_moe.construction import command

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

decoder, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
before = memory("VmRSS")
report = command.build_checkpoint(output, language_model=decoder, vision_tower=None, **options)
print(json.dumps({"resident": memory("VmHWM") - before, "bytes": report["bytes"]}))
"""


def test_report_counts_what_the_checkpoint_holds(decoder_folder, tower_folder, tmp_path):
    output = tmp_path / "deep" / "model"
    report = build_checkpoint(output, language_model=decoder_folder, vision_tower=tower_folder, system="moiie")
    model = HfMoeForConditionalGeneration.from_pretrained(output)
    assert report["parameters_total"] == sum(parameter.numel() for parameter in model.parameters())
    with safe_open(output / "model.safetensors", "pt") as weights:
        stored = sum(weights.get_tensor(name).nbytes for name in weights.keys())
    assert stored < report["bytes"] < 1.2 * stored
    # Two of four experts in layers 1 and 3: the decoder without the other two.
    decoder = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    expected = decoder - 2 * 2 * 3 * 32 * 48
    assert report["parameters_active"] == {"text": expected, "image": expected}
    assert report["exact"] and report["logit_difference"] < 1e-4
    assert HfMoeProcessor.from_pretrained(output).image_seq_length == model.config.image_seq_length
    assert (output / "modeling_hf_moe.py").is_file() and (output / "router_moiie.py").is_file()
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_text_only_checkpoint_has_a_tokenizer(decoder_folder, tmp_path):
    report = build_checkpoint(tmp_path / "text", language_model=decoder_folder, vision_tower=None)
    assert set(report["parameters_active"]) == {"text"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "text")) == len(AutoTokenizer.from_pretrained(decoder_folder))


def test_what_a_build_leaves_can_be_pushed_as_it_is(decoder_folder, tower_folder, tmp_path):
    folder = tmp_path / "model"
    build_checkpoint(folder, language_model=decoder_folder, vision_tower=tower_folder, system="moiie")
    files = push_checkpoint(folder, "owner/model", dry_run=True).files
    assert {"README.md", "LICENSE-CODE", "evaluation.json", "model.safetensors"} <= set(files)
    card = (folder / "README.md").read_text()
    assert "No quality has been measured." in card and "license:" not in card and "base_model:" not in card


def test_existing_folder_is_kept_unless_it_may_be_overwritten(decoder_folder, tmp_path):
    output = tmp_path / "model"
    options = {"language_model": decoder_folder, "vision_tower": None}
    build_checkpoint(output, system="top_k", **options)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        build_checkpoint(output, system="switch_transformer", **options)
    assert (output / "notes.txt").is_file()
    build_checkpoint(output, overwrite=True, system="switch_transformer", **options)
    assert json.loads((output / "config.json").read_text())["system"] == "switch_transformer"
    assert not (output / "notes.txt").exists()


def test_only_a_checkpoint_is_overwritten(decoder_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a checkpoint"):
        build_checkpoint(tmp_path, overwrite=True, language_model=decoder_folder, vision_tower=None)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_failed_build_leaves_nothing(decoder_folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(HfMoeForConditionalGeneration, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        build_checkpoint(tmp_path / "model", language_model=decoder_folder, vision_tower=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("model_type", "sizes", "options"),
    [
        ("llama", {"num_hidden_layers": 8}, {"system": "top_k", "moe_config": {"num_experts": 4}}),
        ("llama", {"num_hidden_layers": 6}, {"system": "top_k", "moe_config": {"num_experts": 8}}),
        ("mixtral", {"num_hidden_layers": 8, "num_local_experts": 4, "num_key_value_heads": 2}, {}),
    ],
    ids=["dense_4_experts", "dense_8_experts", "adopted"],
)
def test_peak_memory_stays_under_1_3_times_the_checkpoint(save_decoder, tmp_path, model_type, sizes, options):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, **sizes}
    folder = save_decoder(model_type, max_shard_size="100MB", **sizes)
    command = [sys.executable, "-c", PEAK, folder, str(tmp_path / "model"), json.dumps(options)]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert result["bytes"] > 400e6
    assert 0.5 * result["bytes"] < result["resident"] < 1.3 * result["bytes"], result
