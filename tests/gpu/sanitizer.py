"""Watches the accesses of interpreted Triton kernels: `interpreting(sanitize=True)`.

A pointer belongs to the argument it was computed from, and may touch the elements of that tensor's view
alone: neither the padding of a strided tensor nor what another tensor keeps in the same storage. Found as
well: misaligned accesses, reads of memory that nothing wrote since torch.empty, two programs of one launch
on the same byte without atomics, two lanes of one store on the same byte, a program that reads what it
stored without a barrier between (which thread holds which element is the compiler's choice), signed overflow
of integers, and `tl.device_assert`.
"""

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter as stock

Builder = stock.InterpreterBuilder
Handle = stock.TensorHandle

DENSE = 1 << 26  # bytes; of a larger storage only the places within the views are remembered
NOBODY, SEVERAL = -1, -2  # programs are numbered from 0
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Violation(AssertionError):
    """A kernel touched memory in a way that a GPU does not forgive, or broke an assertion of its own."""


def view_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Offsets of the bytes of all elements in the storage."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    first = (offsets.reshape(-1).numpy() + tensor.storage_offset()) * tensor.element_size()
    return (first[:, None] + np.arange(tensor.element_size())).ravel()


class _Memory:
    """One storage during one launch."""

    def __init__(self, tensors: list[torch.Tensor], written: np.ndarray | None):
        storage = tensors[0].untyped_storage()
        self.low, size, self.known = storage.data_ptr(), storage.nbytes(), None
        if size > DENSE:
            self.known = np.unique(np.concatenate([view_bytes(x) for x in tensors]))
            written = None if written is None else written[self.known]
            size = self.known.size
        self.size = size
        self.written = np.ones(size, bool) if written is None else written
        self.writer = np.full(size, NOBODY, np.int32)
        self.reader = np.full(size, NOBODY, np.int32)
        self.epoch = np.zeros(size, np.int32)  # how many barriers there were before the store

    def places(self, at: np.ndarray) -> np.ndarray:
        """Where the bytes `at` of the storage are remembered; `size` is nowhere."""
        if self.known is None:
            return np.where((at >= 0) & (at < self.size), at, self.size)
        found = np.searchsorted(self.known, at).clip(max=self.size - 1)
        return np.where(self.known[found] == at, found, self.size)


