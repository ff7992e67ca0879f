"""Tiny hosts that hear, and nothing else."""

import torch

from helpers.hosts.native import AUDIO, NativeHost, decoder, noise


EARS = {
    "num_mel_bins": 8,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}


def rows(first: int, second: int) -> tuple[list[int], list[int]]:
    return [5, *[AUDIO] * first, 6, 7], [9, *[AUDIO] * second, 6, 8, 8, 8]


def heard(length: int, frames: int, seed: int, mask: str) -> dict[str, torch.Tensor]:
    """A sound of so many frames, padded on the right."""
    return {
        "input_features": noise(1, 8, length, seed=seed),
        mask: torch.tensor([[1] * frames + [0] * (length - frames)]),
    }


HOSTS = {
    "qwen2_audio": NativeHost(
        "Qwen2AudioForConditionalGeneration",
        {
            "model_type": "qwen2_audio",
            "text_config": decoder("qwen2"),
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "d_model": 16,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "encoder_layers": 2,
                "num_mel_bins": 8,
                "max_source_positions": 30,
            },
            "audio_token_index": AUDIO,
        },
        rows=rows(15, 10),
        media=(
            lambda: heard(60, 60, seed=0, mask="feature_attention_mask"),
            lambda: heard(60, 40, seed=1, mask="feature_attention_mask"),
        ),
    ),
    "voxtral": NativeHost(
        "VoxtralForConditionalGeneration",
        {
            "model_type": "voxtral",
            "text_config": decoder("llama"),
            "audio_config": {
                **EARS,
                "model_type": "voxtral_encoder",
                "intermediate_size": 64,
                "max_source_positions": 16,
                "head_dim": 8,
            },
            "audio_token_id": AUDIO,
        },
        rows=rows(4, 4),
        media=tuple(lambda seed=seed: {"input_features": noise(1, 8, 32, seed=seed)} for seed in range(2)),
    ),
    "granite_speech": NativeHost(
        "GraniteSpeechForConditionalGeneration",
        {
            "model_type": "granite_speech",
            "text_config": decoder("granite", logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0),
            "encoder_config": {
                "input_dim": 8,
                "num_layers": 2,
                "hidden_dim": 16,
                "feedforward_mult": 2,
                "num_heads": 2,
                "dim_head": 8,
                "output_dim": 12,
                "context_size": 8,
                "max_pos_emb": 16,
                "conv_kernel_size": 3,
                "conv_expansion_factor": 2,
            },
            "projector_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "intermediate_size": 24,
                "encoder_hidden_size": 16,
                "cross_attention_frequency": 1,
            },
            "audio_token_index": AUDIO,
            "downsample_rate": 2,
            "window_size": 4,
            "has_lora_adapter": False,
        },
        rows=rows(4, 4),
        media=tuple(
            lambda seed=seed: {
                "input_features": noise(1, 8, 8, seed=seed),
                "input_features_mask": torch.ones(1, 4, dtype=torch.bool),
            }
            for seed in range(2)
        ),
    ),
    "audioflamingo3": NativeHost(
        "AudioFlamingo3ForConditionalGeneration",
        {
            "model_type": "audioflamingo3",
            "text_config": decoder("qwen2"),
            "audio_config": {**EARS, "model_type": "audioflamingo3_encoder", "max_source_positions": 30},
            "audio_token_id": AUDIO,
        },
        rows=rows(15, 10),
        media=(
            lambda: heard(60, 60, seed=0, mask="input_features_mask"),
            lambda: heard(60, 40, seed=1, mask="input_features_mask"),
        ),
    ),
}
