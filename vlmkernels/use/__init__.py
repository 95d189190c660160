"""What is done with a trained model: load it, embed, search, write captions, evaluate."""

from vlmkernels.use.bundle import Bundle, load_bundle

__all__ = ["Bundle", "load_bundle"]
