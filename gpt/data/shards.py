"""A folder of many .bin files: their ids as one array, and a shuffled order of windows without an index."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from gpt.data.token_files import BIN_NAMES, BinForm, bin_form, check_id, read_at
from gpt.data.tokenizers import FILE_NAME
from gpt.errors import InputError
from gpt.files import open_regular, user_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

    from gpt.data.token_files import Ids, Positions

MAPS = 64  # files that are mapped at a time: few enough for the usual limits on open files
BLOCKS, BLOCK = 4, 4096  # blocks of each file that are hashed at the start, and the bytes of one
LIMIT = 1 << 30  # the most ids that are copied into memory at once
ROUNDS = 8  # of the Feistel network
ORDER = 3  # the Philox stream of the order; those of random windows are below


def shard_files(sources: Sequence[str]) -> list[Path]:
    """The .bin files of a folder of shards, sorted by name; [] if `sources` is anything else.

    More than half of the visible entries of such a folder are .bin files, its tokenizer.json aside, and none
    is train.bin.
    """
    folder = user_path(sources[0], "data") if len(sources) == 1 else None
    if folder is None or not os.path.isdir(folder):
        return []
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".") and name != FILE_NAME]
    except OSError as error:
        raise InputError(f"data: cannot read {folder}: {error.strerror}") from error
    shards = sorted(name for name in names if name.endswith(".bin"))
    if BIN_NAMES["train"] in shards or 2 * len(shards) <= len(names):
        return []
    return [folder / name for name in shards]


def split_by_name(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files for training, and those for validation, which have "val" in their names."""
    validation = [file for file in files if "val" in file.name.lower()]
    return [file for file in files if file not in set(validation)], validation


