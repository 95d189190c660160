"""Image-text data: emoji3 and scenes made of it, CSV files, webdataset tars, transforms, tokenizers."""

from vlmkernels.data.captions import CaptionCollate
from vlmkernels.data.csv_pairs import CsvPairs
from vlmkernels.data.emoji import CAPTIONS, SPLITS, Concept, Emoji3, load_emoji3
from vlmkernels.data.images import BrokenImageError, read_image
from vlmkernels.data.lines import CaptionLines
from vlmkernels.data.masking import mask_tokens, pair_tokens
from vlmkernels.data.pairs import load_pairs
from vlmkernels.data.regions import read_regions
from vlmkernels.data.samples import Collate, Sample, SkipLog
from vlmkernels.data.scenes import SCENE_SPLITS, Scene, Scenes, load_scenes, parse_caption, slot_accuracy
from vlmkernels.data.tar_pairs import TarPairs
from vlmkernels.data.tokenizer import CaptionTokenizer, ClipTokenizer, WordPieceTokenizer, load_tokenizer
from vlmkernels.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    ImageTransform,
    ImageViews,
    align_transform,
    image_transform,
)

__all__ = [
    "CAPTIONS",
    "CLIP_MEAN",
    "CLIP_STD",
    "SCENE_SPLITS",
    "SPLITS",
    "BrokenImageError",
    "CaptionCollate",
    "CaptionLines",
    "CaptionTokenizer",
    "ClipTokenizer",
    "Collate",
    "Concept",
    "CsvPairs",
    "Emoji3",
    "ImageTransform",
    "ImageViews",
    "Sample",
    "Scene",
    "Scenes",
    "SkipLog",
    "TarPairs",
    "WordPieceTokenizer",
    "align_transform",
    "image_transform",
    "load_emoji3",
    "load_pairs",
    "load_scenes",
    "load_tokenizer",
    "mask_tokens",
    "pair_tokens",
    "parse_caption",
    "read_image",
    "read_regions",
    "slot_accuracy",
]
