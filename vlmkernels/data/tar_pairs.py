"""Image-text pairs in webdataset tars: KEY.jpg (or jpeg, png, webp) with KEY.txt or KEY.json."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from vlmkernels.data._text import is_unicode
from vlmkernels.data.images import BrokenImageError, read_image, transformed
from vlmkernels.data.samples import Epoch, Sample, SkipLog, Transform, sample_rng

logger = logging.getLogger(__name__)

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
TEXT_FIELDS = ("txt", "json")
TEXT_KEYS = ("caption", "text", "title")
LARGEST_MEMBER = 2**28  # bytes of one image or text; larger compressed or sparse members exhaust memory
_HIDDEN = re.compile(r"(^|/)\.[^/]|^__[^/]*__(/|$)")  # and names reserved by webdataset
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}


def _this_rank() -> tuple[int, int]:
    """Rank and world size of torch.distributed, else of the environment of torchrun, else one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class _SkippedError(ValueError):
    """A sample is skipped; the message gives the reason."""


def _local(url: str) -> str | None:
    """The path of a shard that is a file; None if webdataset would run a program to read it."""
    if os.path.exists(url):
        return url
    parts = urlparse(url)
    return url2pathname(parts.path) if parts.scheme == "file" else None if parts.scheme else url


def _open(url: str) -> IO[bytes]:
    path = _local(url)
    if path is not None:
        return open(path, "rb")
    from webdataset.gopen import gopen

    return gopen(url)


def _is_cut(url: str) -> bool:
    """True for a local plain tar without its end mark; to tarfile a cut between two files is the end."""
    path = _local(url)
    if path is None or not path.endswith(".tar"):
        return False
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 512))
        return size % 512 != 0 or any(file.read())


def _skip_reason(member: tarfile.TarInfo) -> str | None:
    """Why a member is skipped. Members are only read into memory, but such names indicate an attack."""
    if not is_unicode(member.name):
        return "the name is not UTF-8"
    if ".." in member.name.replace("\\", "/").split("/"):
        return "the name leads out of the folder"
    if not member.isreg():
        return _KINDS.get(member.type, f"of type {member.type!r}") + ", not a file"
    return None


