"""The two programs: `train.py` and `validate.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from .config import Parsed, parse, to_yaml
from .errors import run_command
from .runtime import World, join, run_processes
from .train_config import TrainConfig
from .trainer import Trainer
from .validation import ValidateConfig, plan, read_settings, validate_models

Config = TypeVar("Config", TrainConfig, ValidateConfig)


def train(argv: Sequence[str]) -> int:
    """Run `train.py`.

    Args:
        argv: The command line without the program.

    Returns:
        The exit code, see `errors`.
    """

    def parse_command() -> Parsed[TrainConfig]:
        return parse(TrainConfig, argv, program="train.py")

    return _run(parse_command, "--print-config" in argv, lambda p, world: Trainer(p, world).run())


def validate(argv: Sequence[str]) -> int:
    """Run `validate.py`.

    Args:
        argv: The command line without the program.

    Returns:
        The exit code, see `errors`.
    """

    commands: list[list[str]] = []

    def parse_command() -> Parsed[ValidateConfig]:
        commands.extend(plan(argv))
        one = commands[0] if len(commands) == 1 else None
        return read_settings(one) if one else parse(ValidateConfig, argv, program="validate.py")

    show = "--print-config" in argv
    return _run(parse_command, show, lambda _, world: validate_models(commands, world))


def _run(
    parse_command: Callable[[], Parsed[Config]],
    print_only: bool,
    program: Callable[[Parsed[Config], World], None],
) -> int:
    parsed: list[Parsed[Config]] = []
    code = run_command(lambda: parsed.append(parse_command()))
    if code:
        return code
    if print_only:
        print(to_yaml(parsed[0]), end="")
        return 0
    config = parsed[0].config

    def in_world() -> None:
        with join(config.runtime) as world:
            program(parsed[0], world)

    return run_processes(lambda: run_command(in_world), config.runtime, config.data.batch_size)
