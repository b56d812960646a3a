"""The configuration as values: what the rest of the package gets. What the user may write is in ``options``.

Frozen, and without any behaviour beyond hiding what must not be shown.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, Field, InstanceOf, SecretStr

from .endpoint import Endpoint
from .options import Frozen, ModelOptions, Start
from .secrets import mask_arguments
from .settings import Settings


class Environment(Mapping[str, str]):
    """Variables for a child. Immutable; its ``repr`` has the names only, since any value may be a secret."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._variables = dict(variables or {})

    def __getitem__(self, name: str) -> str:
        return self._variables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def __hash__(self) -> int:
        return hash(frozenset(self._variables.items()))

    def __repr__(self) -> str:
        return f"Environment({', '.join(self._variables)})"


class ModelConfig(ModelOptions):
    """One model, checked and with its variables expanded.

    ``secrets`` are the strings that must not appear in anything shown: the server's output is redacted by it.
    """

    id: str = Field(description="The first path segment of the model's URLs.")
    env: InstanceOf[Environment] = Field(
        default_factory=Environment, exclude=True, description="Variables for the program, expanded."
    )
    start: Start = Field(Start.EAGER, description="When the server is started.")
    endpoints: Annotated[tuple[Endpoint, ...], Field(strict=False)] = Field(
        (),
        description=(
            "Where the server listens; several: replicas that someone else runs; none: where the gateway chooses at "
            "each launch."
        ),
    )
    readiness_path: str = Field("/health", description="Path polled on the server's root.")
    api_key: SecretStr | None = Field(None, description="Key that the gateway sends to the server.")
    served_names: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Names under which the server serves the model, as far as its arguments say."
    )
    secrets: frozenset[str] = Field(default=frozenset(), repr=False, exclude=True, description="Strings to redact.")

    @property
    def endpoint(self) -> Endpoint | None:
        """The first of ``endpoints``."""
        return self.endpoints[0] if self.endpoints else None

    @property
    def masked_args(self) -> tuple[str, ...]:
        """``args`` as they may be shown."""
        return mask_arguments(self.args, self.secrets)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """As pydantic's, with the secrets in the arguments masked."""
        for name, value in super().__repr_args__():
            yield name, self.masked_args if name == "args" else value

    def __str__(self) -> str:
        return repr(self)


class GatewayConfig(Frozen):
    """A whole configuration: the models by id in the order of the file, and the gateway's settings."""

    models: Annotated[
        Mapping[str, InstanceOf[ModelConfig]], AfterValidator(lambda models: MappingProxyType(dict(models)))
    ] = Field(description="The models by id.")
    settings: InstanceOf[Settings] = Field(description="The gateway's own settings.")
    source: Path | None = Field(None, description="The file, absolute; None for a configuration made in code.")
    warnings: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="What deserves attention, one line each, without any value that may be secret."
    )

    @property
    def identity(self) -> str:
        """What makes two gateways rivals: the file's real path, or a hash of the models made in code.

        The hash leaves the environment and the keys out, so it tells nothing about them.
        """
        if self.source is not None:
            return os.path.realpath(self.source)
        facts = [
            (model.id, model.command, model.args, [endpoint.base_url for endpoint in model.endpoints])
            for model in self.models.values()
        ]
        return "models:" + hashlib.sha256(json.dumps(facts).encode("utf-8", "replace")).hexdigest()
