"""The site's pages that no file below docs/ holds: references made from the code, and files that pages link to.

A hook of mkdocs. Links out of docs/, which are right on a code host, are turned to these pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fluidmcp_proxy
from fluidmcp_proxy.config.schema import json_schema

ROOT = Path(__file__).resolve().parent.parent
OF_THE_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".conf": "nginx", ".service": "ini", "": "dockerfile"}
LINK = re.compile(r"\]\(([^)\s:]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, content in {**references(), **dict(examples()), **dict(of_the_root())}.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to the repository's other files to their pages."""
    return LINK.sub(lambda link: f"]({_page(link[1])})", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take the roles of reStructuredText out of docstrings."""
    return re.sub(r":(?:class|func|meth|mod|attr):(?=<code>)", "", html)


def _page(target: str) -> str:
    if target.startswith("../examples/"):
        return f"{target[3:]}index.md" if (ROOT / target[3:]).is_dir() else f"{target[3:]}.md"
    return OF_THE_ROOT.get(target.removeprefix("../"), target)


def of_the_root() -> Iterator[tuple[str, str]]:
    """The pages of the repository's root, with their links as seen from docs/."""
    for name, page in OF_THE_ROOT.items():
        yield page, (ROOT / name).read_text().replace("](docs/", "](").replace("](examples/", "](../examples/")


def examples() -> Iterator[tuple[str, str]]:
    """A page for every example, and for each of their folders a list."""
    for folder in (ROOT / "examples", ROOT / "examples" / "deploy"):
        where = folder.relative_to(ROOT)
        found = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in LANGUAGES)
        listed = "\n".join(f"* [`{path.name}`]({path.name}.md)" for path in found)
        yield f"{where}/index.md", f"# {'Deployment files' if where.name == 'deploy' else 'Examples'}\n\n{listed}\n"
        for path in found:
            yield f"{where}/{path.name}.md", f"# {path.name}\n\n````{LANGUAGES[path.suffix]}\n{path.read_text()}````\n"


def references() -> dict[str, str]:
    """What is made from the code."""
    schema = json_schema()
    sections = {
        "Top level": schema,
        "A model": schema["$defs"]["ModelEntry"],
        "gateway": schema["$defs"]["GatewaySection"],
    }
    keys = "\n".join(f"## {title}\n\n{_table(part, schema['$defs'])}" for title, part in sections.items())
    names = [name for name in fluidmcp_proxy.__all__ if name not in ("app", "__version__")]
    return {
        "reference/schema.json": json.dumps(schema, indent=2),
        "reference/configuration.md": (
            "# Keys by type\n\nMade from the models that read the file. [Configuration](../configuration.md) explains "
            f"them; [schema.json](schema.json) is the JSON Schema, which `fluidmcp schema` prints, too.\n\n{keys}"
        ),
        "reference/python.md": (
            "# Python\n\nThe names of `fluidmcp_proxy`; with `__version__`, and `app`, which is `create_app()`. "
            "[Embedding](../embedding.md) shows them at work.\n\n"
            + "\n\n".join(f"::: fluidmcp_proxy.{n}" for n in names)
        ),
    }


def _table(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    rows = [
        f"| `{name}` | {_type(part, definitions)} | {_default(name, part, schema)} | {part.get('description', '')} |"
        for name, part in schema["properties"].items()
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _default(name: str, part: dict[str, Any], schema: dict[str, Any]) -> str:
    if name in schema.get("required", ()):
        return "required"
    return f"`{json.dumps(part['default'])}`" if part.get("default") is not None else "none"


def _type(part: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in part:
        return _type(definitions[part["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in part:
        return " or ".join(_type(each, definitions) for each in part["anyOf"])
    if "enum" in part:
        return " or ".join(f"`{json.dumps(value)}`" for value in part["enum"])
    kind = str(part.get("type", "object"))
    if kind == "array":
        return f"array of {_type(part['items'], definitions)}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join([kind, *(f"{sign} {part[name]:g}" for name, sign in bounds.items() if name in part)])
