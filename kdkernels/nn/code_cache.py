# SPDX-License-Identifier: Apache-2.0
"""Hash bits of a frozen teacher over a whole data set, computed once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from kdkernels._progress import Progress
from kdkernels.nn._dataset_order import Places, placed
from kdkernels.nn._raw import raw_bytes
from kdkernels.nn.lsh import LSHFeatureMimickingLoss

# A header block (magic, then JSON padded with spaces), and behind it weight, bias and codes, each
# from a multiple of ALIGNMENT on.
MAGIC = b"kdkernels codes\n"
VERSION = 1
HEADER_BYTES = 4096
ALIGNMENT = 64
# What wrappers put into the names of a state_dict: torch.compile, DataParallel and
# DistributedDataParallel, FullyShardedDataParallel, and wrappers for activation checkpoints.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
ROWS = 8192  # of codes put in order at a time
DTYPES = {
    str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


class CodeCache:
    """Codes of a data set in a memory-mapped file written by `encode_dataset`, indexed by sample.

    Only what is read is loaded. Copies in other processes (the workers of a data loader) map the
    same file.

    Args:
        path: The file.
        criterion: The loss that the codes are used with; its directions and bias must be those in
            the file.
        teacher: Must be the teacher that was hashed, judged by its `fingerprint`.
        samples: How many samples the data set has.

    Attributes:
        codes: uint8 [samples, ceil(N / 8)], mapped. Indexing the cache copies what it reads.
        weight, bias: [N, D] and [N], as they were.
        teacher: The fingerprint of the teacher.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, truncated, or it does not match what it is used with.
        RuntimeError: by indexing, where the file has become shorter since.

    Example:
        >>> cache = CodeCache("train.codes", criterion=criterion, teacher=teacher)
        >>> loss = criterion(student(images), codes=cache[index].to(device))  # form="lsh"
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        criterion: LSHFeatureMimickingLoss | None = None,
        teacher: nn.Module | None = None,
        samples: int | None = None,
    ) -> None:
        self.path = Path(path).resolve()
        header = _read_header(self.path)
        N, D = header["bits"], header["dim"]
        self._bytes = header["bytes"]
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), self._bytes, access=mmap.ACCESS_COPY)
        memory = torch.frombuffer(self._map, dtype=torch.uint8)

        def part(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
            first, count = header["offsets"][name], dtype.itemsize
            for size in shape:
                count *= size
            return memory[first : first + count].view(dtype).view(shape)

        dtype = DTYPES[header["dtype"]]
        self.weight = part("weight", dtype, N, D).clone()
        self.bias = part("bias", dtype, N).clone()
        self._codes = part("codes", torch.uint8, header["samples"], (N + 7) // 8)
        self.teacher: str = header["teacher"]
        self._refuse_mismatch(criterion, teacher, samples)

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def codes(self) -> Tensor:
        """All codes, read from the file where they are used. Prefer indexing the cache, which looks
        after the file."""
        self._refuse_cut()
        return self._codes

    def __getitem__(self, samples: Any) -> Tensor:
        """Codes of a sample (an int), or of several (a slice, a list or an integer tensor)."""
        codes = self.codes[samples.cpu() if isinstance(samples, Tensor) else samples]
        # a view would be read later, when the file may be shorter
        return codes.clone() if isinstance(samples, (int, slice)) else codes

    def _refuse_cut(self) -> None:
        """To read what a file had when it was mapped, and has no more, would end the process."""
        size = self._map.size()
        if size < self._bytes:
            raise RuntimeError(
                f"{self.path} has been cut to {size} bytes since it was opened, expected "
                f"{self._bytes}: its codes can no longer be read"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return CodeCache, (str(self.path),)

    def _is_of(self, teacher: nn.Module) -> bool:
        if fingerprint(teacher) == self.teacher:
            return True
        # files of a wrapped teacher that were written when names still had the wrappers' prefixes
        return _digest(teacher, lambda name: name) == self.teacher

    def _refuse_mismatch(
        self,
        criterion: LSHFeatureMimickingLoss | None,
        teacher: nn.Module | None,
        samples: int | None,
    ) -> None:
        if criterion is not None:
            weight, bias = criterion.hash()
            for name, kept, given in (("weight", self.weight, weight), ("bias", self.bias, bias)):
                given = given.detach().cpu()
                if given.shape != kept.shape or given.dtype != kept.dtype:
                    expected = f"{kept.dtype} {list(kept.shape)}"
                    got = f"{given.dtype} {list(given.shape)}"
                    raise ValueError(
                        f"criterion must have the hash_{name} that {self.path.name} was made with, "
                        f"{expected}, got {got}"
                    )
                if not torch.equal(kept, given):
                    raise ValueError(
                        f"criterion must have the hash_{name} that {self.path.name} was made with, "
                        "got other numbers of the same shape"
                    )
        if teacher is not None and not self._is_of(teacher):
            raise ValueError(
                f"teacher must be the one that {self.path.name} was made with (fingerprint "
                f"{self.teacher[:12]}...), got {fingerprint(teacher)[:12]}..."
            )
        if samples is not None and samples != len(self):
            raise ValueError(f"samples must be {len(self)} as in {self.path.name}, got {samples}")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of the names, shapes, dtypes and numbers of everything in the module's state_dict.

    Names are those without wrappers, at any depth: a module has the same fingerprint under
    `torch.compile`, in `DataParallel`, `DistributedDataParallel` and `FullyShardedDataParallel` (if
    its state_dict is the full one) and in a wrapper for activation checkpoints.
    """
    return _digest(module, lambda name: ".".join(x for x in name.split(".") if x not in WRAPPERS))


def _digest(module: nn.Module, plain_name: Callable[[str], str]) -> str:
    digest = hashlib.sha256()
    for full_name, value in module.state_dict().items():
        name = plain_name(full_name)
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
            digest.update(raw_bytes(plain))
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


@torch.no_grad()
def encode_dataset(
    teacher: nn.Module,
    loader: Iterable[Any],
    criterion: LSHFeatureMimickingLoss,
    path: str | os.PathLike[str],
    *,
    inputs: Callable[[Any], Any] | None = None,
    features: Callable[[Any], Tensor] | None = None,
    index_of: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> CodeCache:
    """Hash a frozen teacher's features of a data set into a file, once.

    The teacher runs in evaluation mode and is left as it was. The file appears when it is complete,
    in place of an older one of that name; an error leaves neither a part of it nor changes the old
    one.

    Code i is that of sample i. That is known of

    - a plain `torch.utils.data.DataLoader` over a data set with places, with any sampler or
      batch_sampler of its own: the places are those that its sampler draws, and batches are taken
      in that order even with in_order=False. Its `collate_fn` must keep the order of the samples of
      a batch; for one that sorts them, give `index_of`;
    - a `DataLoader` over an `IterableDataset` with at most one worker, and a list, tuple or
      generator of batches: they come in the order of the data set by definition;
    - any loader at all with `index_of`.

    Every other loader is refused, also a subclass of `DataLoader` and what wraps one; so is a
    `DataLoader` with shuffle=True, for which shuffle=False gives the same codes.

    Args:
        teacher: Any module. Sees the data as the loader gives it: with random augmentation, each
            sample's code is that of the one view drawn here.
        loader: Batches of the data set, see above. It gives each sample once.
        criterion: Owner of the directions and the (fitted) bias.
        path: The file to write.
        inputs: What the teacher is called with, from a batch; by default the batch, or its first
            entry if it is a tuple or list. Moved to the teacher's device if it is a tensor.
        features: The features [B, ...] in the teacher's output; by default the output.
        index_of: Where the samples of a batch are in the data set: from a batch to integers [B], a
            tensor, an array or a list, e.g. `lambda batch: batch["index"]`.
        progress: A bar on standard error, where that is a terminal.

    Returns:
        The opened file.

    Raises:
        TypeError, ValueError: a loader whose order is not known, that leaves samples out, gives one
            twice or is empty, by name and with what to do; or features that do not fit the
            criterion, or have not one row per sample.
    """
    samples, batches = placed(loader, index_of)
    weight, bias = (x.detach().cpu().contiguous() for x in criterion.hash())
    device = next((x.device for x in teacher.parameters()), criterion.hash()[0].device)
    header: dict[str, Any] = {
        "version": VERSION,
        "bits": weight.shape[0],
        "dim": weight.shape[1],
        "dtype": str(weight.dtype),
        "teacher": fingerprint(teacher),
        "offsets": {},
    }
    target, places = Path(path), Places(samples)
    total = _batches(loader) if progress else 0
    with _replacing(target) as file, _evaluating(teacher), Progress(total, "hashing") as bar:
        file.seek(HEADER_BYTES)
        for name, tensor in (("weight", weight), ("bias", bias)):
            header["offsets"][name] = _align(file)
            file.write(raw_bytes(tensor))
        header["offsets"]["codes"] = first = _align(file)
        for batch, of_batch in batches:
            x = _first(batch) if inputs is None else inputs(batch)
            output = teacher(x.to(device) if isinstance(x, Tensor) else x)
            found = output if features is None else features(output)
            codes = criterion.encode(found.to(criterion.hash()[0])).cpu()
            places.add(len(codes), of_batch)
            file.write(raw_bytes(codes))
            if progress:
                bar.step(f"{places.count} samples")
        header["samples"], header["bytes"] = places.count, file.tell()
        order = places.finish()
        if order is not None:
            _put_in_order(file, first, order)
        text = MAGIC + json.dumps(header).encode()
        file.seek(0)
        file.write(text.ljust(HEADER_BYTES))
    return CodeCache(target)


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        block = file.read(HEADER_BYTES)
    if not block.startswith(MAGIC):
        raise ValueError(f"{path.name} is not a file of codes written by encode_dataset")
    size = path.stat().st_size
    if len(block) < HEADER_BYTES:
        raise ValueError(f"{path.name} is truncated: {size} bytes, not even its header")
    header = json.loads(block[len(MAGIC) :])
    if header["version"] != VERSION:
        raise ValueError(
            f"{path.name} has version {header['version']} of the format, expected {VERSION}"
        )
    if size != header["bytes"]:
        kind = "is truncated" if size < header["bytes"] else "has been written to"
        raise ValueError(f"{path.name} {kind}: {size} bytes, expected {header['bytes']}")
    return header


@contextmanager
def _replacing(target: Path) -> Any:
    """A file beside the target, which becomes the target if all goes well."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _evaluating(module: nn.Module) -> Any:
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


def _align(file: BinaryIO) -> int:
    position = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    file.seek(position)
    return position


def _put_in_order(file: BinaryIO, first: int, places: Tensor) -> None:
    """Rows of a file from `first` on to their places, by way of a temporary file."""
    with tempfile.TemporaryFile(prefix="kdkernels-") as copied:
        file.seek(first)
        shutil.copyfileobj(file, copied)
        copied.flush()
        memory = mmap.mmap(copied.fileno(), 0, access=mmap.ACCESS_COPY)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(len(places), -1)
        file.seek(first)
        for part in places.argsort().split(ROWS):
            block = rows[part]
            file.write(raw_bytes(block))


def _batches(loader: Iterable[Any]) -> int:
    """0 where nobody knows, as for a DataLoader over a stream."""
    stream = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    try:
        return len(loader) if isinstance(loader, Sized) and not stream else 0
    except TypeError:  # a DataLoader whose batch_sampler has no length
        return 0


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch
