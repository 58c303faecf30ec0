"""What a collection writes: append-only JSONL files, one for each process ("shard"), which are the truth.

Everything else in the folder can be made again from them. A line is appended whole and synced with its batch, so
that a crash tears the last line of a shard at most.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout


class Place(NamedTuple):
    """Where a line stands: the file and the byte it begins at."""

    shard: int
    offset: int


class ItemLog:
    """The shards of one folder; this process appends to one of them and reads all.

    `append` locks the shard, and raises ValueError when another process holds it.
    """

    def __init__(self, folder: Path, shard: int = 0):
        self.folder, self.shard = folder, shard
        self.positions: dict[int, tuple[int, int]] = {}  # shard -> bytes and lines read
        self._file: Any = None
        self._readers: dict[int, Any] = {}
        self._lock = FileLock(folder / f"items-{shard}.lock", timeout=0)

    def path(self, shard: int) -> Path:
        return self.folder / f"items-{shard}.jsonl"

    def shards(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("items-")) for path in self.folder.glob("items-*.jsonl"))

    def open(self) -> None:
        """Lock this process's shard and make ready to append."""
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process writes to {self.path(self.shard)}; wait for it or choose another --output."
            ) from None
        self._file = open(self.path(self.shard), "ab", buffering=0)

    def close(self) -> None:
        for file in (self._file, *self._readers.values()):
            if file is not None:
                file.close()
        self._lock.release()

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Write lines, all of which are on the disk on return. What an error tore is cut off again."""
        data = memoryview("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            repair(self.path(self.shard))
            raise OSError(error.errno, error.strerror, str(self.path(self.shard))) from None

    def read(self) -> Iterator[tuple[dict[str, Any], Place]]:
        """Whole lines that were appended to any shard since the last call, and where they stand."""
        for shard in self.shards():
            at, lines = self.positions.get(shard, (0, 0))
            with open(self.path(shard), "rb") as file:
                file.seek(at)
                for raw in file:
                    if not raw.endswith(b"\n"):  # is being written
                        break
                    try:
                        record = json.loads(raw)
                    except ValueError:
                        raise ValueError(
                            f"{self.path(shard)} is damaged at line {lines + 1}; remove that line."
                        ) from None
                    yield record, Place(shard, at)
                    at, lines = at + len(raw), lines + 1
                    self.positions[shard] = at, lines

    def line(self, place: Place) -> bytes:
        """One line as it was written."""
        if place.shard not in self._readers:
            self._readers[place.shard] = open(self.path(place.shard), "rb")
        self._readers[place.shard].seek(place.offset)
        return self._readers[place.shard].readline()

    def lines_before(self, shard: int, end: int) -> int:
        """How many whole lines the first `end` bytes hold; -1 when there are fewer bytes or a line is cut."""
        count, last, left = 0, b"\n", end
        if not self.path(shard).is_file() or self.path(shard).stat().st_size < end:
            return -1
        with open(self.path(shard), "rb") as file:
            while left and (block := file.read(min(left, 1 << 20))):
                count, last, left = count + block.count(b"\n"), block[-1:], left - len(block)
        return count if last == b"\n" else -1


def repair(path: Path) -> int:
    """Cut off a last line that a crash tore, and return its length in bytes, 0 for a whole one."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = _line_start(file, size)
        file.seek(start)
        last = file.read()
        try:
            if not last or (last.endswith(b"\n") and isinstance(json.loads(last), dict)):
                return 0
        except ValueError:
            pass
        file.truncate(start)
        os.fsync(file.fileno())
        return size - start


def _line_start(file: Any, size: int) -> int:
    """Where the last line of a file begins, whether or not it ends with a newline."""
    end = size - 1  # a newline at the very end belongs to the last line
    while end > 0:
        begin = max(0, end - (1 << 16))
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0
