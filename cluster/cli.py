"""`expertmesh`: the command line. Commands import what they need when they run, so that `--help` is instant."""

from __future__ import annotations

import errno
import inspect
import json
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from rich.console import Console
from typer.core import TyperGroup

from cluster.analyze.command import analyze
from cluster.bench.lazy import LazyGroup
from cluster.chaos.command import app as chaos_app
from cluster.config_load import FIELDS, HINTS, Loaded, flag, load
from cluster.errors import ExpertMeshError
from cluster.fleet.operator_cli import ask, drain, placement, rebalance, scale
from cluster.generate import generate
from cluster.models.cli import app as model_app
from cluster.plan.command import plan
from cluster.process_setup import set_up
from cluster.state_dir import VARIABLE, settle

Port = Annotated[int | None, typer.Option(help="of the gateway, when several clusters run")]
StateDir = Annotated[Path | None, typer.Option(help="as given to `serve`", envvar=VARIABLE)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@contextmanager
def _safe_path() -> Iterator[None]:
    """What is started meanwhile does not import from whatever directory this was started in."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


class _OneLineErrors(TyperGroup):
    """An error made on purpose, or of the system (a full disk), ends the command with one line and exit code 1."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        set_up()
        return super().main(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _safe_path():
                return super().invoke(ctx)
        except ExpertMeshError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has left
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serving for mixture-of-experts models in which the experts are a service of their own.",
)


def takes_configuration(command: Callable[..., None]) -> Callable[..., None]:
    """Turn `command(loaded, **others)` into one that has an option for every field of the configuration.

    The fields are the one source: name, type, default and help come from `Config`.
    """

    def run(model: str | None, config: Path | None, **values: Any) -> None:
        given = {name: values.pop(name) for name in FIELDS if name != "model"}
        loaded = load({"model": model, **given}, os.environ, config)
        for note in loaded.notes:
            typer.echo(f"note: {note}", err=True)
        settle(os.environ, loaded.config.state_dir)
        command(loaded, **values)

    optional = [_parameter(name) for name in FIELDS if name != "model"]
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    model = typer.Argument(help=f"{FIELDS['model'].metadata['help']}  [default: {FIELDS['model'].default}]")
    config = typer.Option(help="YAML file with any of these options", envvar="EXPERTMESH_CONFIG")
    parameters = [
        inspect.Parameter(
            "model", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, model]
        ),
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config]
        ),
        *optional,
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
    ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str) -> inspect.Parameter:
    field, hint = FIELDS[name], HINTS[name]
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    spelling = f"{flag(name)}/--no-{flag(name)[2:]}" if hint is bool else flag(name)
    shown = "" if field.default is None or hint is bool else f"  [default: {field.default}]"
    # The environment is read by `load`, which knows where a value came from.
    option = typer.Option(spelling, help=field.metadata["help"] + shown, show_default=False)
    annotation = Annotated[hint | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@app.command()
@takes_configuration
def serve(loaded: Loaded) -> None:
    """Serve a model in the foreground until Ctrl-C."""
    from cluster.fleet.serve import serve

    serve(loaded.config, Console(soft_wrap=True))


@app.command()
def status(
    port: Port = None,
    state_dir: StateDir = None,
    as_json: Json = False,
    live: Annotated[bool, typer.Option("--watch", help="workers, load and events, live, until Ctrl-C")] = False,
) -> None:
    """Show the processes of the running cluster."""
    settle(os.environ, state_dir)
    from cluster.fleet.snapshot import read
    from cluster.fleet.status import show
    from cluster.fleet.status_watch import watch

    content = read(port)
    if live:
        path = "/observation?known_epoch={}&known_event={}"
        title = f"{content['model']} at {content['url']}"
        watch(title, lambda epoch, event: ask("GET", path.format(epoch, event), port), Console())
    elif as_json:
        typer.echo(json.dumps(content))
    else:
        show(content, Console(soft_wrap=True))


@app.command()
def stop(
    port: Port = None,
    state_dir: StateDir = None,
    timeout_s: Annotated[float, typer.Option(help="how long to wait for open requests and the end")] = 60.0,
    ray_address: Annotated[
        str | None, typer.Option(help="end what a `serve --ray-address` that was killed left behind in that Ray")
    ] = None,
) -> None:
    """End the running cluster: open requests finish, then every process goes."""
    settle(os.environ, state_dir)
    if ray_address is not None:
        from cluster.fleet.local_ray import clear

        typer.echo(clear(ray_address))
        return
    from cluster.fleet.status import stop

    typer.echo(stop(port, timeout_s))


@app.command()
@takes_configuration
def config(loaded: Loaded, as_json: Json = False) -> None:
    """Print the effective configuration, and where each value came from."""
    values = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(loaded.config).items()}
    if as_json:
        rows = {name: {"value": value, "origin": loaded.origins[name]} for name, value in values.items()}
        typer.echo(json.dumps(rows))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        shown = "" if value is None else str(value).lower() if isinstance(value, bool) else value
        typer.echo(f"{name + ':':{width + 1}} {shown!s:24} # {loaded.origins[name]}")


app.command()(generate)
app.command()(analyze)
app.command()(plan)
app.command()(rebalance)
app.command()(scale)
app.command()(drain)
app.add_typer(placement, name="placement")
app.add_typer(model_app, name="model")
app.add_typer(chaos_app, name="chaos")
app.add_typer(typer.Typer(cls=LazyGroup, no_args_is_help=True, help="Measure a running cluster."), name="bench")
