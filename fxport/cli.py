"""The command line: ``fxport port``, ``explain``, ``verify`` and ``diff``.

Exit status: 0 done, 1 refused or failed (reasons on stderr), 2 wrong usage. Heavy imports wait
until the arguments have been checked.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fxport.api import Port
    from fxport.diff.command import Side

__all__ = ["main"]

_REFUSED = "the model cannot be ported\n\n"
_WEIGHTS_HELP = "Load these weights (a .safetensors file) into what the factory returns."


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fxport")
def main() -> None:
    """Port plain PyTorch language models to vLLM: proven equal, or refused with the reason."""


_factory = click.argument("factory", metavar="PKG.MOD:FACTORY")
_weights = click.option("--weights", type=click.Path(path_type=Path), help=_WEIGHTS_HELP)


def _model_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """What every command takes that captures a model."""
    options = (
        _factory,
        _weights,
        click.option(
            "--max-seq-len",
            type=click.IntRange(min=1),
            help="Longest sequence to serve.  [default: the longest the model allows]",
        ),
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@main.command()
@_model_arguments
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Made by this command.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Copy a tokenizer's files.")
def port(
    factory: str, out: Path, weights: Path | None, tokenizer: Path | None, max_seq_len: int | None
) -> None:
    """Port a model and save it where vLLM can serve it.

    PKG.MOD:FACTORY names a function or class that takes no arguments and gives the model, or the
    model itself. Of a forward that needs more than the token ids it gives (model, arguments): one
    call as a tuple. The current directory is on the path.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise click.BadParameter(
            f"{out} exists already; choose another directory or remove it", param_hint="--out"
        )
    if tokenizer is not None and not tokenizer.is_dir():
        raise click.BadParameter(f"{tokenizer} is no directory", param_hint="--tokenizer")
    with _stages(3) as stage, _refusals():
        ported = _port(factory, weights, max_seq_len, stage)
        stage("saving")
        ported.save(out, tokenizer=tokenizer)
    click.echo(str(ported.report))
    click.echo(f"\nSaved: vllm serve {out}")


@main.command()
@_model_arguments
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def explain(factory: str, weights: Path | None, max_seq_len: int | None, as_json: bool) -> None:
    """Say what a port would do with a model, and everything in its way; writes nothing."""
    with _stages(2) as stage, _refusals():
        model = _prepared(factory, weights, stage)
        from fxport.errors import PortError
        from fxport.explain_serving import explain_serving

        explanation = explain_serving(model, max_seq_len)
    click.echo(
        json.dumps(explanation.to_dict(), indent=2, allow_nan=False)
        if as_json
        else str(explanation)
    )
    if explanation.obstacles:
        _fail(f"{_REFUSED}{PortError(explanation.obstacles)}")


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_factory
@_weights
@click.option("--new-tokens", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random prompts.")
@click.option("--no-engine", is_flag=True, help="Leave the vLLM engine out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def verify(
    directory: Path,
    factory: str,
    weights: Path | None,
    new_tokens: int,
    seed: int,
    no_engine: bool,
    as_json: bool,
) -> None:
    """Compare a saved port with its model: weights, graph, trainable module, vLLM engine.

    Exit status: 0 equal, 1 different; the first operation that differs is named.
    """
    with _stages(2) as stage, _refusals():
        model = _prepared(factory, weights, stage)
        stage("running the port in every way")
        import fxport

        result = fxport.verify(
            model, directory, new_tokens=new_tokens, seed=seed, engine=not no_engine
        )
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    if not result:
        _fail(f"{directory} is not {factory}")


@main.command()
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option("--json", "how", flag_value="json", help="Print JSON instead of a table.")
@click.option("--text", "how", flag_value="text", help="Print a unified diff.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the body's page here.")
def diff(one: str, other: str, how: str | None, html: Path | None) -> None:
    """Compare two saved ports, or two models given as PKG.MOD:FACTORY.

    Exit status: 0 the same, 1 different (or not comparable), 2 wrong usage.
    """
    with _refusals():
        from fxport.diff.command import compare, other_differences, rendered

        sides = [_side(one), _side(other)]
        diffs, others = compare(*sides), other_differences(*sides)
        click.echo(rendered(diffs, others, how or "table"))
        if html is not None:
            diffs["body"].to_html(html)
    if others or any(diffs.values()):
        sys.exit(1)


def _side(given: str) -> Side:
    from fxport.diff.command import Side, read_side

    if Path(given).is_dir():
        return read_side(Path(given))
    if ":" not in given:
        raise click.BadParameter(f"{given!r} is neither a directory nor pkg.mod:factory")
    from fxport.capture.export import capture

    return Side({"body": capture(_make_model(given)).graph}, {}, None)


def _port(
    spec: str, weights: Path | None, max_seq_len: int | None, stage: Callable[[str], None]
) -> Port:
    model, inputs = _prepared_with_inputs(spec, weights, stage)
    import fxport

    return fxport.port(model, inputs, max_seq_len=max_seq_len)


def _prepared(spec: str, weights: Path | None, stage: Callable[[str], None]) -> nn.Module:
    """The model with its weights; the next stage is named."""
    return _prepared_with_inputs(spec, weights, stage)[0]


def _prepared_with_inputs(
    spec: str, weights: Path | None, stage: Callable[[str], None]
) -> tuple[nn.Module, tuple[Any, ...] | None]:
    if weights is not None:
        _check_weights_file(weights)
    stage(f"making {spec}")
    model, inputs = _make(spec)
    if weights is not None:
        _load_weights(model, weights)
    stage("capturing and proving")
    return model, inputs


# --- errors and progress ----------------------------------------------------------------


def _fail(message: str) -> NoReturn:
    """Exit 1 with one message."""
    raise click.ClickException(message)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns what fxport raises on purpose, and a disk's refusal, into exit 1 and a message."""
    from fxport.errors import FxportError, PortError

    try:
        yield
    except PortError as error:
        _fail(f"{_REFUSED}{error}")
    except (FxportError, OSError) as error:
        _fail(str(error))


@contextlib.contextmanager
def _stages(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, where that is a terminal; the function names the next stage."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        file=sys.stderr,
        disable=None,  # shown on a terminal only
        leave=False,
        bar_format="{desc} [{n}/{total}, {elapsed}]",
    ) as bar:
        started = False

        def next_stage(name: str) -> None:
            nonlocal started
            bar.update(int(started))
            started = True
            bar.set_description_str(name)

        yield next_stage


# --- the user's model ----------------------------------------------------------------


def _make_model(spec: str) -> nn.Module:
    return _make(spec)[0]


def _make(spec: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """The model that ``pkg.mod:factory`` names, and the call of it that the factory shows.

    Raises:
        click.BadParameter: no such module or attribute.
        click.ClickException: the user's code raised, or gave something else than a module.
    """
    from torch import nn

    found = _lookup(spec)
    if isinstance(found, nn.Module):
        return found, None
    if not callable(found):
        _fail(f"{spec} is {_kind(found)}, neither a torch.nn.Module nor a function that makes one")
    try:
        made = found()
    except Exception as error:
        _fail(f"{spec}() raised\n{_users_line(error)}")
    inputs = None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], tuple):
        made, inputs = made
    if not isinstance(made, nn.Module):
        _fail(f"{spec}() gave {_kind(made)}, not a torch.nn.Module")
    return made, inputs


