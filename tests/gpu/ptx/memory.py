"""Memory of a launch, with what is known of each piece of it: who wrote and read it since which barrier.

Within a block barriers order the warps, and nothing orders the blocks of a launch. An access is a fault
where it leaves the views of the tensors (the padding of a strided one is outside), where it is misaligned,
where nothing wrote what it reads, and where another warp or block touched the same place in such a way that
the result depends on which came first.
"""

import ctypes
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ..sanitizer import Violation, view_bytes

DENSE = 1 << 26  # bytes; of a larger storage only the places within the views are remembered
NOBODY, SEVERAL = -1, -2
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Violation):
    """The compiled kernel did what a GPU does not forgive."""


class Lanes(Exception):
    """A fault of some of the lanes of an access; the machine says where."""

    def __init__(self, lanes: np.ndarray, why: str):
        super().__init__(why)
        self.lanes = lanes


class Moment:
    """The interval between barriers that is running: intervals are counted over all blocks."""

    def __init__(self) -> None:
        self.block_began = self.interval = 0

    def barrier(self) -> None:
        self.interval += 1

    def block(self) -> None:
        self.interval += 1
        self.block_began = self.interval


class Touched:
    """Who wrote and who read each unit of memory last."""

    def __init__(self, moment: Moment, written: np.ndarray):
        self.moment, self.written = moment, written
        self.wrote_at, self.read_at = (np.full(written.size, NOBODY) for _ in range(2))
        self.writer, self.reader = (np.full(written.size, NOBODY, np.int32) for _ in range(2))

    @staticmethod
    def _note(who: np.ndarray, at: np.ndarray, warps: np.ndarray) -> None:
        who[at] = warps
        who[at[who[at] != warps]] = SEVERAL

    def read(self, at: np.ndarray, warps: np.ndarray) -> tuple[np.ndarray, str] | None:
        """Note loads of units `at` by `warps`; gives the first fault, which lanes and why."""
        began, interval = self.moment.block_began, self.moment.interval
        wrote_at, read_at = self.wrote_at[at], self.read_at[at]
        for bad, why in (
            (~self.written[at], "load of uninitialised memory"),
            ((wrote_at >= 0) & (wrote_at < began), "race: load of what another block stores"),
            (
                (wrote_at == interval) & (self.writer[at] != warps),
                "race: load without a barrier of what another warp stored",
            ),
        ):
            if bad.any():
                return bad, why
        self._note(
            self.reader, at, np.where((read_at == interval) & (self.reader[at] != warps), SEVERAL, warps)
        )
        # that another block read it stays known: nothing orders blocks
        self.read_at[at] = np.where((read_at >= 0) & (read_at < began), read_at, interval)
        return None

    def write(self, at: np.ndarray, warps: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, str] | None:
        """Note stores to units `at`; `same` where a store changes nothing."""
        began, interval = self.moment.block_began, self.moment.interval
        wrote_at, read_at = self.wrote_at[at], self.read_at[at]
        same &= self.written[at]
        for bad, why in (
            ((wrote_at >= 0) & (wrote_at < began), "race: store to what another block stored"),
            ((read_at >= 0) & (read_at < began), "race: store to what another block loaded"),
            (
                (wrote_at == interval) & (self.writer[at] != warps) & ~same,
                "race: store without a barrier to what another warp stored",
            ),
            (
                (read_at == interval) & (self.reader[at] != warps) & ~same,
                "race: store without a barrier to what another warp loaded",
            ),
        ):
            if bad.any():
                return bad, why
        self._note(self.writer, at, warps)
        self.wrote_at[at], self.written[at] = interval, True
        return None