class _Argument:
    """The tensors that begin at one address, mostly one."""

    def __init__(self, names: list[str], tensors: list[torch.Tensor], memory: _Memory):
        self.name, self.memory, self.start = "/".join(names), memory, tensors[0].data_ptr()
        self.in_view = np.zeros(memory.size + 1, bool)
        for tensor in tensors:
            self.in_view[memory.places(view_bytes(tensor))] = True

    def touch(self, kind: str, addresses: np.ndarray, width: int, program: int, epoch: int) -> None:
        """Check and note an access of `width` bytes at each address, after `epoch` barriers."""
        memory = self.memory
        at = memory.places((addresses[:, None] - memory.low + np.arange(width)).ravel())

        def refuse(bad: np.ndarray, what: str) -> None:
            if bad.any():
                first = addresses[np.flatnonzero(bad)[0] // width] - self.start
                count = np.unique(np.flatnonzero(bad) // width).size
                raise Violation(
                    f"{what} {self.name}: {count} lanes, first at byte {first} (program {program})"
                )

        refuse(~self.in_view[at], f"{kind} outside the view of")
        if kind != "store":
            refuse(~memory.written[at], f"{kind} of uninitialised memory of")
        if kind == "atomic":
            return
        writer, reader = memory.writer[at], memory.reader[at]
        other = (writer != NOBODY) & (writer != program)
        if kind == "load":
            refuse(other, "race: load of what another program stores to")
            unordered = (writer == program) & (memory.epoch[at] == epoch)
            refuse(unordered, "race: load without a barrier of what this program stored to")
            memory.reader[at] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)
        else:
            refuse(other, "race: two programs store to")
            refuse((reader != NOBODY) & (reader != program), "race: store to what another program loads from")
            repeated = np.ones(at.size, bool)
            repeated[np.unique(at, return_index=True)[1]] = False
            refuse(repeated, "race: two lanes of one store hit the same byte of")
            memory.writer[at], memory.written[at], memory.epoch[at] = program, True, epoch


def _is_pointer(value) -> bool:
    return isinstance(value, Handle) and isinstance(value.dtype.scalar, tl.pointer_type)


class Sanitizer(TorchDispatchMode):
    """Knows which bytes torch.empty left unwritten, and watches the accesses of the running launch."""

    def __init__(self) -> None:
        super().__init__()
        # address of a storage -> a tensor that keeps it alive, and which of its bytes were written
        self.fresh: dict[int, tuple[torch.Tensor, np.ndarray]] = {}
        self.arguments: dict[int, _Argument] | None = None  # by first address, during a launch
        self.barriers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.arguments is not None:  # the interpreter's own bookkeeping
            return out
        name = func._schema.name.removeprefix("aten::")
        if name in EMPTY and out.numel():
            storage = out.untyped_storage()
            self.fresh[storage.data_ptr()] = (out, np.zeros(storage.nbytes(), bool))
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    self._note_write(tensor)
        return out

    def _note_write(self, tensor) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            _, written = self.fresh.get(tensor.untyped_storage().data_ptr(), (None, None))
            if written is not None:
                with torch.utils._python_dispatch._disable_current_modes():
                    written[view_bytes(tensor)] = True

    @contextlib.contextmanager
    def launch(self, arguments: Mapping[str, object]) -> Iterator[None]:
        """A launch with these values of the parameters of the kernel."""
        self.arguments = {}
        storages: dict[int, list[torch.Tensor]] = {}
        starts: dict[int, dict[str, torch.Tensor]] = {}
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor):
                storages.setdefault(x.untyped_storage().data_ptr(), []).append(x)
                starts.setdefault(x.data_ptr(), {})[name] = x
        try:
            memories = {at: _Memory(xs, self.fresh.get(at, (None, None))[1]) for at, xs in storages.items()}
            for start, named in starts.items():
                tensors = list(named.values())
                memory = memories[tensors[0].untyped_storage().data_ptr()]
                self.arguments[start] = _Argument(list(named), tensors, memory)
            yield
        finally:
            self.arguments = None

    def _origin(self, pointers: Handle) -> _Argument | None:
        """The argument from which pointers were computed."""
        if "argument" not in pointers.attr and pointers.data.size == 1 and self.arguments is not None:
            pointers.attr["argument"] = self.arguments.get(int(pointers.data.flat[0]))
        return pointers.attr.get("argument")

    def _access(self, kind: str, pointers: Handle, mask) -> None:
        builder = stock.interpreter_builder
        x, y, z = builder.grid_idx
        program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        on = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
        addresses = pointers.data[on].astype(np.int64)
        argument = self._origin(pointers)
        if (addresses % width).any():
            name = argument.name if argument else "no one argument"
            raise Violation(f"misaligned {kind} of {width} bytes of {name} (program {program})")
        if addresses.size and argument is None:
            raise Violation(f"{kind} through a pointer of no one argument (program {program})")
        if addresses.size:
            argument.touch(kind, addresses, width, program, self.barriers)

    def methods(self) -> dict:
        """Methods of the interpreter's builder that check before they act."""

        def watched(kind, original):
            def method(builder, pointers, *rest, **options):
                self._access(kind, pointers, rest[mask_at[kind]])
                return original(builder, pointers, *rest, **options)

            return method

        def rmw(builder, op, pointers, value, mask, *rest):
            self._access("atomic", pointers, mask)
            return original_rmw(builder, op, pointers, value, mask, *rest)

        def cas(builder, pointers, *rest):
            self._access("atomic", pointers, everywhere)
            return original_cas(builder, pointers, *rest)

        def followed(original):
            def method(builder, *args, **options):
                out = original(builder, *args, **options)
                pointers = next((x for x in args if _is_pointer(x)), None)
                if pointers is not None:
                    out.attr["argument"] = self._origin(pointers)
                return out

            return method

        def create_assert(builder, condition, message):
            if not np.all(condition):
                raise Violation(str(message))

        def create_barrier(builder):
            self.barriers += 1

        mask_at = {"load": 0, "store": 1}
        everywhere = Handle(np.array([True]), tl.int1)
        original_rmw, original_cas = Builder.create_atomic_rmw, Builder.create_atomic_cas
        moves = ("addptr", "splat", "broadcast", "expand_dims", "reshape", "trans", "bitcast")
        return {f"create_{name}": followed(getattr(Builder, f"create_{name}")) for name in moves} | {
            "create_masked_load": watched("load", Builder.create_masked_load),
            "create_masked_store": watched("store", Builder.create_masked_store),
            "create_atomic_rmw": rmw,
            "create_atomic_cas": cas,
            "create_assert": create_assert,
            "create_barrier": create_barrier,
        }
