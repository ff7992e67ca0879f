"""Tiny decoders whose layers mix tokens by a scan; those with feed-forwards attend in their last layer."""

from helpers.hosts.native import NativeHost, decoder
from helpers.hosts.text import ROWS


MAMBA_1 = {"mamba_d_state": 4, "mamba_dt_rank": 4}
MAMBA_2 = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
SCAN_ALONE = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}

HOSTS = {
    "jamba": NativeHost(
        "JambaForCausalLM",
        decoder("jamba", num_experts=1, attn_layer_period=2, attn_layer_offset=1, **MAMBA_1),
        rows=ROWS,
    ),
    "bamba": NativeHost("BambaForCausalLM", decoder("bamba", attn_layer_indices=[1], **MAMBA_2), rows=ROWS),
    "mamba": NativeHost("MambaForCausalLM", {"model_type": "mamba", **SCAN_ALONE}, rows=ROWS),
    "falcon_mamba": NativeHost("FalconMambaForCausalLM", {"model_type": "falcon_mamba", **SCAN_ALONE}, rows=ROWS),
}
