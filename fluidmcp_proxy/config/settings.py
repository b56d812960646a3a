"""The gateway's own settings, and the environment they and the models' programs come from.

The only module that reads the environment. It reads it when asked, never on import.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from fluidmcp_proxy.errors import ConfigError

from .faults import from_validation, nearest, refusal, shown
from .keys import FIELDS, Key, all_opening, expanded, named
from .sources import allowed_host, allowed_origin

PREFIX = "FLUIDMCP_"
INTERNAL_PREFIX = "FLUIDMCP_INTERNAL_"
"""Variables that the gateway sets for its own processes: no settings."""
CLIENT_KEY = "FLUIDMCP_CLIENT_KEY"
"""Variable with the key that the command line shows to a gateway; no setting. It is not called FLUIDMCP_API_KEY: who
writes that means API_KEYS, and has to be told."""

# A Kubernetes service called "fluidmcp" puts FLUIDMCP_PORT=tcp://10.0.0.1:8099 and more into every pod.
_SERVICE_LINK_NAME = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")

_FOLDERS = ("log_dir", "runtime_dir")
_KEYS = ("api_keys", "admin_keys")
_KNOWN_BELOW: dict[tuple[str, ...], tuple[str, ...]] = dict.fromkeys([(name,) for name in _KEYS], FIELDS)
_LISTS = (*_KEYS, "allowed_hosts", "allowed_origins")

LogLevel = Literal["critical", "error", "warning", "info", "debug", "trace"]
LogFormat = Literal["text", "json"]


def _nameable(folder: object) -> object:
    if folder == "" or "\0" in str(folder):
        raise refusal("is empty, or has a NUL character", "write the path of a folder")
    return folder


def _bindable(host: str) -> str:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise refusal("is not an IPv6 address, and the port has its own key", "write it alone") from None
    return host


def _traceable(tracing: bool) -> bool:
    if tracing and find_spec("opentelemetry") is None:
        raise refusal("needs OpenTelemetry, which is not installed", "pip install 'fluidmcp-proxy[otel]'")
    return tracing


_Folder = Annotated[Path, Field(strict=False), BeforeValidator(_nameable)]


class GatewaySection(BaseModel):
    """The gateway's own settings; the environment's FLUIDMCP_* variables and the command line's options win."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]+$"), AfterValidator(_bindable)] = Field(
        "127.0.0.1", description="Address that the gateway binds."
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8099, description="Port that the gateway binds; 0: any free one."
    )
    api_keys: Annotated[tuple[Key, ...], Field(strict=False), AfterValidator(partial(named, prefix="key"))] = Field(
        (), description="Keys of which a request needs one; none: whoever reaches the gateway may use the models."
    )
    admin_keys: Annotated[
        tuple[Key, ...],
        Field(strict=False),
        AfterValidator(all_opening),
        AfterValidator(partial(named, prefix="admin")),
    ] = Field((), description="Keys that open everything.")
    allow_open: bool = Field(
        False, description="Whether `fluidmcp run` may bind an address that others can reach without api_keys."
    )
    allowed_hosts: Annotated[tuple[Annotated[str, AfterValidator(allowed_host)], ...], Field(strict=False)] = Field(
        (),
        description=(
            "Hosts that requests may name besides localhost, without a port; *.example.com for all below one, * for "
            "any. None: only `fluidmcp run` on a loopback address looks at the Host."
        ),
    )
    allowed_origins: Annotated[tuple[Annotated[str, AfterValidator(allowed_origin)], ...], Field(strict=False)] = Field(
        (), description="Origins of other sites whose pages may use the gateway from a browser (CORS); * for any."
    )
    max_body_bytes: Annotated[int, Field(ge=1)] = Field(
        64 * 1024 * 1024, description="The largest request body in bytes."
    )
    body_timeout: Annotated[float, Field(gt=0)] = Field(
        60.0, description="Seconds that a client may be silent inside its request body."
    )
    drain_timeout: Annotated[float, Field(ge=0)] = Field(
        30.0, description="Seconds that running requests get to finish when the gateway ends."
    )
    log_level: LogLevel = Field("info", description="How much is logged.")
    log_format: LogFormat = Field("text", description="Lines for people, or one JSON object a line.")
    tracing: Annotated[bool, AfterValidator(_traceable)] = Field(
        False, description="Whether OpenTelemetry spans are made; needs the extra otel."
    )
    log_dir: _Folder | None = Field(
        None,
        description=(
            "Folder of the models' output files; by default $XDG_STATE_HOME/fluidmcp, else "
            "~/.local/state/fluidmcp. A relative one starts at the configuration file's folder."
        ),
    )
    runtime_dir: _Folder | None = Field(
        None,
        description=(
            "Folder of locks and sockets; by default $XDG_RUNTIME_DIR/fluidmcp, else a folder of the user in"
            " the temporary directory. A relative one starts at the configuration file's folder."
        ),
    )


class Settings(BaseSettings, GatewaySection):
    """The settings in force. Made by :func:`read_settings`, which puts the sources in their order."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, strict=False)

    config: Path | None = Field(None, description="The configuration file, for ``uvicorn fluidmcp_proxy:app``.")
    log_dir: _Folder
    runtime_dir: _Folder

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what it is given: the process's environment is layered in by :func:`read_settings`."""
        return (init_settings,)


