"""Names of mechanisms that are another one with options: old configs open under them."""

import pytest

from hf_moe import MoeConfig
from hf_moe.configuration.names import ALIASES
from hf_moe.modeling.mechanisms import mechanism_names


@pytest.mark.parametrize("name", ALIASES["router"])
def test_an_alias_stands_for_a_router_of_the_library(name):
    config = MoeConfig(router={"default": {"name": name}, "2": {"name": name, "routed_scaling_factor": 2.0}})
    assert config.router == {
        "default": ALIASES["router"][name],
        "2": {**ALIASES["router"][name], "routed_scaling_factor": 2.0},
    }
    assert ALIASES["router"][name]["name"] in mechanism_names("router") and name not in mechanism_names("router")
