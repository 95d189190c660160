"""Reference architectures, one readable file each."""

from .clip import CLIP, ClipConfig

__all__ = ["CLIP", "ClipConfig"]
