"""The ``vlmkernels`` command: info, train, eval, embed, search."""

from __future__ import annotations

import dataclasses
import logging
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from vlmkernels.train.config import OBJECTIVES, TrainConfig, field_types, read_config, shipped_configs

MODEL_HELP = "Folder of a trained model, such as RUN/final."


class _Echo(logging.Handler):
    """Log records as lines on standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with tqdm.external_write_mode(file=sys.stderr):
            click.echo(prefix + record.getMessage(), err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="vlmkernels")
def commands() -> None:
    """Fused kernels for vision-language models, and models trained with them."""


@commands.command()
def info() -> None:
    """Show which implementation of every op runs on each device here, and why a faster one does not."""
    import vlmkernels

    click.echo(str(vlmkernels.info()))


def _train_options(command: Callable) -> Callable:
    """One flag per field of TrainConfig; a flag that is not given leaves the configuration file's value."""
    types = field_types()
    for field in reversed(dataclasses.fields(TrainConfig)):
        flag = "--" + field.name.replace("_", "-")
        hint = types[field.name]
        scalars = [kind for kind in (hint, *typing.get_args(hint)) if kind in (bool, int, float, str)]
        default = None if field.default is dataclasses.MISSING else field.default
        text = field.metadata["help"]
        if default is not None:
            text += f"  [default: {str(default).lower() if isinstance(default, bool) else default}]"
        if typing.get_origin(hint) is dict:
            option = click.option(flag, field.name, metavar="YAML", help=text)
        elif scalars[0] is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=text)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[scalars[0]]
            option = click.option(flag, field.name, type=scalars[0], metavar=metavar, help=text)
        command = option(command)
    return command


@commands.command(
    epilog="Configurations that come with the package: "
    + ", ".join(shipped_configs())
    + ". On several processes: "
    "accelerate launch -m vlmkernels train ..., or torchrun -m vlmkernels train ..."
)
@click.argument("kind", type=click.Choice(OBJECTIVES))
@click.option(
    "--config",
    metavar="FILE",
    help="YAML file with the fields below, or the name of a configuration listed at the end.",
)
@_train_options
def train(kind: str, config: str | None, **flags: Any) -> None:
    """Train CLIP (softmax loss), ALIGN or SigLIP (CLIP's towers, sigmoid loss).

    Writes the run folder: config.yaml, metrics.jsonl, TensorBoard events, checkpoints/ and final/, the model
    that eval, embed and search take. A run that was stopped continues, bit for bit, with --out RUN --resume
    auto.
    """
    from vlmkernels.train import train as run

    given = {name: value for name, value in flags.items() if value is not None}
    values = read_config(config) if config is not None else _earlier_config(given)
    summary = run(kind, TrainConfig(**{**values, **given}))
    click.echo(
        f"{summary.steps} steps, loss {summary.loss:.4f}, in-batch R@1 {summary.retrieval_at_1:.3f}, "
        f"{summary.seconds:.1f} s, {summary.pairs_per_second:.0f} pairs/s\nmodel: {summary.final}"
    )


def _earlier_config(given: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run that is resumed, so that it need not be given again; else nothing."""
    resume = given.get("resume")
    if resume is None:
        return {}
    run = Path(given.get("out", "")) if resume == "auto" else Path(resume).absolute().parent.parent
    stored = run / "config.yaml"
    return (
        {name: value for name, value in read_config(stored).items() if name != "out"}
        if stored.is_file()
        else {}
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0, 1 for an error while running, 2 for wrong use, 130 when interrupted."""
    logger = logging.getLogger("vlmkernels")
    if not any(isinstance(handler, _Echo) for handler in logger.handlers):
        logger.addHandler(_Echo())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        commands.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except (ValueError, KeyError, FileNotFoundError, FloatingPointError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        click.echo(f"Error: {message}", err=True)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