class EnvironmentSource(PydanticBaseSettingsSource):
    """The ``FLUIDMCP_*`` variables of a mapping; an empty one counts as unset. Lists are in JSON."""

    def __init__(self, settings_cls: type[BaseSettings], environ: Mapping[str, str]) -> None:
        super().__init__(settings_cls)
        self._environ = environ

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The variable's text, the field's name, and that it is not a nested value."""
        value = self._environ.get(variable(field_name)) or None
        if value is not None and _SERVICE_LINK_VALUE.match(value):
            value = None
        if value is not None and field_name in ("log_level", "log_format"):
            value = value.lower()
        return _list_in(value, field_name) if value and field_name in _LISTS else value, field_name, False

    def __call__(self) -> dict[str, Any]:
        """The values that are set."""
        fields = self.settings_cls.model_fields.items()
        values = {name: self.get_field_value(field, name)[0] for name, field in fields}
        return {name: value for name, value in values.items() if value is not None}


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def environment() -> dict[str, str]:
    """A copy of the process's environment."""
    return dict(os.environ)


def read_settings(
    section: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Settings:
    """The settings: ``overrides`` > environment > the file's ``gateway`` section > defaults.

    An override that is None is not given. Relative folders in the section start at ``folder``. Raises ``ConfigError``:
    ``invalid_value``, ``unknown_key``; ``source`` names the variable where the fault is in one.
    """
    environ = environment() if environ is None else environ
    _refuse_unknown_variables(environ)
    written = _section_values(section or {}, folder, environ)
    variables = EnvironmentSource(Settings, environ)()
    explicit = {name: value for name, value in (overrides or {}).items() if value is not None}
    unknown = set(explicit) - set(Settings.model_fields)
    if unknown:
        raise TypeError(f"no setting is called {', '.join(sorted(unknown))}")
    _check_types(explicit)
    values = {**_default_folders(environ), **written, **variables, **explicit}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        fault = from_validation(error, known=_KNOWN_BELOW)
        source = variable(name) if name in variables and name not in explicit else ""
        path = fault.path.removeprefix(name) if source else fault.path
        raise ConfigError(fault.code, fault.problem, remedy=fault.remedy, path=path, source=source) from None
    folders = {name: Path(os.path.abspath(os.path.expanduser(getattr(settings, name)))) for name in _FOLDERS}
    return settings.model_copy(update=folders)


def configured_path(environ: Mapping[str, str] | None = None) -> str:
    """The file that ``FLUIDMCP_CONFIG`` names. Raises ``ConfigError("config_not_found")`` if there is none."""
    environ = environment() if environ is None else environ
    path = environ.get(variable("config"))
    if not path:
        raise ConfigError(
            "config_not_found",
            "the variable is not set",
            remedy="set it to the path of a configuration file",
            source=variable("config"),
        )
    return path


def client_key(environ: Mapping[str, str] | None = None) -> str | None:
    """The key for a gateway that is reached over HTTP, from ``FLUIDMCP_CLIENT_KEY``."""
    return (environment() if environ is None else environ).get(CLIENT_KEY) or None


def _list_in(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # from None: the exception has the text, which may be a key
        remedy = """write a JSON list of strings: '["…"]'"""
        raise ConfigError("invalid_value", "is not JSON", remedy=remedy, source=variable(name)) from None


def _section_values(section: Mapping[str, Any], folder: Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    known = {(): tuple(GatewaySection.model_fields), **_KNOWN_BELOW}
    keys = {name: expanded(section[name], environ, "gateway", name) for name in _KEYS if name in section}
    try:
        parsed = GatewaySection.model_validate({**section, **keys})
    except ValidationError as error:
        raise from_validation(error, "gateway", known=known) from None
    values = {name: getattr(parsed, name) for name in parsed.model_fields_set}
    for name in _FOLDERS:
        if values.get(name) is None:
            values.pop(name, None)
        elif folder is not None:
            values[name] = folder / os.path.expanduser(values[name])
    return values


def _check_types(explicit: Mapping[str, Any]) -> None:
    try:
        GatewaySection.model_validate({name: value for name, value in explicit.items() if name != "config"})
    except ValidationError as error:
        raise from_validation(error, known=_KNOWN_BELOW) from None


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = [*map(variable, Settings.model_fields), CLIENT_KEY]
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in known or name.startswith(INTERNAL_PREFIX):
            continue
        if _SERVICE_LINK_NAME.search(name) or _SERVICE_LINK_VALUE.match(environ[name]):
            continue
        problem = f"{shown(name)} is not a variable of the gateway"
        names = [field.upper() for field in Settings.model_fields]
        remedy = nearest(name.removeprefix(PREFIX), names, PREFIX)
        raise ConfigError("unknown_key", problem, remedy=remedy, source="environment")


def _default_folders(environ: Mapping[str, str]) -> dict[str, Path]:
    state = environ.get("XDG_STATE_HOME", "")
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    home = environ.get("HOME") or os.path.expanduser("~")
    # tempfile.gettempdir() would write a file to find out.
    own = Path(tempfile.tempdir or environ.get("TMPDIR") or "/tmp", f"fluidmcp-{os.getuid()}")  # noqa: S108
    # The XDG specification wants relative paths ignored. A container's user may have no home at all.
    fallback = Path(home, ".local/state/fluidmcp") if home.startswith("/") else own / "logs"
    return {
        "log_dir": Path(state, "fluidmcp") if state.startswith("/") else fallback,
        "runtime_dir": Path(runtime, "fluidmcp") if runtime.startswith("/") else own,
    }
