"""Image-text data: the embedded emoji3 set, CSV files, webdataset tars, transforms and tokenizers."""

from vlmkernels.data.csv_pairs import BrokenImageError, CsvPairs
from vlmkernels.data.emoji import CAPTIONS, SPLITS, Concept, Emoji3, load_emoji3
from vlmkernels.data.pairs import load_pairs
from vlmkernels.data.samples import Collate, Sample, SkipLog
from vlmkernels.data.tar_pairs import TarPairs
from vlmkernels.data.tokenizer import ClipTokenizer, WordPieceTokenizer, load_tokenizer
from vlmkernels.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform, align_transform, image_transform

__all__ = [
    "CAPTIONS",
    "CLIP_MEAN",
    "CLIP_STD",
    "SPLITS",
    "BrokenImageError",
    "ClipTokenizer",
    "Collate",
    "Concept",
    "CsvPairs",
    "Emoji3",
    "ImageTransform",
    "Sample",
    "SkipLog",
    "TarPairs",
    "WordPieceTokenizer",
    "align_transform",
    "image_transform",
    "load_emoji3",
    "load_pairs",
    "load_tokenizer",
]
