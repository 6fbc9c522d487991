"""Settings: one dataclass per component, merged from defaults, YAML recipes and the command line.

A schema is a dataclass whose fields are groups, each a dataclass of `option`s. A setting is written
`group.key` in full; `key` alone is enough on the command line, where every key has its flag:
`optim.weight_decay` is `--weight-decay`. The `name` of a group has the flag of the group:
`model.name` is `--model`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from .errors import UsageError

Schema = TypeVar("Schema")


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    choices: Sequence[str] = (),
    may_change: bool = False,
) -> Any:
    """Declare a setting of a group.

    Args:
        default: Its value when nobody sets it.
        help: One line for `--help`.
        flag: Its name on the command line, where that of the field says too little.
        choices: The allowed values, all when empty.
        may_change: A resumed run may use another value, because no result depends on it.
    """
    metadata = {"help": help, "alias": flag, "choices": tuple(choices), "may_change": may_change}
    return field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    """Raise `UsageError(message)` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True)
class Setting:
    """One key of a schema: where it lives, and what it accepts."""

    group: str
    name: str
    type: Any
    default: Any
    help: str
    alias: str
    choices: tuple[str, ...]
    may_change: bool

    @property
    def key(self) -> str:
        """The full name, `group.key`."""
        return f"{self.group}.{self.name}"

    @property
    def short(self) -> str:
        """The name without its group; a group's `name` is called as the group."""
        return self.alias or (self.group if self.name == "name" else self.name)

    @property
    def flag(self) -> str:
        """The command line flag."""
        return "--" + self.short.replace("_", "-")


@dataclass(frozen=True)
class Parsed(Generic[Schema]):
    """A merged configuration, and where each value came from."""

    config: Schema
    origins: dict[str, str]


def settings(schema: type) -> dict[str, Setting]:
    """Every setting of `schema` by its full name."""
    found = {}
    for group, group_type in typing.get_type_hints(schema).items():
        hints = typing.get_type_hints(group_type)
        for item in dataclasses.fields(group_type):
            setting = Setting(group, item.name, hints[item.name], item.default, **item.metadata)
            found[setting.key] = setting
    return found


def parse(
    schema: type[Schema],
    argv: Sequence[str],
    *,
    program: str,
    base: Mapping[str, Any] | None = None,
) -> Parsed[Schema]:
    """Merge the defaults, `base`, the recipes from left to right, and the command line.

    Args:
        schema: The dataclass of groups.
        argv: Recipes (`*.yaml`), `group.key=value` pairs and flags.
        program: What the help text calls the program.
        base: Full names and values that lie above the defaults, e.g. from a run folder.

    Raises:
        UsageError: An unknown key, flag or recipe, with the nearest valid names; a wrong value.
    """
    known = settings(schema)
    recipes, overrides = _read_command_line(known, argv, program)
    layers = [("run folder", dict(base or {}))]
    layers += [(Path(name).name, read_recipe(name, known)) for name in recipes]
    layers += [("command line", overrides)]
    values = {key: setting.default for key, setting in known.items()}
    origins = dict.fromkeys(known, "default")
    for origin, layer in layers:
        for key, value in layer.items():
            values[key] = _convert(known[key], value)
            origins[key] = origin
    return Parsed(_assemble(schema, values), origins)