def _lookup(spec: str) -> Any:
    module_name, colon, path = spec.partition(":")
    parts = path.split(".")
    if not (colon and module_name and all(part.isidentifier() for part in parts)):
        raise click.BadParameter(
            f"{spec!r} is not of the form pkg.mod:factory", param_hint="PKG.MOD:FACTORY"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current directory, as `python -m` has it
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise click.BadParameter(
                f"there is no module {missing!r} in {Path.cwd()} or among the installed packages",
                param_hint="PKG.MOD:FACTORY",
            ) from None
        _fail(f"importing {module_name} raised\n{_users_line(error)}")
    for part in parts:
        try:
            found = getattr(found, part)
        except AttributeError:
            raise click.BadParameter(
                f"{module_name} ({getattr(found, '__file__', 'no file')}) has no {part!r}",
                param_hint="PKG.MOD:FACTORY",
            ) from None
    return found


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def _users_line(error: BaseException) -> str:
    """File, line, source and message of an exception, from the deepest frame of user code."""
    if isinstance(error, SyntaxError):
        return f"  {error.filename}:{error.lineno}: {error.msg}"
    libraries = ("<", __file__, *(sysconfig.get_path(p) for p in ("stdlib", "purelib", "platlib")))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    where = f"  {own[-1].filename}:{own[-1].lineno}: " if own else "  "
    source = f"\n      {own[-1].line}" if own and own[-1].line else ""
    return f"{where}{type(error).__name__}: {error}{source}"


# --- weights ----------------------------------------------------------------


def _check_weights_file(path: Path) -> None:
    if not path.is_file():
        raise click.BadParameter(f"there is no file {path}", param_hint="--weights")
    if path.suffix != ".safetensors":
        raise click.BadParameter(
            f"{path} is no .safetensors file; other formats can run code when they are read. "
            "Convert it where you trust it: safetensors.torch.save_model(model, FILE)",
            param_hint="--weights",
        )


def _load_weights(model: nn.Module, path: Path) -> None:
    """Strictly: every name and shape must match. One of several tied names is enough."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        given = load_file(path)
    except SafetensorError as error:
        _fail(f"{path} cannot be read: {error}")
    own = model.state_dict(keep_vars=True)
    first_names = _tied(own)
    present = {first_names.get(name, name) for name in given}
    missing = [name for name in own if first_names.get(name, name) not in present]
    unexpected = [name for name in given if name not in own]
    shapes = [
        f"{name}: {list(given[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    tied = [
        f"{first} and {name}"
        for name, first in first_names.items()
        if {name, first} <= given.keys() and not given[name].equal(given[first])
    ]
    problems = [
        *_listed("tied in the model, different in the file", tied),
        *_listed("in the model, not in the file", missing),
        *_listed("in the file, not in the model", unexpected),
        *_listed("of another shape", shapes),
    ]
    if problems:
        hint = _prefix_hint(given)
        _fail("\n".join([f"{path} does not fit {type(model).__name__}", *problems, *hint]))
    model.load_state_dict(given, strict=False)  # names were checked above, ties allowed for


def _tied(own: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names of a tensor -> its first name; tied names share one object."""
    first: dict[int, str] = {}
    names = ((name, first.setdefault(id(tensor), name)) for name, tensor in own.items())
    return {name: other for name, other in names if name != other}


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = [f"    and {len(names) - 6} more"] if len(names) > 6 else []
    return [f"  {len(names)} {what}:", *(f"    {name}" for name in names[:6]), *more]


def _prefix_hint(given: Mapping[str, Tensor]) -> list[str]:
    """Checkpoints of wrapped models (torch.compile, DDP) put a prefix before every name."""
    for prefix in ("_orig_mod.", "module."):
        if given and all(name.startswith(prefix) for name in given):
            return [f"  -> every name begins with {prefix!r}: save the unwrapped model's weights"]
    return []
