"""Training: ``train(kind, TrainConfig(...))`` is what ``vlmkernels train`` calls. Each kind has a file."""

from typing import TYPE_CHECKING, Any

from .config import TrainConfig

if TYPE_CHECKING:
    from vlmkernels.use.bundle import Bundle, load_bundle

    from .loop import Summary, train

__all__ = ["Bundle", "Summary", "TrainConfig", "load_bundle", "train"]


def __getattr__(name: str) -> Any:
    """Import the loop, and with it accelerate, on first use: the other commands do not need it."""
    if name in ("Summary", "train"):
        from . import loop

        return getattr(loop, name)
    if name in ("Bundle", "load_bundle"):
        from vlmkernels.use import bundle

        return getattr(bundle, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
