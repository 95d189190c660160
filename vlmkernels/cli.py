"""The ``vlmkernels`` command: training, evaluation and the use of models."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from vlmkernels import __version__
from vlmkernels._asif_commands import asif
from vlmkernels.data._text import printable
from vlmkernels.train.config import TrainConfig, read_config, settings, shipped_configs
from vlmkernels.train.kinds import KINDS


class _Echo(logging.Handler):
    """Log records as lines on standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        # A log on a full disk does not end the run.
        with contextlib.suppress(OSError), tqdm.external_write_mode(file=sys.stderr):
            click.echo(prefix + printable(record.getMessage()), err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vlmkernels")
def commands() -> None:
    """Fused kernels for vision-language models, and models trained with them."""


commands.add_command(asif)


@commands.command()
def info() -> None:
    """Show which implementation of every op runs on each device here, and why a faster one does not."""
    import vlmkernels

    click.echo(str(vlmkernels.info()))


@commands.command()
def calibrate() -> None:
    """Measure whether torch or the library computes the products of linear layers faster on this machine.

    Writes one file to the user's cache folder, which is read when the library is imported. Takes some
    seconds, during which the machine should be idle. Deleting the file undoes it.
    """
    from vlmkernels import _calibration

    path, stored = _calibration.calibrate()
    for dtype, products in stored["seconds"].items():
        for product, seconds in products.items():
            click.echo(
                f"{dtype} {product}: own {1e3 * seconds['own']:.1f} ms, torch {1e3 * seconds['torch']:.1f} ms"
                f" -> {stored['choice'][dtype][product]}"
            )
    click.echo(str(path))


_allow_pipe = click.option(
    "--allow-pipe",
    is_flag=True,
    help="Allow data to be a URL that runs a program to read tars: pipe: (the shell), http:, gs: and others.",
)


def _train_options(command: Callable) -> Callable:
    """One flag per setting of a run; without a flag the value of the configuration file is used."""
    for name, setting in reversed(settings().items()):
        flag, hint = "--" + name.replace("_", "-"), setting.hint
        scalars = [kind for kind in (hint, *typing.get_args(hint)) if kind in (bool, int, float, str)]
        default, text = setting.default, setting.help
        if default not in (None, {}):
            text += f"  [default: {str(default).lower() if isinstance(default, bool) else default}]"
        if typing.get_origin(hint) is dict:
            option = click.option(flag, name, metavar="YAML", help=text)
        elif scalars[0] is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[scalars[0]]
            option = click.option(flag, name, type=scalars[0], metavar=metavar, help=text)
        command = option(command)
    return command


@commands.command(
    epilog="Configurations that come with the package: "
    + ", ".join(shipped_configs())
    + ". On several processes: "
    "torchrun --nproc-per-node N -m vlmkernels train ... --out RUN"
)
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.option(
    "--config",
    metavar="FILE",
    help="YAML file with the fields below, or the name of a configuration listed at the end.",
)
@_allow_pipe
@_train_options
def train(kind: str, config: str | None, allow_pipe: bool, **flags: Any) -> None:
    """Train CLIP (softmax loss), ALIGN, SigLIP (CLIP's towers, sigmoid loss), a CLIP that learns from a
    trained model (distill, from --teacher), a language model of captions (lm), Flamingo (between the frozen
    --vision and --language-model), SimVLM, VirTex, VisualGPT, VisualBERT or ViLD
    (vild, from the CLIP or ALIGN of --clip).

    Writes the run folder: config.yaml, metrics.jsonl, TensorBoard events, checkpoints/ and final/, the model
    that eval, probe, embed, search, caption and match take. A run that was stopped continues, bit for bit,
    with --out RUN --resume auto.
    """
    from vlmkernels.train import train as run

    given = {name: value for name, value in flags.items() if value is not None}
    values = read_config(config) if config is not None else _earlier_config(given)
    summary = run(kind, TrainConfig(**{**values, **given}), allow_pipe=allow_pipe)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    click.echo(summary)


def _earlier_config(given: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run that is resumed, so that it need not be given again; else empty."""
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


def _model_options(command: Callable) -> Callable:
    """What eval, embed and search have in common."""
    device = click.option("--device", default="auto", show_default=True, help="auto, cpu or a torch device.")
    batch = click.option("--batch-size", default=256, show_default=True, metavar="N", help="Batch size.")
    model = click.option(
        "--model", "folder", required=True, metavar="RUN/final", help="Folder of a trained model."
    )
    return model(batch(device(command)))


@commands.command("eval")
@_model_options
@click.option(
    "--data",
    default="emoji3:style-test",
    show_default=True,
    help="emoji3[:SPLIT], scenes[:SPLIT], a CSV/TSV file or webdataset tars; or a folder with a folder of "
    "images per class; for detectors composites[:SPLIT] or COCO's JSON.",
)
@click.option(
    "--template", "templates", multiple=True, metavar="TEXT", help="Class prompt with {}; may be repeated."
)
@click.option("--num-beams", default=1, show_default=True, metavar="N", help="Beams of generated captions.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
@_allow_pipe
def evaluate(
    folder: str,
    batch_size: int,
    device: str,
    data: str,
    templates: tuple[str, ...],
    num_beams: int,
    as_json: bool,
    allow_pipe: bool,
) -> None:
    """Measure retrieval R@1/5/10 both ways and zero-shot accuracy, with chance levels; for a captioning
    model perplexity, BLEU, CIDEr and, on scenes, the fraction of right slots; for a VisualBERT the accuracy
    of matching and the perplexity of masked words, with the image, another one and none; for a ViLD the
    average precision of base and novel classes, on composites or COCO's JSON.
    """
    from vlmkernels.use.evaluate import evaluate as run

    result = run(
        folder,
        data,
        batch_size=batch_size,
        device=device,
        templates=templates or None,
        num_beams=num_beams,
        allow_pipe=allow_pipe,
    )
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else result)


@commands.command()
@click.argument("model", metavar="RUN/final")
@click.option(
    "--data",
    required=True,
    help="To train the probe on: emoji3[:SPLIT], scenes[:SPLIT], or a folder of images for each class.",
)
@click.option(
    "--test", metavar="DATA", help="Held-out data; the test split of --data, or a fifth of it when not given."
)
@click.option("--untrained", is_flag=True, help="Probe the same network with random weights.")
@click.option("--limit", type=int, metavar="N", help="Use the first N samples of each data set only.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Of splits and random weights.")
@click.option("--batch-size", default=256, show_default=True, metavar="N", help="Batch size.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or a torch device.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
def probe(model: str, as_json: bool, **options: Any) -> None:
    """Measure the image features of a trained VirTex, CLIP or ALIGN by a linear classifier on them, which is
    trained on --data and tested on held-out images.
    """
    from vlmkernels.use.probe import probe as run

    result = run(model, **options)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else result)


@commands.command()
@_model_options
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", required=True, metavar="FILE", help="File to write, .safetensors or .npz.")
@click.option("--texts", is_flag=True, help="INPUTS are texts, not images.")
def embed(folder: str, batch_size: int, device: str, inputs: tuple[str, ...], out: str, texts: bool) -> None:
    """Embed images (files, and folders with all below them) or texts, and write them to a file."""
    from vlmkernels.use.embed import embed as run

    kind = "texts" if texts else "images"
    done = run(folder, inputs, out, kind=kind, batch_size=batch_size, device=device)
    _count_skipped(done.skipped)
    click.echo(done)


@commands.command()
@_model_options
@click.argument("text")
@click.argument("directory")
@click.option("-k", default=10, show_default=True, metavar="N", help="How many images to show.")
@click.option(
    "--cache/--no-cache", default=True, show_default=True, help="Keep the embeddings of the images."
)
def search(folder: str, batch_size: int, device: str, text: str, directory: str, k: int, cache: bool) -> None:
    """Show the images below DIRECTORY that fit TEXT best, each with its similarity."""
    from vlmkernels.use.search import search as run

    found = run(folder, text, directory, k, cache=cache, batch_size=batch_size, device=device)
    _count_skipped(found.skipped)
    click.echo(found)


@commands.command()
@_model_options
@click.argument("inputs", nargs=-1, required=True)
@click.option("--prompt", default="", metavar="TEXT", help="Start of every caption.")
@click.option("--num-beams", default=1, show_default=True, metavar="N", help="Beam search; 1 is greedy.")
@click.option("--sample", "do_sample", is_flag=True, help="Sample tokens.")
@click.option("--temperature", default=1.0, show_default=True, metavar="X", help="With --sample.")
@click.option("--top-k", type=int, metavar="N", help="With --sample: from the N most likely tokens.")
@click.option(
    "--top-p",
    type=float,
    metavar="X",
    help="With --sample: from the most likely tokens of total probability X.",
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Of --sample.")
@click.option("--max-new-tokens", type=int, metavar="N", help="Maximum caption length (default 48).")
def caption(folder: str, inputs: tuple[str, ...], **options: Any) -> None:
    """Write a caption for each image: files, and folders with all below them."""
    from vlmkernels.use.caption import caption as run

    done = run(folder, inputs, **options)
    _count_skipped(done.skipped)
    if done.captions:
        click.echo(done)


@commands.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "--language-model",
    required=True,
    metavar="FOLDER",
    help="RUN/final of a trained language model, or a folder of Hugging Face's GPT-2.",
)
@click.option(
    "--scorer",
    required=True,
    metavar="FOLDER",
    help="RUN/final of a trained model that embeds images and texts, a folder of ASIF's anchors, or asif: "
    "the encoders of the extra [asif] with the embedded emoji.",
)
@click.option("--prompt", default="", metavar="TEXT", help="Start of every caption.")
@click.option(
    "--alpha", default=0.1, show_default=True, metavar="X", help="Weight of the penalty for repetition."
)
@click.option(
    "--beta",
    default=2.0,
    show_default=True,
    metavar="X",
    help="Weight of the image; 0: contrastive search.",
)
@click.option(
    "--k", default=45, show_default=True, metavar="N", help="Candidates for each token, the N likeliest."
)
@click.option("--length", default=15, show_default=True, metavar="N", help="Maximum number of tokens.")
@click.option("--batch-size", default=16, show_default=True, metavar="N", help="Images at once.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or a torch device.")
def magic(inputs: tuple[str, ...], language_model: str, scorer: str, **options: Any) -> None:
    """Write a caption for each image with a language model that was trained on texts only (MAGIC): a scorer
    says which of its candidates fit the image. INPUTS are files, and folders with all below them.
    """
    from vlmkernels.use.magic import magic as run

    done = run(inputs, language_model, scorer, **options)
    _count_skipped(done.skipped)
    if done.captions:
        click.echo(done)


@commands.command()
@_model_options
@click.argument("image")
@click.argument("texts", nargs=-1, required=True)
def match(folder: str, image: str, texts: tuple[str, ...], **options: Any) -> None:
    """Rank TEXTS by the probability that each belongs to IMAGE, by a VisualBERT."""
    from vlmkernels.use.match import match as run

    click.echo(run(folder, image, texts, **options))


@commands.command()
@click.option("--model", "folder", required=True, metavar="RUN/final", help="Folder of a trained model.")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--categories", required=True, metavar="A,B,C", help="What to find, separated by commas.")
@click.option("--out", metavar="FOLDER", help="For annotated images and detections.json.")
@click.option("--threshold", default=0.3, show_default=True, metavar="X", help="Lowest score to show.")
@click.option(
    "--template", "templates", multiple=True, metavar="TEXT", help="Prompt with {}; may be repeated."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or a torch device.")
def detect(folder: str, inputs: tuple[str, ...], categories: str, **options: Any) -> None:
    """Find objects of any categories in images, by a ViLD: files, and folders with all below them."""
    from vlmkernels.use.detect import detect as run

    names = [name.strip() for name in categories.split(",") if name.strip()]
    templates = options.pop("templates") or None
    done = run(folder, inputs, names, templates=templates, **options)
    _count_skipped(done.skipped)
    if done.objects:
        click.echo(done)


@commands.command()
@click.option("--model", "folder", required=True, metavar="RUN/final", help="Folder of a trained model.")
@click.option("--data", required=True, help="composites[:SPLIT], or a .json file in COCO's format.")
@click.option("--out", required=True, metavar="FILE", help="File to write, .safetensors.")
@click.option("--most", default=20, show_default=True, metavar="N", help="Proposals of an image.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or a torch device.")
def propose(folder: str, data: str, out: str, most: int, device: str) -> None:
    """Write the proposals of a ViLD for every image, with its teacher's embeddings of their crops: what
    another one is trained with (vlmkernels train vild --proposals).
    """
    from vlmkernels.use.detect import propose as run

    done = run(folder, data, out, most=most, device=device)
    _count_skipped(done.skipped)
    click.echo(done)


def _count_skipped(skipped: dict[str, str]) -> None:
    """The number of skipped images, each of which was reported when it was read."""
    if skipped:
        click.echo(f"{len(skipped)} skipped", err=True)


def _fail(message: object, status: int) -> typing.NoReturn:
    try:
        sys.stdout.flush()
    except OSError:  # what was not written would be tried, and complained about, once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    click.echo(f"Error: {printable(message)}", err=True)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    The status is 0 on success, also if samples were skipped; 1 for an error while running, such as a full
    disk or a broken pipe; 2 for invalid use; 130 when interrupted.
    """
    logger = logging.getLogger("vlmkernels")
    if not any(isinstance(handler, _Echo) for handler in logger.handlers):
        logger.addHandler(_Echo())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        commands.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except click.ClickException as error:
        error.message = printable(error.message)  # type: ignore[misc]
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except ModuleNotFoundError as error:
        told = "pip install" in str(error)
        _fail(error if told else f"{error.name} is not installed: pip install 'vlmkernels[train]'", 1)
    except (ValueError, KeyError, OSError, FloatingPointError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        _fail(message, 2 if isinstance(error, (ValueError, KeyError, FileNotFoundError)) else 1)
