"""Texts from wherever a corpus lives, one document at a time, never the whole of it in memory."""

import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SAMPLE_BY = ("auto", "line", "paragraph", "document")
_HEAD = 1 << 20


def documents(
    source: str | Path | Iterable[str],
    *,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    sample_by: str = "auto",
) -> Iterator[str]:
    """The documents of a corpus, as a stream of non-blank texts.

    `source` is one of:
      a path to .jsonl, .json, .csv, .tsv or .parquet    `column` of each row; rows without a text are skipped
      a path to any other file                           text, cut into documents as `sample_by` says
      a `datasets.Dataset` or `IterableDataset`          `column` of each row
      any other iterable                                 its strings
      a name that is no path                             a dataset of the hub, streamed; `config`, `split`

    `sample_by` is "line" (each line is a document), "paragraph" (blocks between blank lines, whose lines
    are joined by a space), "document" (the whole file), or "auto": paragraph where the first MiB of text
    holds a blank line, else line. Line ends become "\\n"; a byte order mark is dropped.

    Raises FileNotFoundError for a missing file or dataset; ValueError for a folder, a column that does not
    exist, what is not UTF-8 text or holds a NUL byte, values that are no strings, options that do not
    apply, and, when the stream ends, for a corpus without any text. Arguments are checked at the call,
    content as it is read.
    """
    if sample_by not in SAMPLE_BY:
        raise ValueError(f"sample_by must be one of {', '.join(SAMPLE_BY)}, got {sample_by!r}.")
    if source == "":
        raise ValueError("The name of the corpus is empty; give a file or a dataset.")
    is_path = isinstance(source, Path) or isinstance(source, str) and _names_a_file(source)
    is_hub_name = isinstance(source, str) and not is_path
    reader = _READERS.get(Path(str(source)).suffix.lower()) if is_path else None
    name = str(source) if is_path or is_hub_name else f"The {type(source).__name__}"
    if sample_by != "auto" and (reader or not is_path):
        raise ValueError(f"sample_by={sample_by!r} cuts text files; {name} has its own documents.")
    for key, value, default in (("config", config, None), ("split", split, "train")):
        if value != default and not is_hub_name:
            raise ValueError(f"{key}={value!r} chooses part of a dataset of the hub; {name} is none.")
    if column != "text" and is_path and not reader:
        raise ValueError(f"column={column!r} is for files with columns; {name} is read as plain text.")

    texts: Iterable[Any]
    if is_hub_name:
        texts = _column(_hub_dataset(str(source), config, split), column, name)
    elif is_path:
        path = _existing_file(Path(str(source)))
        if reader:
            texts = _column(_parsed(reader(path, column), path), column, name)
        else:
            texts = _parsed(_cut(path, sample_by), path)
    elif hasattr(source, "column_names") and not isinstance(source, Mapping):
        texts = _column(source, column, name)
    else:
        texts = _strings(source, name)
    return _clean(texts, name)


def _clean(texts: Iterable[Any], name: str) -> Iterator[str]:
    """What every corpus has in common: strings, without blank ones, and at least one."""
    found = False
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} holds {type(text).__name__} where text should be: {text!r:.60}.")
        if "\0" in text:
            raise ValueError(f"{name} holds a NUL byte, so it is not text; give it as UTF-8 text.")
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
        if text and not text.isspace():
            found = True
            yield text
    if not found:
        raise ValueError(f"{name} is empty: it holds no text but white space.")


def _strings(source: Any, name: str) -> Iterable[Any]:
    if isinstance(source, Mapping):  # a DatasetDict iterates over the names of its splits
        parts = ", ".join(map(repr, itertools.islice(source, 5)))
        raise ValueError(f"{name} holds several parts ({parts}); give one of them.")
    if not isinstance(source, Iterable):
        raise ValueError(f"A corpus is a path, a dataset or an iterable of strings, got {source!r:.60}.")
    return source