class Storage:
    """The memory of tensors that share it, at its real addresses."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], written: np.ndarray | None, moment: Moment):
        some = next(iter(tensors.values()))
        storage = some.untyped_storage()
        self.name, self.low, size = "/".join(tensors), storage.data_ptr(), storage.nbytes()
        self.high, self.unit = self.low + size, min(x.element_size() for x in tensors.values())
        self._raw = (ctypes.c_uint8 * size).from_address(self.low)
        views = np.unique(np.concatenate([view_bytes(x) for x in tensors.values()]) // self.unit)
        self._known = views if size > DENSE else None
        if self._known is None:
            self._inside = np.zeros(-(-size // self.unit), bool)
            self._inside[views] = True
        count = views.size if self._known is not None else self._inside.size
        if written is None:
            fresh = np.ones(count, bool)
        elif self._known is None:
            padding = np.zeros(count * self.unit - size, bool)
            fresh = np.concatenate([written, padding]).reshape(count, self.unit).all(1)
        else:
            fresh = written[views * self.unit]
        self.touched = Touched(moment, fresh)
        self._written, self._views = written, views

    def publish(self) -> None:
        """Note in `written` what the launch wrote."""
        if self._written is None:
            return
        bytes_of = self.touched.written.repeat(self.unit)
        if self._known is None:
            self._written |= bytes_of[: self._written.size]
        else:
            self._written[spread(self._views * self.unit, self.unit)] |= bytes_of

    def words(self, width: int) -> np.ndarray:
        """All of it in words of `width` bytes."""
        return np.frombuffer(self._raw, WORDS[width], (self.high - self.low) // width)

    def places(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where units are remembered, and which of them lie in a view."""
        if self._known is None:
            return units, self._inside[units]
        at = np.searchsorted(self._known, units).clip(max=self._known.size - 1)
        return at, self._known[at] == units


def spread(first: np.ndarray, count: int) -> np.ndarray:
    """first, first + 1, ... first + count - 1 of each."""
    return (first[:, None] + np.arange(count)).ravel()


