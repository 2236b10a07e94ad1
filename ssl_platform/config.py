"""The configuration: strict pydantic sections, plug-in sections by folder, YAML plus `key=value`, all errors at once."""

import difflib
import importlib
import json
import os
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo

from ssl_platform import plain_yaml
from ssl_platform.location import Url, is_url, local


class ConfigError(Exception):
    """Everything that is wrong with a configuration, one readable line each."""

    def __init__(self, lines: Sequence[str], source: str = "") -> None:
        self.lines = list(lines)
        heading = [f"{source}: {len(self.lines)} problem{'s' * (len(self.lines) != 1)} in the configuration"]
        super().__init__("\n".join(heading * bool(source) + [f"  {line}" for line in self.lines]))


class Config(BaseModel):
    """A section of the configuration: unknown keys are errors, values are never converted, objects never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class PluginConfig(Config):
    """A section whose `name` picks the file that implements it; its `build()` makes the object."""

    name: str


class _PluginFolder:
    """Marks a field as a plug-in section, so that error messages can look its keys up."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __call__(self, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, PluginConfig):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError(f"needs a 'name': one of {', '.join(plugin_names(self.package))}, or a dotted module path")
        # JSON mode: strict validation of Python objects would refuse YAML's lists where a tuple is meant.
        return plugin_class(self.package, value["name"]).model_validate_json(json.dumps(value), context=info.context)


def plugin(package: str) -> Any:
    """The type of a field that holds a plug-in section of `package` (`ssl_platform.modalities`, ...)."""
    return Annotated[SerializeAsAny[PluginConfig], BeforeValidator(_PluginFolder(package))]


def plugin_names(package: str) -> list[str]:
    """The plug-ins of a folder: its modules that do not start with an underscore."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def plugin_class(package: str, name: str) -> type[PluginConfig]:
    """The class `Config` of the module `package.name`, or of the module that the dotted path `name` says."""
    if "." not in name and name not in plugin_names(package):
        raise ValueError(f"unknown name '{name}'{_suggest(name, plugin_names(package))}")
    module_name = name if "." in name else f"{package}.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise ValueError(f"'{name}' needs the package '{error.name}', which is not installed") from error
        raise ValueError(f"no module '{module_name}' (looked for in sys.path)") from error
    if not hasattr(module, "Config"):
        raise ValueError(f"module '{module_name}' has no class 'Config', so it is not a plug-in")
    found: type[PluginConfig] = module.Config
    return found


# -- reading ---------------------------------------------------------------------------------------------------------


AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(kind: type[AnyConfig], path: Path, overrides: Sequence[str] = (), **context: Any) -> AnyConfig:
    """Reads a YAML file, applies `a.b=value` overrides and validates; raises ConfigError with every problem found.

    Relative paths in the file are relative to the file; those in overrides are relative to the working directory.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})"]) from error
    try:
        data = plain_yaml.parse(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {error}"], str(path)) from error
    if not isinstance(data, dict):
        raise ConfigError([f"expected a map of keys, found {type(data).__name__}"], str(path))
    data = resolve_paths(kind, _without_aliases(data, str(path)), path.resolve().parent)
    lines = []
    for override in overrides:
        try:
            _override(kind, data, override)
        except ConfigError as error:
            lines += error.lines
    try:
        config = validate(kind, data, str(path), **context)
    except ConfigError as error:
        raise ConfigError(lines + error.lines, str(path)) from None
    if lines:
        raise ConfigError(lines, str(path))
    return config


def _without_aliases(data: dict[str, Any], source: str) -> dict[str, Any]:
    """A copy in which nothing is shared, as YAML's anchors do, so that an override changes one place alone."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError([f"a value is of a kind that a configuration cannot hold: {error}"], source) from error
    return copy


def validate(kind: type[AnyConfig], data: dict[str, Any], source: str = "", **context: Any) -> AnyConfig:
    """Validates plain data; `context` reaches validators as `info.context`."""
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"a value is of a kind that a configuration cannot hold: {error}"], source) from error
    try:
        return kind.model_validate_json(text, context=context)
    except ValidationError as error:
        lines = _lines(error, kind, data)
        unknown = [item["loc"] for item in error.errors(include_url=False) if item["type"] == "extra_forbidden"]
        if len(unknown) == error.error_count():  # without those keys, sections can be checked against each other
            try:
                kind.model_validate_json(json.dumps(_without(data, unknown)), context=context)
            except ValidationError as other:
                lines += _lines(other, kind, data)
        raise ConfigError(lines, source) from None


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` accepts."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve_paths(kind: type[Config], data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Makes every `Path` field of `kind` (in lists, sub-sections and plug-ins too) relative to `folder`."""
    resolved = dict(data)
    for key, field in kind.model_fields.items():
        value = data.get(key)
        urls = _holds(Url, field.annotation)
        if isinstance(value, str) and _holds(Path, field.annotation):
            resolved[key] = _under(folder, value, urls)
        elif isinstance(value, list) and _holds(Path, field.annotation):
            resolved[key] = [_under(folder, item, urls) if isinstance(item, str) else item for item in value]
        elif isinstance(value, dict) and (inner := _section(field, value)) is not None:
            resolved[key] = resolve_paths(inner, value, folder)
        elif isinstance(value, dict):  # a map of sections
            resolved[key] = {
                name: resolve_paths(inner, item, folder)
                if isinstance(item, dict) and (inner := _section(field, item, of_map=True))
                else item
                for name, item in value.items()
            }
    return resolved


def _under(folder: Path, path: str, urls: bool) -> str:
    """A path of the file's folder, without `..`: it is shown in logs and kept in the saved configuration."""
    if urls and is_url(path):
        return path
    return os.path.normpath(folder / Path(local(path) if urls else path).expanduser())


def _override(kind: type[Config], data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError([f"override '{override}': expected key=value, for example optim.lr=1e-3"])
    try:
        value = plain_yaml.parse(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"override '{override}': the value is not valid YAML: {error}"]) from error
    *parents, last = key.split(".")
    place = data
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        if isinstance(place[parent], str):  # a plug-in section in its short form, `modality: image`
            place[parent] = {"name": place[parent]}
        if not isinstance(place[parent], dict):
            raise ConfigError([f"override '{override}': '{parent}' holds a value, not a section"])
        place = place[parent]
    place[last] = value
    data.update(resolve_paths(kind, data, Path.cwd()))


# -- error text ------------------------------------------------------------------------------------------------------


def _lines(error: ValidationError, kind: type[Config], data: Any) -> list[str]:
    lines: list[str] = []
    for item in error.errors(include_url=False):
        loc = tuple(part for part in item["loc"] if not _is_branch(part))
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ValueError) and cause.args and isinstance(cause.args[0], ConfigError):
            cause = cause.args[0]
        if isinstance(cause, ConfigError):
            lines += [".".join([*map(str, loc), line]) for line in cause.lines]  # each line begins with a key
        elif item["type"] == "extra_forbidden":
            lines.append(f"{_join(loc)}: unknown key{_suggest(str(loc[-1]), _known_keys(kind, data, loc[:-1]))}")
        elif item["type"] == "missing":
            lines.append(f"{_join(loc)}: missing, and it has no default")
        elif item["type"] == "value_error":
            lines.append(f"{_join(loc)}: {cause}" if loc else str(cause))
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{_join(loc)}: {message}, got {json.dumps(item['input'], default=str)}")
    return list(dict.fromkeys(lines))


