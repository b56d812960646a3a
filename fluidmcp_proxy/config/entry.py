"""From one entry of ``llmModels`` to a ``ModelConfig``: expansion, the address, what only makes sense together.

It looks at one model alone; ``checks`` compares models with each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr, ValidationError

from fluidmcp_proxy.errors import ConfigError

from .arguments import Option, ServerArguments, find_option, glued_value, misspelt_dash, read_arguments
from .endpoint import LONGEST_SOCKET, Endpoint, local_endpoint, parse_base_url, unix_endpoint
from .expansion import expand
from .faults import from_validation, json_path, kind
from .models import Environment, ModelConfig
from .options import EndpointEntry, EndpointsEntry, ModelEntry, ModelOptions, Start
from .replicas import check_list, check_replicas
from .secrets import secret_arguments, secrets_of_environment, secrets_of_expansion, worth_redacting

_KNOWN = {(): list(ModelEntry.model_fields), ("endpoints",): list(EndpointsEntry.model_fields)}


def parse_entry(model_id: str, entry: object, environ: Mapping[str, str]) -> ModelConfig:
    """Check one entry and make the model of it. Raises ``ConfigError`` with any code of a model's keys."""
    path = ("llmModels", model_id)
    if not isinstance(entry, Mapping):
        problem = f"a model must be an object, not {kind(entry)}"
        raise ConfigError(
            "config_invalid_type", problem, path=json_path(*path), remedy='write {"command": …, "args": […]}'
        )
    _refuse_null(entry, path)
    try:
        written = ModelEntry.model_validate(dict(entry))
    except ValidationError as error:
        raise from_validation(error, *path, known=_KNOWN) from None
    _check_command(written, path)
    _check_sleep(written, path)
    env, secrets = _expand_env(written, environ, path)
    key = _expand_key(written, environ, path)
    arguments = read_arguments(written.command or "", written.args)
    check_replicas(written, arguments, path)
    stated = [*([key] if key else []), *(text for _, text in secret_arguments(written.args))]
    return ModelConfig(
        **{name: getattr(written, name) for name in ModelOptions.model_fields},
        id=model_id,
        env=env,
        start=written.start or (Start.ON_DEMAND if written.group and written.command else Start.EAGER),
        endpoints=_endpoints(written, arguments, path),
        readiness_path=written.readiness_path or ("/v1/models" if written.command is None else "/health"),
        api_key=None if key is None else SecretStr(key),
        served_names=arguments.served_names if written.command is not None else (),
        secrets=secrets | {text for text in stated if worth_redacting(text)},
    )


def _refuse_null(entry: Mapping[str, Any], path: tuple[str, ...]) -> None:
    endpoints = entry.get("endpoints")
    if isinstance(endpoints, Mapping) and endpoints.get("base_url", "") is None:
        where = json_path(*path, "endpoints", "base_url")
        raise ConfigError(
            "invalid_base_url", "must be a string, not null", path=where, remedy="leave it out, or write the address"
        )


def _check_command(written: ModelEntry, path: tuple[str, ...]) -> None:
    if written.command is None:
        if written.args:
            remedy = 'write "command", or remove args if someone else runs the server'
            raise ConfigError(
                "invalid_command", "args without a command", path=json_path(*path, "command"), remedy=remedy
            )
        return
    vllm = read_arguments(written.command, written.args).is_vllm
    for index, argument in enumerate(written.args):
        where = json_path(*path, "args", index)
        if misspelt_dash(argument):
            raise ConfigError(
                "invalid_args", "begins with a typographic dash", path=where, remedy="write two hyphens: --"
            )
        if vllm and glued_value(argument):
            remedy = 'write two strings: "--option", "value"'
            raise ConfigError("invalid_args", "an option and its value in one string", path=where, remedy=remedy)


def _check_sleep(written: ModelEntry, path: tuple[str, ...]) -> None:
    """vLLM has its sleep routes only with ``--enable-sleep-mode``; a launcher of one may add it by itself."""
    arguments = read_arguments(written.command or "", written.args)
    if written.sleep is None or not arguments.is_vllm or arguments.config_file:
        return
    if find_option(written.args, "--enable-sleep-mode") is None:
        problem = "vLLM cannot sleep without --enable-sleep-mode"
        remedy = 'add "--enable-sleep-mode" to args, or remove sleep'
        raise ConfigError("invalid_value", problem, path=json_path(*path, "sleep"), remedy=remedy)


def _expand_env(
    written: ModelEntry, environ: Mapping[str, str], path: tuple[str, ...]
) -> tuple[Environment, frozenset[str]]:
    values: dict[str, str] = {}
    secrets = set(secrets_of_environment(environ)) if written.command is not None else set()
    for name, text in written.env.items():
        where = json_path(*path, "env", name)
        if not name or "=" in name:
            raise ConfigError(
                "invalid_env", "a variable's name is empty or has a = in it", path=where, remedy="rename it"
            )
        values[name], used = expand(text, environ, path=where, code="invalid_env")
        if "\0" in values[name]:
            raise ConfigError("invalid_env", "has a NUL character", path=where, remedy="remove it")
        secrets.update(secrets_of_expansion(values[name], used, environ))
    secrets.update(secrets_of_environment(values))
    return Environment(values), frozenset(secrets)


