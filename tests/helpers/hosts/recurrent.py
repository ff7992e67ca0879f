"""Tiny decoders whose layers mix tokens by a scan; their last layer attends."""

from helpers.hosts.native import NativeHost, decoder
from helpers.hosts.text import ROWS


MAMBA_1 = {"mamba_d_state": 4, "mamba_dt_rank": 4}
MAMBA_2 = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}


HOSTS = {
    "jamba": NativeHost(
        "JambaForCausalLM",
        decoder("jamba", num_experts=1, attn_layer_period=2, attn_layer_offset=1, **MAMBA_1),
        rows=ROWS,
    ),
    "bamba": NativeHost("BambaForCausalLM", decoder("bamba", attn_layer_indices=[1], **MAMBA_2), rows=ROWS),
    "falcon_h1": NativeHost("FalconH1ForCausalLM", decoder("falcon_h1", mamba_d_ssm=64, **MAMBA_2), rows=ROWS),
}
