"""Hosts of the catalogue, of three layers where they are dense, with changes to their configs."""

from dataclasses import replace

from helpers.hosts.catalogue import HOSTS
from helpers.hosts.native import NativeHost, decoder


MIXTRAL = decoder("mixtral", num_local_experts=6, num_experts_per_tok=3)
SMALL = {"mixtral": NativeHost("MixtralForCausalLM", MIXTRAL, rows=()), **HOSTS}


def fields_of(model_type: str, **changes) -> dict:
    """Return the fields of a config; changes that are none of the host's own fields go to its decoder."""
    fields = dict(SMALL[model_type].config)
    if model_type != "mixtral":
        changes = {"num_hidden_layers": 3, **changes}
    fields |= {name: changes.pop(name) for name in list(changes) if name in fields}
    if "text_config" in fields:
        return {**fields, "text_config": {**fields["text_config"], **changes}}
    return {**fields, **changes}


def small_host(model_type: str, seed: int = 0, **changes):
    """Return a model in evaluation mode, with weights that show in its logits."""
    return replace(SMALL[model_type], config=fields_of(model_type, **changes)).build(seed)