class Shards:
    """The ids of .bin files, one file after another, as an array that is read where it is indexed.

    A slice is a view. An array of positions gives their ids. `np.asarray` copies all ids into memory.

    Args:
        files: The files and their sizes.
        begin, end: The positions in `files` at which the array begins and ends.
        separator: The id that ends a document, if documents are kept apart.

    Raises:
        InputError: When ids are read: one is not in the vocabulary, a file has another size than at the
            start, or cannot be read; or more than LIMIT ids are to be copied.
    """

    def __init__(self, files: ShardFiles, begin: int, end: int, separator: int | None = None) -> None:
        self._files, self._begin, self._end, self.separator = files, begin, end, separator

    def __repr__(self) -> str:
        return f"Shards({len(self):,} ids)"

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the ids in the files."""
        return self._files.dtype

    @overload
    def __getitem__(self, key: slice) -> Shards: ...
    @overload
    def __getitem__(self, key: Positions) -> Ids: ...
    def __getitem__(self, key: slice | Positions) -> Shards | Ids:
        if not isinstance(key, slice):
            return self._files.read(self._begin + key)
        begin, end, _ = key.indices(len(self))
        return Shards(self._files, self._begin + begin, self._begin + max(begin, end), self.separator)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Ids:
        return self._files.read_range(self._begin, self._end).astype(dtype or self.dtype, copy=False)

    def astype(self, dtype: DTypeLike) -> NDArray[Any]:
        """All ids, copied into memory as `dtype`."""
        return self.__array__(dtype)

    def tolist(self) -> list[int]:
        """All ids, copied into memory."""
        ids: list[int] = self.__array__().tolist()
        return ids

    @cached_property
    def _bounds(self) -> Positions:
        """The position of the first id of each file, and the length of the array."""
        import numpy as np

        return np.clip(self._files.bounds, self._begin, self._end) - self._begin

    def _windows_before(self, block_size: int) -> Positions:
        """How many windows there are before each of `_bounds`."""
        import numpy as np

        counts = np.maximum(np.diff(self._bounds) - 1, 0) // block_size
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def longest(self) -> int:
        """The number of ids of the file that has the most."""
        import numpy as np

        return int(np.diff(self._bounds).max(initial=0))

    def windows(self, block_size: int) -> int:
        """How many windows `starts` numbers."""
        return int(self._windows_before(block_size)[-1])

    def starts(self, numbers: Positions, block_size: int) -> Positions:
        """The positions at which windows begin.

        A window is `block_size` ids and the one after them. Windows of a file are adjacent; none crosses from
        a file into the next, so the end of each file, of up to `block_size` ids, has no window.

        Args:
            numbers: In [0, windows(block_size)).
            block_size: The length of a window.
        """
        import numpy as np

        before = self._windows_before(block_size)
        files = np.searchsorted(before, numbers, side="right") - 1
        return self._bounds[files] + (numbers - before[files]) * block_size

    def begins(self, positions: Positions, ids: Ids) -> Positions | None:
        """The begin of the document that each token is in, or of the row, where that is later.

        A document begins after each separator. None if documents are not kept apart.

        Args:
            positions: (B, T) adjacent positions in each row.
            ids: (B, T) their ids.
        """
        import numpy as np

        if self.separator is None:
            return None
        begins = np.ones(ids.shape, bool)
        begins[:, 1:] = ids[:, :-1] == self.separator
        return np.maximum.accumulate(np.where(begins, positions, 0), axis=1)


class ShardFiles:
    """.bin files of one form, which are mapped when they are read.

    Args:
        paths: The files.
        vocab_size: Ids are below it; each is checked when it is read.

    Attributes:
        bounds: The position of the first id of each file, and the number of all ids.
        dtype: The dtype of the ids.
        sha256: A hash of the name and size of each file and of BLOCKS blocks of it: its begin with the
            header, its end, and those spread evenly between them. It shows files that are missing, added,
            renamed, of another length or made from other text, and misses other ids outside of the blocks.

    Raises:
        InputError: A file is missing, not a regular file, not of a known form (see `bin_form`), or of another
            form than the first.
    """

    def __init__(self, paths: Sequence[Path], vocab_size: int) -> None:
        import numpy as np
        from tqdm import tqdm

        self._paths, self._vocab_size = paths, vocab_size
        self._maps: OrderedDict[int, Ids] = OrderedDict()  # the last one is the one that was read last
        form, hashed = BinForm(0, "<u2", 0), hashlib.sha256()
        counts: list[int] = []
        sizes: list[int] = []
        for path in tqdm(paths, desc="opening", unit=" files", leave=False, delay=1):
            with open_regular(path, "data") as file:
                size = os.fstat(file.fileno()).st_size
                places = sorted({max(0, (size - BLOCK) * i // (BLOCKS - 1)) for i in range(BLOCKS)})
                blocks = [read_at(file, place, BLOCK, path) for place in places]
            previous, form = form, bin_form(blocks[0], size, path)
            if counts and form[:2] != previous[:2]:
                raise InputError(
                    f"data: {path} has {_words(form)}, expected {_words(previous)}, as {paths[0].name} has"
                )
            counts.append(form.number)
            sizes.append(size)
            for part in (os.fsencode(path.name), str(size).encode(), *blocks):
                hashed.update(len(part).to_bytes(8, "little") + part)
        self.dtype, self._header = np.dtype(form.dtype), form.header
        self.bounds = np.cumsum(np.array([0, *counts], np.int64))
        self._sizes = np.array(sizes, np.int64)
        self.sha256 = hashed.hexdigest()

    def all(self, separator: int | None) -> Shards:
        """All ids; see `Shards`."""
        return Shards(self, 0, int(self.bounds[-1]), separator)

    def read(self, positions: Positions) -> Ids:
        """The ids at `positions`, which is fast where adjacent positions are in the same file."""
        import numpy as np

        flat = positions.ravel()
        files = np.searchsorted(self.bounds, flat, side="right") - 1
        ids = np.empty(len(flat), self.dtype)
        cuts = np.flatnonzero(np.diff(files)) + 1
        for begin, end in pairwise([0, *cuts.tolist(), len(flat)]):
            if begin < end:
                file = int(files[begin])
                ids[begin:end] = self._read_file(file, flat[begin:end] - self.bounds[file])
        return ids.reshape(positions.shape)

    def read_range(self, begin: int, end: int) -> Ids:
        """The ids at the positions [begin, end).

        Raises:
            InputError: There are more than LIMIT.
        """
        import numpy as np

        if end - begin > LIMIT:
            raise InputError(
                f"data: {self._paths[0].parent} has {end - begin:,} tokens, expected at most {LIMIT:,} to "
                "read at once"
            )
        ids = np.empty(end - begin, self.dtype)
        place = begin
        while place < end:
            file = int(np.searchsorted(self.bounds, place, side="right")) - 1
            first, after = (int(bound) for bound in self.bounds[file : file + 2])
            stop = min(end, after)
            ids[place - begin : stop - begin] = self._read_file(file, slice(place - first, stop - first))
            place = stop
        return ids

    def _read_file(self, file: int, places: slice | Positions) -> Ids:
        """The ids at `places` of a file: single windows from a memory map, a slice by reading it.

        Raises:
            InputError: The file has another size than before, or an id is not in the vocabulary.
        """
        path = self._paths[file]
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise InputError(f"data: cannot read {path}: {error.strerror}") from error
        if size != self._sizes[file]:
            raise InputError(
                f"data: {path} has {size} bytes, expected {self._sizes[file]}, as at the start of the run"
            )
        ids = self._copy(path, places) if isinstance(places, slice) else self._map(file)[places]
        if (largest := int(ids.max())) >= self._vocab_size:
            place = int(ids.argmax())
            position = places.start + place if isinstance(places, slice) else int(places[place])
            check_id(largest, position, self._vocab_size, str(path))
        return ids

    def _copy(self, path: Path, places: slice) -> Ids:
        """The ids at `places` of a file."""
        import numpy as np

        width = self.dtype.itemsize
        begin, size = self._header + places.start * width, (places.stop - places.start) * width
        with open_regular(path, "data") as file:
            return np.frombuffer(read_at(file, begin, size, path), self.dtype)

    def _map(self, file: int) -> Ids:
        """The ids of a file as a memory map, which is kept while few others are used."""
        import numpy as np

        if file in self._maps:
            self._maps.move_to_end(file)
            return self._maps[file]
        path = self._paths[file]
        with open_regular(path, "data") as opened:
            try:
                content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise InputError(f"data: cannot map {path}: {error}") from error
        if hasattr(mmap, "MADV_RANDOM"):  # else the system may read megabytes ahead of each window
            content.madvise(mmap.MADV_RANDOM)
        self._maps[file] = np.frombuffer(content, self.dtype, offset=self._header)
        if len(self._maps) > MAPS:
            self._maps.popitem(last=False)
        return self._maps[file]


def shuffled(first: int, size: int, n: int, seed: int) -> Positions:
    """The items [first, first + size) of an endless sequence: range(n) in another order in each epoch.

    Args:
        first, size: The numbers of the items.
        n: How many items an epoch has, at least 1.
        seed: The order of an epoch is a function of it and of the number of the epoch.
    """
    import numpy as np

    epoch, place = divmod(first, n)
    later, places = np.divmod(place + np.arange(size), n)
    parts = [permuted(places[later == i], n, seed, epoch + i) for i in range(int(later.max(initial=0)) + 1)]
    return np.concatenate(parts)


def permuted(numbers: Positions, n: int, seed: int, epoch: int) -> Positions:
    """A pseudo-random permutation of range(n), a function of (seed, epoch), at `numbers`.

    A number is a pair (left, right) with left < a and right < b, where a b is n or slightly more. Each round
    adds a keyed hash of one of the pair to the other, which can be undone, so all rounds are a permutation of
    range(a b). It is applied again where its result is not below n (cycle walking), which makes it one of
    range(n). Nothing is stored.

    Args:
        numbers: In [0, n).
        n: The length of the permutation, at least 1.
        seed, epoch: The key.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 4; the hash is
    SplitMix64's.
    """
    import numpy as np

    keys = np.random.Philox(key=seed, counter=[0, 0, epoch, ORDER]).random_raw(2 * ROUNDS)
    b = np.uint64(math.isqrt(n - 1) + 1)
    a = np.uint64(-(-n // int(b)))

    def encrypted(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(numbers, b)
        for i in range(0, 2 * ROUNDS, 2):
            left = (left + _hash(right + keys[i]) % a) % a
            right = (right + _hash(left + keys[i + 1]) % b) % b
        return left * b + right

    result = encrypted(numbers.astype(np.uint64))
    while (outside := result >= np.uint64(n)).any():
        result[outside] = encrypted(result[outside])
    return result.astype(np.int64)


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's mixing of 64 bits."""
    import numpy as np

    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(form: BinForm) -> str:
    """What a file of this form has, for a message."""
    return (
        f"{'uint16' if form.dtype == '<u2' else 'uint32'} ids {'after a header' if form.header else 'alone'}"
    )