def _expand_key(written: ModelEntry, environ: Mapping[str, str], path: tuple[str, ...]) -> str | None:
    if written.api_key is None:
        return None
    where = json_path(*path, "api_key")
    key, _ = expand(written.api_key, environ, path=where, code="invalid_value")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        problem = "is empty, or has spaces or characters that no HTTP header can carry"
        raise ConfigError("invalid_value", problem, path=where, remedy="write the key alone, without Bearer")
    return key


def _endpoints(written: ModelEntry, arguments: ServerArguments, path: tuple[str, ...]) -> tuple[Endpoint, ...]:
    """Where the server or its replicas listen; none: where the gateway chooses."""
    if isinstance(written.endpoints, tuple):
        return _listed(written, written.endpoints, path)
    if written.replicas > 1:
        host = arguments.host.value if arguments.host else None
        _derived(host, 1, json_path(*path, "endpoints", "base_url"), launched=True)  # the port is chosen at each launch
        return ()
    endpoint = _endpoint(written, written.endpoints.base_url, arguments, path)
    return () if endpoint is None else (endpoint,)


def _listed(written: ModelEntry, entries: tuple[EndpointEntry, ...], path: tuple[str, ...]) -> tuple[Endpoint, ...]:
    if written.command is not None:
        problem, remedy = "a list beside a command", "write replicas: the gateway chooses their addresses"
        raise ConfigError("invalid_base_url", problem, path=json_path(*path, "endpoints"), remedy=remedy)
    endpoints = tuple(
        _parsed(entry.base_url, json_path(*path, "endpoints", index, "base_url")) for index, entry in enumerate(entries)
    )
    check_list(endpoints, path)
    return endpoints


def _endpoint(
    written: ModelEntry, url: str | None, arguments: ServerArguments, path: tuple[str, ...]
) -> Endpoint | None:
    """Where the one server listens; None: on a Unix socket that the gateway chooses."""
    where = json_path(*path, "endpoints", "base_url")
    launched = written.command is not None
    if launched and arguments.uds is not None:
        if url is None:
            return unix_endpoint(_socket(arguments.uds, path))
        if arguments.is_vllm and written.verify_listener:
            problem = "args says --uds, so vLLM listens on no port"
            raise ConfigError("port_mismatch", problem, path=where, remedy="leave base_url out, or --uds")
    stated = _port(arguments.port, path, strict=arguments.is_vllm) if launched else None
    port = stated if arguments.port is not None else arguments.default_port
    if url is None:
        if launched and arguments.takes_a_socket and written.verify_listener:
            return None
        return _derived(arguments.host.value if arguments.host else None, port, where, launched=launched)
    endpoint = _parsed(url, where)
    if launched and written.verify_listener and port is not None and endpoint.port != port:
        says = f"says port {port}" if arguments.port is not None else f"has no --port, so vLLM listens on {port}"
        remedy = "write one port in both places (where a launcher such as docker maps it: verify_listener false)"
        raise ConfigError("port_mismatch", f"the port is {endpoint.port}, but args {says}", path=where, remedy=remedy)
    return endpoint


def _parsed(url: str, where: str) -> Endpoint:
    try:
        return parse_base_url(url)
    except ConfigError as error:
        raise ConfigError(error.code, error.problem, remedy=error.remedy, path=where) from None


def _derived(host: str | None, port: int | None, where: str, *, launched: bool) -> Endpoint:
    if port is None:
        problem = "nothing says where the server listens" if launched else "is required without a command"
        raise ConfigError("invalid_base_url", problem, path=where, remedy="write it like http://localhost:8001/v1")
    try:
        return local_endpoint(host, port)
    except ConfigError:
        problem = "cannot be derived from --host in args"
        raise ConfigError(
            "invalid_base_url", problem, path=where, remedy="write it like http://localhost:8001/v1"
        ) from None


def _socket(option: Option, path: tuple[str, ...]) -> str:
    """The path after ``--uds``: absolute, since it has to be found among the listeners as it was bound."""
    text = option.value or ""
    if text.startswith("/") and text.isprintable() and len(text.encode()) <= LONGEST_SOCKET:
        return text
    problem = f"--uds needs an absolute path of at most {LONGEST_SOCKET} bytes"
    remedy = 'write "--uds", "/run/user/1000/vllm.sock", or leave it out: the gateway chooses one'
    raise ConfigError("invalid_args", problem, path=json_path(*path, "args", option.index), remedy=remedy)


def _port(option: Option | None, path: tuple[str, ...], *, strict: bool) -> int | None:
    """The number after ``--port``; another program's ``--port`` may mean something else and is left to it."""
    if option is None:
        return None
    text = option.value or ""
    if text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= 65535:
        return int(text)
    if not strict and not text.lstrip("-").isdigit():
        return None
    problem = "--port needs a number from 1 to 65535" + (" (0 cannot be discovered)" if text == "0" else "")
    where = json_path(*path, "args", option.index)
    raise ConfigError(
        "invalid_args", problem, path=where, remedy='write "--port", "8001"; variables are not expanded in args'
    )
