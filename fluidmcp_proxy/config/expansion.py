"""``${NAME}`` in ``env`` and ``api_key``: the gateway's variables put into a model's.

It gets the variables handed in and never shows a value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fluidmcp_proxy.errors import ConfigError

from .faults import shown

_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)\}|\$\{")


def expand(text: str, environ: Mapping[str, str], *, path: str, code: str) -> tuple[str, frozenset[str]]:
    """``text`` with each ``${NAME}`` replaced, and the names that were used.

    Raises ``ConfigError`` at ``path``: ``missing_env_variable``, or ``code`` for a ``${`` that is no reference.
    """
    names: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name = match[1]
        if name is None:
            remedy = "write ${NAME} for a variable of the gateway, $${ for a literal ${"
            raise ConfigError(code, "has a ${ that is not ${NAME}", path=path, remedy=remedy)
        if name not in environ:
            remedy = "set it before the gateway starts, or write $${ for a literal ${"
            raise ConfigError(
                "missing_env_variable", f"the variable {shown(name)} is not set", path=path, remedy=remedy
            )
        names.add(name)
        return environ[name]

    return _REFERENCE.sub(replace, text), frozenset(names)
