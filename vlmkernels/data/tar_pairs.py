"""Image-text pairs in webdataset tars: KEY.jpg (or jpeg, png, webp) with KEY.txt or KEY.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from vlmkernels.data.csv_pairs import BrokenImageError, read_image
from vlmkernels.data.samples import Epoch, Sample, SkipLog, Transform, apply_transform, sample_rng

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
TEXT_KEYS = ("caption", "text", "title")


def _this_rank() -> tuple[int, int]:
    """Rank and world size of torch.distributed, else of the environment of torchrun, else one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class _SkippedError(ValueError):
    """A sample that is left out; the message says why."""


def _is_cut(url: str) -> bool:
    """True for a local plain tar without its end mark; tarfile takes a cut between files for the end."""
    if not url.endswith(".tar") or not os.path.isfile(url):
        return False
    with open(url, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 512))
        return size % 512 != 0 or any(file.read())


class TarPairs(IterableDataset[Sample]):
    """Iterable data set over webdataset shards, read with the `webdataset` package.

    urls: a path, several with braces ("shard-{000..009}.tar"), or any URL that webdataset opens; "::" joins.
    shuffle: size of the buffer samples are drawn from; the order of the shards is drawn as well. 0 keeps the
    order.
    text_key: where a KEY.json is the text, its field with the caption; None takes caption, text or title.
    rank, world_size: which shards this process reads (every world_size-th); None asks torch.distributed, then
        RANK and WORLD_SIZE. The shards of a rank are dealt out to the workers of the DataLoader in the same
        way.
    samples_per_rank: length of an epoch on each rank; shards are then repeated as needed, so that every rank
        makes the same number of steps. None reads each shard once, and ranks may differ in length.
    transform: applied to the RGB image. seed: with the epoch (`set_epoch`) it fixes every random choice.

    Samples without image or text, damaged images and damaged tars are skipped; `skipped` gives them with the
    reason.
    Raises FileNotFoundError for shards that are not there, and ValueError for fewer shards than ranks, or
    (when iterated) if no sample has an image and a text, naming the fields found.
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
    ) -> None:
        try:
            from webdataset.shardlists import expand_urls
        except ModuleNotFoundError as error:
            message = "tar shards need webdataset: pip install vlmkernels[train]"
            raise ModuleNotFoundError(message, name="webdataset") from error

        if shuffle < 0:
            raise ValueError(f"shuffle is {shuffle}, expected a buffer size of at least 0")
        if samples_per_rank is not None and samples_per_rank < 1:
            raise ValueError(f"samples_per_rank is {samples_per_rank}, expected at least 1")
        self.shards: list[str] = expand_urls(urls)
        known_rank, known_size = _this_rank()
        self.rank = known_rank if rank is None else rank
        self.world_size = known_size if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, expected 0 to world_size - 1 = {self.world_size - 1}")
        if len(self.shards) < self.world_size:
            raise ValueError(
                f"{len(self.shards)} shards for {self.world_size} ranks, expected one or more for each"
            )
        absent = [url for url in self.shards if ":" not in url and not Path(url).is_file()]
        if absent:
            raise FileNotFoundError(f"{len(absent)} of {len(self.shards)} shards do not exist: {absent[:5]}")
        self.urls, self.shuffle, self.text_key = urls, shuffle, text_key
        self.samples_per_rank, self.transform, self.seed = samples_per_rank, transform, seed
        self._epoch, self._skip_log = Epoch(), SkipLog()

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by key of the samples and shards that were left out so far, of all workers."""
        return self._skip_log.items()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of shuffling and augmentation; workers that are already running see it."""
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
        repeat = 0
        while True:
            empty = True
            for sample in self._one_pass(
                self._shards_of(worker, workers, epoch, repeat), worker, epoch, repeat
            ):
                empty = False
                yield sample
            if empty:
                raise ValueError(f"{self.urls}: the shards of worker {worker} have no readable sample")
            repeat += 1

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
                self._skip_log.add(fields_of_sample["__key__"], str(error))
                continue
            read += 1
            yield sample
        if shards and read == 0:
            raise ValueError(
                f"{self.urls}: no sample has an image ({', '.join(IMAGE_FIELDS)}) and a text (txt, json) "
                f"that can be read; fields found: {sorted(fields)}; {self._skip_log}"
            )

    def _raw_samples(self, shards: list[str]) -> Iterator[dict[str, Any]]:
        """Encoded samples, shard by shard, so that a damaged tar cannot run into the next one."""
        from webdataset.tariterators import tarfile_samples

        for url in shards:
            yield from tarfile_samples([{"url": url}], handler=self._on_damage(url))
            if _is_cut(url):
                self._skip_log.add(url, "rest of the shard: the file ends without the end mark of a tar")

    def _on_damage(self, url: str) -> Callable[[Exception], bool]:
        def record(error: Exception) -> bool:
            self._skip_log.add(url, f"rest of the shard: {type(error).__name__}: {error}")
            return True

        return record

    def _decode(self, raw: dict[str, Any], epoch: int) -> Sample:
        key = raw["__key__"]
        image_field = next((name for name in IMAGE_FIELDS if name in raw), None)
        if image_field is None:
            raise _SkippedError(f"no image, fields {sorted(n for n in raw if not n.startswith('__'))}")
        text = self._text(raw)
        try:
            image = read_image(raw[image_field])
        except BrokenImageError as error:
            raise _SkippedError(str(error)) from error
        rng = sample_rng(self.seed, epoch, raw["__url__"], key)
        image = apply_transform(self.transform, image, rng)
        return Sample(image=image, text=text, key=key, label=-1, concept=-1)

    def _text(self, raw: dict[str, Any]) -> str:
        try:
            if "txt" in raw and self.text_key is None:
                text: Any = raw["txt"].decode("utf-8").strip()
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
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise _SkippedError(f"text cannot be decoded: {error}") from error
        if not isinstance(text, str) or not text.strip():
            raise _SkippedError(f"caption is {text!r}, expected a text")
        return text.strip()

    def __repr__(self) -> str:
        return f"TarPairs({self.urls!r}, shards={len(self.shards)}, {self._skip_log})"
