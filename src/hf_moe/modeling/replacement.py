"""What stands in the place of a module of the host, other than a feed-forward.

A mechanism of the kind `attention` or `layer` is a class whose constructor, `(spec, parts, layer, **options)`, changes
a layer of the host in place. It puts a [`Replacement`] where it takes a projection or a norm away, so that the host's
attention, positions and cache stay its own. `parts` makes routers and experts, as the config names them; MoE layers
are in the places of the feed-forwards already.
"""

from collections.abc import Callable

from torch import nn

from .layer_spec import Site
from .routing import Router


class UnsuitedLayer(ValueError):
    """A layer has not what a mechanism changes. It stays as it is, unless no layer of the host is another."""


class Replacement(nn.Module):
    """Base of the modules that the kinds `attention` and `layer` put in the places of the host's."""

    # Whether its weights are those of routed experts.
    holds_experts = False
    # Whether it stands beside the host's modules, in the place of none, and changes what the layer computes.
    is_added = False
    # Whether it makes the layer compute something else than the host's although it starts from the host's weights.
    changes_layer = False

    @property
    def routers(self) -> list[Router]:
        """The routers in it."""
        return []

    def start_from(self, module: nn.Module) -> None:
        """Take over the weights of the host's module; the base has no use for them, and refuses."""
        raise ValueError(
            f"{type(self).__name__} does not start from a trained {type(module).__name__}: give the host's config in "
            "place of the host, for fresh weights."
        )

    def active_share(self, name: str, modality: int, experts: Callable[[Site], float]) -> float:
        """Return the share of a parameter or child that works on a token.

        Args:
            name (`str`): of the parameter or child.
            modality (`int`): of the token.
            experts (`Callable`): site of a decision -> how many experts run for the token.
        """
        return 1.0

    def layer_share(self, modality: int, experts: Callable[[Site], float]) -> float:
        """Return the share of tokens for which the modules beside it run; see [`~Replacement.active_share`]."""
        return 1.0

    def initialize(self, std: float) -> None:
        """Initialise the module's own parameters; those of its parts are initialised by themselves."""
