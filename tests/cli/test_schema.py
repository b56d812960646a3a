"""``fluidmcp schema``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fluidmcp_proxy.cli.schema import schema
from fluidmcp_proxy.config.schema import json_schema


def test_it_prints_the_schema(invoke: Callable[..., Any]) -> None:
    result = invoke(schema)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json_schema()