def read_recipe(name: str | Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """The settings of a YAML file by full name.

    Args:
        name: Path of the file.
        known: The settings of the schema.

    Raises:
        UsageError: No such file, not a mapping of groups, or an unknown key.
    """
    path = Path(name)
    if not path.is_file():
        near = _nearest(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise UsageError(f"no recipe {path}{near}")
    try:
        groups = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    pairs = list(_recipe_pairs(path, groups))
    return {_find(key, known, f" in {path}").key: value for key, value in pairs}


def to_dict(config: Any) -> dict[str, dict[str, Any]]:
    """The configuration as plain groups of values, tuples as lists: what YAML and JSON can hold."""
    groups = dataclasses.asdict(config)
    return {
        group: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for group, values in groups.items()
    }


def to_yaml(parsed: Parsed[Any]) -> str:
    """The merged configuration as a recipe, with the origin of each value as a comment."""
    lines = []
    for group, values in to_dict(parsed.config).items():
        lines.append(f"{group}:")
        for name, value in values.items():
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
            text = text.removesuffix("\n...\n").strip()
            lines.append(f"  {name + ': ' + text:<41} # {parsed.origins[f'{group}.{name}']}")
    return "\n".join(lines) + "\n"


def _recipe_pairs(path: Path, groups: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(groups, dict):
        raise UsageError(f"{path} must hold groups such as `optim: {{lr: 1e-3}}`")
    for group, values in groups.items():
        if not isinstance(values, dict):
            raise UsageError(
                f"{path}: `{group}` must hold settings such as `{group}: {{key: value}}`"
            )
        yield from ((f"{group}.{name}", value) for name, value in values.items())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message} (see --help)")


def _read_command_line(
    known: Mapping[str, Setting], argv: Sequence[str], program: str
) -> tuple[list[str], dict[str, Any]]:
    values, unknown = _parser(known, program).parse_known_intermixed_args(argv)
    given = vars(values)
    for extra in unknown:
        near = _nearest(extra.split("=")[0], [s.flag for s in known.values()])
        raise UsageError(f"unknown argument {extra}{near}")
    given.pop("print_config", None)
    recipes: list[str] = given.pop("recipe", [])
    overrides: dict[str, Any] = {}
    for word in given.pop("settings"):
        key, equals, value = word.partition("=")
        if equals:
            overrides[_find(key, known).key] = value
        else:
            recipes.append(word)
    return recipes, overrides | given


def _parser(known: Mapping[str, Setting], program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
        usage=f"{program} [recipe.yaml ...] [group.key=value ...] [--key value ...]",
    )  # fmt: skip
    parser.add_argument("settings", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--recipe", action="append", metavar="FILE", help="a YAML recipe")
    parser.add_argument("--print-config", action="store_true", help="show the settings and stop")
    groups: dict[str, Any] = {}
    for key, setting in known.items():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        shown = "" if setting.default in (None, "") else f" [{setting.default}]"
        text = setting.help.replace("%", "%%") + shown
        if setting.type is bool:
            groups[setting.group].add_argument(
                setting.flag, dest=key, action=argparse.BooleanOptionalAction, help=text
            )
        else:
            metavar = "|".join(setting.choices) or setting.name.upper()
            groups[setting.group].add_argument(setting.flag, dest=key, metavar=metavar, help=text)
    return parser


def _find(key: str, known: Mapping[str, Setting], where: str = "") -> Setting:
    if key in known:
        return known[key]
    for setting in known.values():
        if key == setting.short:
            return setting
    names = list(known) + [s.short for s in known.values()]
    raise UsageError(f"unknown setting {key}{where}{_nearest(key, names)}")


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _convert(setting: Setting, value: Any) -> Any:
    kind = setting.type
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
    try:
        result = _as_type(kind, value)
    except (TypeError, ValueError):
        wanted = getattr(kind, "__name__", str(kind))
        raise UsageError(f"{setting.key} ({setting.flag}) takes {wanted}, not {value!r}") from None
    if setting.choices and result not in setting.choices:
        raise UsageError(
            f"{setting.key} must be one of {', '.join(setting.choices)}, not {value!r}"
        )
    return result


def _as_type(kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(_as_type(typing.get_args(kind)[0], part) for part in parts)
    if isinstance(value, str) and kind is bool:
        value = {"true": True, "false": False}.get(value.lower(), value)
    # YAML reads 1e-3 as text and 1 as an integer
    fits = type(value) is kind or isinstance(value, str) or (kind is float and type(value) is int)
    if not fits or (kind is bool and isinstance(value, str)):
        raise ValueError(value)
    return kind(value)


def _assemble(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    groups = {}
    for group, group_type in typing.get_type_hints(schema).items():
        names = [item.name for item in dataclasses.fields(group_type)]
        groups[group] = group_type(**{name: values[f"{group}.{name}"] for name in names})
    return schema(**groups)
