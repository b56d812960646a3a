"""Rewriting a document: every deprecated vLLM wrapper under ``mcpServers`` becomes an entry of ``llmModels``.

Nothing else in the document changes. It neither reads nor writes files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .faults import json_path
from .wrapper import MODEL_PLACEHOLDER, free_port, model_id, replacement, wrappers


@dataclass(frozen=True)
class Migration:
    """The rewritten document, and what was done, one line each without any value of an env."""

    document: dict[str, Any]
    changes: tuple[str, ...]
    advice: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The document as a file."""
        written = json.dumps(self.document, indent=2, ensure_ascii=False)
        try:
            written.encode()
        except UnicodeEncodeError:  # a lone surrogate can be escaped, but not encoded
            return self.ascii
        return written + "\n"

    @property
    def ascii(self) -> str:
        """The same with every other character escaped."""
        return json.dumps(self.document, indent=2) + "\n"


def migrate(document: Mapping[str, Any]) -> Migration:
    """Move the wrappers. A document without any comes back as it is, with no changes."""
    servers = document.get("mcpServers")
    if not isinstance(servers, Mapping):
        return Migration(dict(document), ())
    written = document.get("llmModels", {})
    models = dict(written) if isinstance(written, Mapping) else {}
    moved: dict[str, str] = {}
    advice: list[str] = []
    for name, entry in wrappers(servers):
        moved[name] = model_id(name, models)
        port = free_port(models)
        new = models[moved[name]] = replacement(entry, port)
        advice += _advice(moved[name], new)
    if not moved:
        return Migration(dict(document), ())
    changes = [f"{json_path('mcpServers', name)} -> {json_path('llmModels', new)}" for name, new in moved.items()]
    return Migration(_rebuilt(document, models, moved), tuple(changes), tuple(advice))


def _rebuilt(document: Mapping[str, Any], models: dict[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """The document with its keys in their order; ``llmModels`` comes first where it is new."""
    remaining = {name: entry for name, entry in document["mcpServers"].items() if name not in moved}
    result = {} if "llmModels" in document else {"llmModels": models}
    for key, value in document.items():
        if key == "llmModels":
            result[key] = models
        elif key != "mcpServers":
            result[key] = value
        elif remaining:
            result[key] = remaining
    return result


def _advice(name: str, entry: Mapping[str, Any]) -> list[str]:
    where = json_path("llmModels", name, "args", 1)
    model = entry["args"][1]
    if model == MODEL_PLACEHOLDER:
        return [f"{where}: write the model's name here; the wrapper did not say which it serves"]
    if "${" in model:
        return [f"{where}: write the model's name here; variables are not expanded in args"]
    return []