class Global:
    """The tensors of a launch."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], fresh: Mapping[int, np.ndarray], moment: Moment):
        """`fresh`: the written bytes of storages made by torch.empty, by address."""
        shared: dict[int, dict[str, torch.Tensor]] = {}
        for name, x in tensors.items():
            if x.numel():
                shared.setdefault(x.untyped_storage().data_ptr(), {})[name] = x
        self.storages = [Storage(xs, fresh.get(at), moment) for at, xs in shared.items()]

    def parts(self, kind: str, addresses: np.ndarray, width: int) -> Iterable[tuple[Storage, np.ndarray]]:
        """Storages and which of the accesses go there."""
        for storage in self.storages:
            if addresses.min() >= storage.low and addresses.max() + width <= storage.high:
                yield storage, np.ones(addresses.size, bool)
                return
        left = np.ones(addresses.size, bool)
        for storage in self.storages:
            here = (addresses >= storage.low) & (addresses + width <= storage.high)
            if here.any():
                left &= ~here
                yield storage, here
        if left.any():
            raise Lanes(left, f"{kind} outside of every argument")

    def load(self, addresses: np.ndarray, width: int, count: int, warps: np.ndarray) -> np.ndarray:
        """`count` words of `width` bytes from each address, [count, lanes]."""
        out = np.zeros((count, addresses.size), WORDS[width])
        check_aligned("load", addresses, width * count)
        for storage, here in self.parts("load", addresses, width * count):
            first = addresses[here] - storage.low
            self._touch(storage, "load", here, first, width * count, warps, None)
            out[:, here] = storage.words(width)[first // width + np.arange(count)[:, None]]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        """`values`: [count, lanes] words."""
        width, count = values.itemsize, len(values)
        check_aligned("store", addresses, width * count)
        for storage, here in self.parts("store", addresses, width * count):
            first, mine = addresses[here] - storage.low, values[:, here]
            words, at = storage.words(width), first // width + np.arange(count)[:, None]
            same = (words[at] == mine).all(0)
            self._touch(storage, "store", here, first, width * count, warps, same)
            words[at] = mine
            refuse_conflicts(words[at] != mine, here)

    @staticmethod
    def _touch(storage: Storage, kind, here, first, width, warps, same) -> None:
        unit = storage.unit
        per_lane = max(1, width // unit)
        at, inside = storage.places(spread(first // unit, per_lane))
        lanes = np.flatnonzero(here).repeat(per_lane)
        if not inside.all():
            raise Lanes(mark(here.size, lanes[~inside]), f"{kind} outside the view of {storage.name}")
        if same is None:
            found = storage.touched.read(at, warps[lanes])
        else:
            found = storage.touched.write(at, warps[lanes], same.repeat(per_lane))
        if found is not None:
            raise Lanes(mark(here.size, lanes[found[0]]), f"{found[1]} ({storage.name})")


class Shared:
    """The shared memory of a block. What cp.async brings is there when it is waited for."""

    def __init__(self, size: int, unit: int, moment: Moment):
        self.size, self.unit, self.moment = size, unit, moment
        self._data = np.zeros(-(-size // 16) * 16, np.uint8)
        self.clear()

    def clear(self) -> None:
        """A new block begins: its shared memory holds anything, NaN here."""
        self._data[:] = 0xFF
        count = self._data.size // self.unit
        self.touched = Touched(self.moment, np.zeros(count, bool))
        self.coming = np.zeros(count, np.int32)  # copies on their way to each unit

    def _units(self, kind: str, addresses: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        check_aligned(f"shared {kind}", addresses, width)
        outside = (addresses < 0) | (addresses + width > self.size)
        if outside.any():
            raise Lanes(outside, f"{kind} outside of shared memory, which has {self.size} bytes")
        per_lane = max(1, width // self.unit)
        return spread(addresses // self.unit, per_lane), np.arange(addresses.size).repeat(per_lane)

    def load(self, addresses: np.ndarray, width: int, count: int, warps: np.ndarray) -> np.ndarray:
        at, lanes = self._units("load", addresses, width * count)
        self._refuse_coming(at, lanes, addresses.size, "load of")
        found = self.touched.read(at, warps[lanes])
        if found is not None:
            raise Lanes(mark(addresses.size, lanes[found[0]]), f"{found[1]} (shared memory)")
        return self._data.view(WORDS[width])[addresses // width + np.arange(count)[:, None]]

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        self._write(addresses, values, warps)

    def _write(self, addresses, values, warps, arriving: bool = False) -> None:
        width, count = values.itemsize, len(values)
        at, lanes = self._units("store", addresses, width * count)
        if arriving:
            np.subtract.at(self.coming, at, 1)
        self._refuse_coming(at, lanes, addresses.size, "store to")
        words, places = self._data.view(WORDS[width]), addresses // width + np.arange(count)[:, None]
        same = (words[places] == values).all(0)
        found = self.touched.write(at, warps[lanes], same[lanes])
        if found is not None:
            raise Lanes(mark(addresses.size, lanes[found[0]]), f"{found[1]} (shared memory)")
        words[places] = values
        refuse_conflicts(words[places] != values, np.ones(addresses.size, bool))

    def expect(self, addresses: np.ndarray, width: int, warps: np.ndarray) -> None:
        """A copy to these places begins: from here until it is waited for they belong to it."""
        at, lanes = self._units("cp.async", addresses, width)
        self._refuse_coming(at, lanes, addresses.size, "cp.async to")
        touched, interval = self.touched, self.moment.interval
        late = (touched.read_at[at] == interval) & (touched.reader[at] != warps[lanes])
        if late.any():
            raise Lanes(
                mark(addresses.size, lanes[late]),
                "race: cp.async without a barrier to what another warp loaded (shared memory)",
            )
        np.add.at(self.coming, at, 1)

    def arrive(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        self._write(addresses, values, warps, arriving=True)

    def _refuse_coming(self, at, lanes, count, what) -> None:
        bad = self.coming[at] > 0
        if bad.any():
            raise Lanes(mark(count, lanes[bad]), f"{what} what cp.async still brings (shared memory)")


def mark(size: int, lanes: np.ndarray) -> np.ndarray:
    out = np.zeros(size, bool)
    out[lanes] = True
    return out


def check_aligned(kind: str, addresses: np.ndarray, width: int) -> None:
    bad = addresses % width != 0
    if bad.any():
        raise Lanes(bad, f"misaligned {kind} of {width} bytes")


def refuse_conflicts(differs: np.ndarray, here: np.ndarray) -> None:
    """Lanes of one store that do not find what they stored: another lane stored there too."""
    if differs.any():
        lanes = np.flatnonzero(here)[differs.any(0)]
        raise Lanes(mark(here.size, lanes), "race: two lanes of one store differ")
