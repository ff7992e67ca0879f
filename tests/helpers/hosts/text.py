"""Tiny decoders without any tower."""

from helpers.hosts.native import NativeHost, decoder


ROWS = ([5, 6, 7, 8, 9], [9, 6, 8, 8, 8, 8, 12])


def text(class_name: str, model_type: str, **fields) -> NativeHost:
    return NativeHost(class_name, decoder(model_type, **fields), rows=ROWS)


def gpt(host_class: str, model_type: str) -> NativeHost:
    """Return a host whose config has the names of GPT-2's; GPT-2 stores its matrices the other way round."""
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 512}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return NativeHost(host_class, {"model_type": model_type, **sizes, **special}, rows=ROWS)


HOSTS = {
    "llama": text("LlamaForCausalLM", "llama"),
    "gemma2": text(
        "Gemma2ForCausalLM",
        "gemma2",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        query_pre_attn_scalar=8,
        final_logit_softcapping=5.0,
    ),
    "granite": text(
        "GraniteForCausalLM", "granite", logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0
    ),
    "cohere": text("CohereForCausalLM", "cohere", logit_scale=0.25),
    "gpt_neox": text("GPTNeoXForCausalLM", "gpt_neox", use_parallel_residual=True),
    "gpt2": gpt("GPT2LMHeadModel", "gpt2"),
    "gpt_bigcode": gpt("GPTBigCodeForCausalLM", "gpt_bigcode"),
    "qwen3": text("Qwen3ForCausalLM", "qwen3"),
    "phi3": text("Phi3ForCausalLM", "phi3"),
}
