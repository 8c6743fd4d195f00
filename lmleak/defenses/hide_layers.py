"""Withholding the gradient of some parameters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lmleak.defenses.base import Defense
from lmleak.errors import ConfigError


@dataclass(frozen=True)
class HideLayers(Defense):
    """Withhold every parameter whose name matches; the released gradient lacks these names.

    The withheld parameters are no part of theta any more: J loses their columns, and the perturbation has no
    entry for them.
    """

    names: str
    r"""Regular expression, searched in the parameter's name: 'embeddings', '^transformer\.h\.[0-3]\.'."""

    name: ClassVar[str] = "hide-layers"
    paper: ClassVar[str] = (
        "Mo et al., PPFL: Privacy-preserving Federated Learning with Trusted Execution Environments, MobiSys 2021"
    )
    example: ClassVar[str] = "hide-layers(names='embeddings')"

    def __post_init__(self):
        if not isinstance(self.names, str) or not self.names:
            raise ConfigError(
                f"hide-layers: names must be a regular expression over parameter names, got {self.names!r}; "
                f"write for instance {self.example}"
            )
        if "'" in self.names and '"' in self.names:
            raise ConfigError(f"hide-layers: names cannot hold both kinds of quotes, got {self.names!r}")
        try:
            re.compile(self.names)
        except re.error as error:
            raise ConfigError(
                f"hide-layers: names={self.names!r} is not a regular expression ({error}); "
                f"write for instance {self.example}"
            ) from error

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient without the matching parameters.

        Args:
            gradient: The parameters before hiding.

        Returns:
            The others, unchanged, in new tensors.

        Raises:
            ConfigError: If the pattern matches no parameter, which would protect nothing unnoticed, or all.
        """
        hidden = {name for name in gradient if re.search(self.names, name)}
        if not hidden:
            raise ConfigError(
                f"hide-layers: names={self.names!r} matches none of the {len(gradient)} shared parameters, "
                f"such as {', '.join(map(repr, list(gradient)[:3]))}; nothing would be hidden"
            )
        if len(hidden) == len(gradient):
            raise ConfigError(
                f"hide-layers: names={self.names!r} matches all {len(gradient)} shared parameters and leaves "
                "nothing to share; write a narrower pattern"
            )
        return {name: tensor.clone() for name, tensor in gradient.items() if name not in hidden}