def labelled(path: str | Path, text: str = "text", label: str = "label") -> list[tuple[str, str]]:
    """(text, label) of each row of a csv, tsv, jsonl or json file; labels as strings, blank texts left out.

    Raises FileNotFoundError when there is no such file, ValueError when a column is missing or no row has text.
    """
    path = _existing_file(Path(path))
    reader = _READERS.get(path.suffix.lower())
    if reader is None or path.suffix.lower() == ".parquet":
        raise ValueError(f"Labelled texts come as csv, tsv, jsonl or json, with columns {text!r} and {label!r}; "
                         f"got {path}.")  # fmt: skip
    pairs = []
    for row in _parsed(reader(path, text), path):
        if not isinstance(row, Mapping) or text not in row or label not in row:
            has = ", ".join(map(repr, row)) if isinstance(row, Mapping) else f"{row!r:.60}"
            raise ValueError(f"{path} needs the columns {text!r} and {label!r}; a row has {has}.")
        if str(row[text]).strip():
            pairs.append((str(row[text]), str(row[label])))
    if not pairs:
        raise ValueError(f"{path} is empty: it holds no labelled text.")
    return pairs


# --- text ---


def _cut(path: Path, sample_by: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:  # universal newlines
        if sample_by == "document":
            yield file.read().strip()
            return
        head = file.readlines(_HEAD)  # not read twice: the path may be a pipe
        if sample_by == "auto":
            has_gap = re.search(r"\n[^\S\n]*\n", "".join(head).strip())
            sample_by = "paragraph" if has_gap else "line"
        lines = (line.strip() for line in itertools.chain(head, file))
        if sample_by == "line":
            yield from lines
        else:
            for has_text, block in itertools.groupby(lines, key=bool):
                if has_text:
                    yield " ".join(block)


# --- rows ---


def _column(rows: Any, column: str, name: str) -> Iterator[Any]:
    """The values of a column; those that are None, as missing texts are, left out."""
    known = getattr(rows, "column_names", None)
    if known is not None and column in known:
        rows = rows.select_columns([column])  # spares decoding the others
    for row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{name} holds a row that is not an object with columns: {row!r:.60}.")
        if column not in row:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(map(repr, row))}.")
        if row[column] is not None:
            yield row[column]


# `datasets` reads these formats too, but it guesses types (a text "2020-01-01" becomes a date, "02" a
# number), takes brackets in a path for a pattern, and leaves a lock file a source in its cache.


def _json_rows(path: Path, column: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith("["):  # one array: there is no streaming that
                yield from json.loads(line + file.read())
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON object ({error.msg})") from None


def _csv_rows(path: Path, column: str, separator: str) -> Iterator[Mapping]:
    import pandas

    reading = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "chunksize": 1000}
    try:
        for chunk in pandas.read_csv(path, sep=separator, **reading):
            if not isinstance(chunk.index, pandas.RangeIndex):  # pandas would take the first as labels
                raise ValueError("rows have more fields than the header; put texts in quotes")
            yield from chunk.to_dict("records")
    except pandas.errors.EmptyDataError:
        return


def _parquet_rows(path: Path, column: str) -> Iterator[Mapping]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        wanted = [column] if column in file.schema_arrow.names else None
        for batch in file.iter_batches(batch_size=1000, columns=wanted):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": functools.partial(_csv_rows, separator=","),
    ".tsv": functools.partial(_csv_rows, separator="\t"),
    ".parquet": _parquet_rows,
}
_TEXT_SUFFIXES = (".txt", ".text", ".md")


def _parsed(items: Iterator[Any], path: Path) -> Iterator[Any]:
    """The items, with what a parser says about a bad file put into one sentence."""
    try:
        yield from items
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 text (byte 0x{byte:02x}); convert it to UTF-8.") from None
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"{path} cannot be read as {path.suffix[1:] or 'text'}: {reason}.") from None


# --- where ---


def _names_a_file(source: str) -> bool:
    """Whether a string is a path rather than the name of a dataset: a missing book.txt or ./book is a path."""
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        return True
    return os.path.exists(source) or Path(source).suffix.lower() in (*_READERS, *_TEXT_SUFFIXES)


def _existing_file(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give one file, or the texts of all files as an iterable.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    return path


def _hub_dataset(name: str, config: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except (FileNotFoundError, ConnectionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise FileNotFoundError(
            f"{name!r} is neither a file here nor a dataset that can be had from the hub: {reason}."
        ) from error