class TarPairs(IterableDataset[Sample]):
    """Iterable data set over webdataset shards, read with the `webdataset` package.

    urls: a path or file: URL, several with braces ("shard-{000..009}.tar"); "::" joins.
    allow_pipe: whether urls may be any other URL that webdataset opens. It runs a program for each: the shell
        for pipe:, curl for http: and https:, gsutil, ais.
    shuffle: size of the shuffle buffer for samples; the order of the shards is random as well. 0 keeps the
        order.
    text_key: if a KEY.json is the text, its field with the caption; None uses caption, text or title.
    rank, world_size: which shards this process reads (every world_size-th); None uses torch.distributed, then
        RANK and WORLD_SIZE. The shards of a rank are distributed over the DataLoader's workers in the same
        way.
    samples_per_rank: length of an epoch on each rank; shards are then repeated as needed, so that every rank
        makes the same number of steps, unless a worker's shards have no readable sample at all. None reads
        each shard once, and ranks may differ in length.
    transform: applied to the RGB image. seed: determines every random choice, with the epoch (`set_epoch`).

    Samples without image or text, images that cannot be read or transformed, links, devices, names that are
    not UTF-8 or contain "..", members above 256 MiB and damaged tars are skipped; `skipped` lists them with
    the reason. Hidden files and other fields of a sample are ignored.
    Raises FileNotFoundError for missing shards, and ValueError for URLs that need `allow_pipe`, for fewer
    shards than ranks, or (when iterated by one worker of one rank) if no sample has an image and a text,
    naming the fields found.
    """

    def __init__(
        self,
        urls: str,
        *,
        shuffle: int = 0,
        text_key: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        samples_per_rank: int | None = None,
        transform: Transform | None = None,
        seed: int = 0,
        allow_pipe: bool = False,
    ) -> None:
        try:
            from webdataset.shardlists import expand_urls
        except ModuleNotFoundError as error:
            message = "tar shards need webdataset: pip install vlmkernels[train]"
            raise ModuleNotFoundError(message, name="webdataset") from error

        if shuffle < 0:
            raise ValueError(f"shuffle must be a buffer size of at least 0, got {shuffle}")
        if samples_per_rank is not None and samples_per_rank < 1:
            raise ValueError(f"samples_per_rank must be at least 1, got {samples_per_rank}")
        self.shards: list[str] = expand_urls(urls)
        known_rank, known_size = _this_rank()
        self.rank = known_rank if rank is None else rank
        self.world_size = known_size if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, world_size = {self.world_size}), got {self.rank}")
        if len(self.shards) < self.world_size:
            raise ValueError(
                f"urls must have at least one shard per rank, got {len(self.shards)} shards for "
                f"{self.world_size} ranks"
            )
        foreign = [url for url in self.shards if _local(url) is None]
        if foreign and not allow_pipe:
            raise ValueError(
                f"urls: to read {foreign[0]!r} a program would be run ({urlparse(foreign[0]).scheme}:); "
                "if you trust it, allow that with allow_pipe=True, or --allow-pipe on the command line"
            )
        local = (_local(url) for url in self.shards)
        absent = [path for path in local if path is not None and not os.path.isfile(path)]
        if absent:
            raise FileNotFoundError(f"{len(absent)} of {len(self.shards)} shards do not exist: {absent[:5]}")
        self.urls, self.shuffle, self.text_key = urls, shuffle, text_key
        self.samples_per_rank, self.transform, self.seed = samples_per_rank, transform, seed
        self._epoch, self._skip_log = Epoch(), SkipLog()

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by key of the samples and shards skipped so far, in all workers."""
        return self._skip_log.items()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of shuffling and augmentation, also in workers that are already running."""
        self._epoch.set(epoch)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        epoch = self._epoch.get()
        if self.samples_per_rank is None:
            yield from self._one_pass(self._shards_of(worker, workers, epoch, 0), worker, epoch, 0)
            return
        active = min(workers, len(self._shards_of(0, 1, epoch, 0)))
        if worker < active:
            quota = self.samples_per_rank // active + (worker < self.samples_per_rank % active)
            yield from islice(self._endless(worker, active, epoch), quota)

    def _endless(self, worker: int, workers: int, epoch: int) -> Iterator[Sample]:
        # Shuffled shards are redistributed in every pass: in so many a worker gets most of them.
        repeat, barren, patience = 0, 0, self.world_size * workers if self.shuffle else 1
        while barren < patience:
            barren += 1
            for sample in self._one_pass(
                self._shards_of(worker, workers, epoch, repeat), worker, epoch, repeat
            ):
                barren = 0
                yield sample
            repeat += 1
        logger.warning("no sample can be read in the shards of rank %d, worker %d", self.rank, worker)

    def _shards_of(self, worker: int, workers: int, epoch: int, repeat: int) -> list[str]:
        shards = list(self.shards)
        if self.shuffle:
            sample_rng(self.seed, epoch, repeat, "shards").shuffle(shards)
        return shards[self.rank :: self.world_size][worker::workers]

    def _one_pass(self, shards: list[str], worker: int, epoch: int, repeat: int) -> Iterator[Sample]:
        from webdataset.filters import shuffle

        raw = self._raw_samples(shards)
        if self.shuffle:
            rng = sample_rng(self.seed, epoch, repeat, "buffer", self.rank, worker)
            raw = shuffle(self.shuffle, initial=self.shuffle, rng=rng)(raw)
        read = 0
        fields: set[str] = set()
        for fields_of_sample in raw:
            fields.update(name for name in fields_of_sample if not name.startswith("__"))
            try:
                sample = self._decode(fields_of_sample, epoch)
            except _SkippedError as error:
                self._skip(fields_of_sample["__url__"], fields_of_sample["__key__"], str(error))
                continue
            read += 1
            yield sample
        if read == 0 and len(shards) == len(self.shards):  # else other workers and ranks may have some
            raise ValueError(
                f"{self.urls}: no sample has an image ({', '.join(IMAGE_FIELDS)}) and a text (txt, json) "
                f"that can be read; fields found: {sorted(fields)}; {self._skip_log}"
            )

    def _raw_samples(self, shards: list[str]) -> Iterator[dict[str, Any]]:
        """Encoded samples, shard by shard, so that a damaged tar cannot run into the next one."""
        for url in shards:
            sample: dict[str, Any] = {}
            for key, field, content in self._members(url):
                if key != sample.get("__key__"):
                    if sample:
                        yield sample
                    sample = {"__key__": key, "__url__": url}
                if field in sample:
                    self._skip(url, f"{key}.{field}", "a second file of this name")
                else:
                    sample[field] = content
            if sample:
                yield sample

    def _members(self, url: str) -> Iterator[tuple[str, str, bytes]]:
        """Key, field and content of the files of a shard; other files than images and texts are not read."""
        from webdataset.tariterators import base_plus_ext

        stream: IO[bytes] | None = None
        try:
            stream = _open(url)
            with tarfile.open(fileobj=stream, mode="r|*", encoding="utf-8") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # which would grow with the shard
                    reason = _skip_reason(member)
                    if member.isdir() or (reason is None and _HIDDEN.search(member.name)):
                        continue
                    key, field = base_plus_ext(member.name)
                    if reason is None and key is None:
                        reason = "the name has no extension"
                    read = field is not None and field.lower() in IMAGE_FIELDS + TEXT_FIELDS
                    if read and member.size > LARGEST_MEMBER:
                        reason = f"{member.size} bytes, more than {LARGEST_MEMBER}"
                    if reason is not None:
                        self._skip(url, member.name, reason)
                        continue
                    file = tar.extractfile(member) if read else None
                    yield key, field.lower(), b"" if file is None else file.read()
            while stream.read(2**20):  # a program that is still writing would report a broken pipe
                pass
            stream.close()
            if _is_cut(url):
                raise tarfile.ReadError("the file ends without the end mark of a tar")
        except Exception as error:  # tarfile raises many types for damaged files, a pipe what its program did
            self._skip_log.add(url, f"rest of the shard: {type(error).__name__}: {error}")
        finally:
            if stream is not None:
                with contextlib.suppress(OSError):  # of a program whose output is no longer needed
                    stream.close()

    def _skip(self, url: str, name: str, reason: str) -> None:
        """Record a sample or member; shards may count their keys from zero each."""
        place = f"in {url}: "
        known = self._skip_log.reason(name)
        if known is not None and not known.startswith(place):
            name = f"{name} in {url}"
        self._skip_log.add(name, place + reason)

    def _decode(self, raw: dict[str, Any], epoch: int) -> Sample:
        key = raw["__key__"]
        image_field = next((name for name in IMAGE_FIELDS if name in raw), None)
        if image_field is None:
            raise _SkippedError(f"no image, fields {sorted(n for n in raw if not n.startswith('__'))}")
        text = self._text(raw)
        rng = sample_rng(self.seed, epoch, raw["__url__"], key)
        try:
            image, text = transformed(self.transform, read_image(raw[image_field]), text, rng)
        except BrokenImageError as error:
            raise _SkippedError(str(error)) from error
        return Sample(image=image, text=text, key=key, label=-1, concept=-1)

    def _text(self, raw: dict[str, Any]) -> str:
        try:
            if "txt" in raw and self.text_key is None:
                text: Any = raw["txt"].decode("utf-8-sig").strip()
            elif "json" in raw:
                text = json.loads(raw["json"])
                if isinstance(text, dict):
                    names = TEXT_KEYS if self.text_key is None else (self.text_key,)
                    found = sorted(text)
                    text = next((text[name] for name in names if name in text), None)
                    if text is None:
                        raise _SkippedError(f"json has none of {names}, but {found}")
            else:
                raise _SkippedError(f"no text, fields {sorted(n for n in raw if not n.startswith('__'))}")
        except _SkippedError:
            raise
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too deep
            raise _SkippedError(f"text cannot be decoded: {error}") from error
        if not isinstance(text, str) or not text.strip():
            raise _SkippedError(f"caption must be a string, got {text!r}")
        if not is_unicode(text):
            raise _SkippedError(f"caption must be Unicode without lone surrogates, got {text!r}")
        return text.strip()

    def __repr__(self) -> str:
        return f"TarPairs({self.urls!r}, shards={len(self.shards)}, {self._skip_log})"
