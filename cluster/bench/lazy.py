"""The `bench` commands, each imported when it is called, so that `--help` is instant."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

# Command -> what `expertmesh bench --help` says. Module and function have the command's name.
_COMMANDS = {
    "serve": "An open-loop load generator against a running gateway.",
    "gpu": "One GPU: ceilings, decoding and prompts beside the floor and transformers, without Ray.",
    "moves": "Move, replicate and drop experts and scale a running cluster under load and compare every stream.",
    "rebalance": "Tokens per second before and after a rebalance, beside its receipt.",
    "chaos": "Kill processes of a running cluster under load and compare every stream.",
}


class LazyGroup(TyperGroup):
    """A group whose commands are known by name alone until they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What the list of commands shows of it."""
        return _command(cmd_name, lambda: None) if cmd_name in _COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, _command(name, getattr(import_module(f"cluster.bench.{name}"), str(name))), rest


def _command(name: Any, function: Callable[..., None]) -> Any:
    one = typer.Typer(add_completion=False)
    one.command(name, help=_COMMANDS[name])(function)
    return typer.main.get_command(one)