def _without(data: dict[str, Any], places: Sequence[tuple[str | int, ...]]) -> dict[str, Any]:
    """A copy of the data without the keys at these places."""
    copied: dict[str, Any] = json.loads(json.dumps(data))
    for place in places:
        *parents, last = [str(part) for part in place if not _is_branch(part)]
        section = copied
        for parent in parents:
            section = section[parent]
        del section[last]
    return copied


def _is_branch(part: str | int) -> bool:
    """pydantic puts the name of a union's branch into the location; users never wrote that."""
    return isinstance(part, str) and (
        part in {"float", "int", "bool", "str", "none"} or part[:1] == "<" or "[" in part or part[:1].isupper()
    )


def _join(loc: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in loc)


def _known_keys(kind: type[Config], data: Any, path: tuple[str | int, ...]) -> list[str]:
    """The keys of the section at `path`, found by walking the types along the data."""
    parts = [str(part) for part in path]
    while parts:
        key = parts.pop(0)
        data, field = data.get(key) if isinstance(data, dict) else None, kind.model_fields.get(key)
        if field is None:
            return []
        inner = _section(field, data)
        if inner is None and parts:  # a map of sections: one more step
            key = parts.pop(0)
            data = data.get(key) if isinstance(data, dict) else None
            inner = _section(field, data, of_map=True)
        if inner is None:
            return []
        kind = inner
    return list(kind.model_fields)


def _suggest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def _section(field: FieldInfo, value: Any, of_map: bool = False) -> type[Config] | None:
    """The class that validates `value` in a field such as `X`, `X | None`, a schedule, a plug-in; or in a map of them."""
    return _class_in(field.annotation, field.metadata, value, of_map)


def _class_in(annotation: Any, metadata: Sequence[Any], value: Any, of_map: bool) -> type[Config] | None:
    for item in metadata:
        folder = getattr(item, "func", None)
        if isinstance(folder, _PluginFolder):
            name = value.get("name") if isinstance(value, dict) else value
            try:
                return None if of_map else plugin_class(folder.package, str(name))
            except ValueError:
                return None
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _class_in(arguments[0], arguments[1:], value, of_map)
    if origin is dict:
        return _class_in(arguments[1], (), value, False) if of_map else None
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return None if of_map else annotation
    found = [inner for argument in arguments if (inner := _class_in(argument, (), value, of_map)) is not None]
    if len(found) > 1 and isinstance(value, dict):  # a union whose members one key tells apart
        found = [kind for kind in found if any(_allows(kind, key, value[key]) for key in value)]
    return found[0] if found else None


def _allows(kind: type[Config], key: str, value: Any) -> bool:
    field = kind.model_fields.get(key)
    return field is not None and get_origin(field.annotation) is Literal and value in get_args(field.annotation)


def _holds(kind: type, annotation: Any) -> bool:
    return annotation is kind or any(_holds(kind, argument) for argument in get_args(annotation))
