"""Artifacts: what a method fits, frozen, on disk as `artifact.json` + `artifact.safetensors`.

The folder holds numbers and text only (no pickle, no import strings), is written beside its place and
renamed into it, and remembers the tokenizer it was fitted for: an artifact that silently meets another
tokenizer is the worst failure in this field.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TextIO

import numpy as np

FORMAT = 1
_JSON, _TENSORS = "artifact.json", "artifact.safetensors"
_NARROW = (np.uint8, np.uint16, np.int32)


class Artifact:
    """Base of fitted things: `tokenizer` (see `describe_tokenizer`), scalars and integer or float arrays.

    Subclasses set `kind` and implement `_state() -> (scalars, arrays)` and `_restore(...)`.
    """

    kind: ClassVar[str]
    tokenizer: dict[str, Any]

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        raise NotImplementedError

    @classmethod
    def _restore(cls, tokenizer: dict, scalars: dict, arrays: dict[str, np.ndarray]) -> Self:
        raise NotImplementedError

    def save(self, folder: str | Path, force: bool = False) -> None:
        """Write the artifact as a folder, all or nothing; `force` replaces an existing one."""
        scalars, arrays = self._state()
        with new_folder(folder, force) as new:
            write_artifact(new, self.kind, self.tokenizer, scalars, arrays)

    @classmethod
    def load(cls, folder: str | Path, base: Path | None = None) -> Self:
        """Read a saved artifact: a path, a path relative to `base`, or the name of a bundled one.

        Raises FileNotFoundError when there is none, ValueError when it is damaged, of another kind or of
        a newer format; each message names what was found and what was expected.
        """
        folder = _find(folder, base)
        document = _read_json(folder / _JSON)
        if document["format"] > FORMAT:
            raise ValueError(
                f"{folder} has artifact format {document['format']}, written by logitproc "
                f"{document.get('library')}; this version reads up to {FORMAT}. Upgrade logitproc."
            )
        if document.get("kind") != cls.kind:
            raise ValueError(f"{folder} holds a {document.get('kind')!r}, not a {cls.kind!r}.")
        arrays = _read_tensors(folder / document.get("tensors", _TENSORS), document["sha256"])
        try:
            return cls._restore(document["tokenizer"], document["scalars"], arrays)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / _JSON} is damaged: it does not fit its arrays ({error}). Fit or copy the artifact again."
            ) from error

    def fingerprint(self) -> str:
        """SHA-256 of what the artifact holds, wherever it was loaded from."""
        scalars, arrays = self._state()
        digest = hashlib.sha256(json.dumps([self.tokenizer, scalars], sort_keys=True).encode())
        for name in sorted(arrays):
            digest.update(name.encode() + arrays[name].tobytes())
        return digest.hexdigest()

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError unless `tokenizer` maps the same tokens to the same ids."""
        ours, theirs = self.tokenizer, describe_tokenizer(tokenizer)
        if ours["fingerprint"] != theirs["fingerprint"]:
            raise ValueError(
                f"This {self.kind} was fitted for the tokenizer {ours['name']} ({ours['vocab_size']} "
                f"tokens, {ours['fingerprint'][:12]}); the model's is {theirs['name']} "
                f"({theirs['vocab_size']} tokens, {theirs['fingerprint'][:12]}). Fit one for this model."
            )


def kind_of(folder: str | Path, base: Path | None = None) -> str:
    """The kind of a saved artifact; errors as `Artifact.load`."""
    return str(_read_json(_find(folder, base) / _JSON).get("kind"))


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Fingerprint, name, vocab_size (largest id + 1) and special ids of a transformers tokenizer.

    The fingerprint is the SHA-256 of the sorted (token, id) pairs, the bos, eos and unknown ids and the
    normaliser. Other special tokens are left out: users set or add a pad token freely, and it never
    changes what a text means. Kept for each tokenizer until tokens are added or its settings change, as every
    `logitproc.generate` asks.
    """
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    normalizer = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None))
    marked = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    special_ids = sorted(tokenizer.all_special_ids)
    state = [len(tokenizer), tokenizer.name_or_path, marks, marked, special_ids, normalizer]
    key = id(tokenizer)
    known = _described.get(key)
    if known is None or known[0]() is not tokenizer or known[1] != state:
        about = _describe(tokenizer, marks, set(marked) - set(marks), normalizer)
        known = _described[key] = weakref.ref(tokenizer, lambda _: _described.pop(key, None)), state, about
    return known[2] | {"special": list(special_ids)}


_described: dict[int, tuple[Any, list[Any], dict[str, Any]]] = {}  # by identity: tokenizers need not be hashable


def _describe(tokenizer: Any, marks: list[int | None], special: set[int | None], normalizer: str) -> dict[str, Any]:
    vocab = sorted(tokenizer.get_vocab().items())
    plain = [(token, token_id) for token, token_id in vocab if token_id not in special]
    identity = [plain, marks, normalizer]
    return {
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "name": Path(str(tokenizer.name_or_path)).name or type(tokenizer).__name__,
        "vocab_size": max(token_id for _, token_id in vocab) + 1,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }


@contextlib.contextmanager
def new_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and vanishes when it fails.

    Raises FileExistsError as `check_new` does, before any work is done.
    """
    path = Path(path)
    check_new(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
            try:
                os.replace(new, path)
            except BaseException:
                os.replace(old / path.name, path)
                raise
            finally:
                shutil.rmtree(old)
        else:
            os.replace(new, path)
        new = path
    finally:
        if new != path:
            shutil.rmtree(new, ignore_errors=True)
    path.chmod(0o777 & ~_umask())  # mkdtemp made it private


def check_new(path: str | Path, force: bool = False) -> None:
    """Raise OSError when a folder `path` cannot be made: FileExistsError when it exists, unless `force` is on and
    logitproc wrote what is there.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another folder or pass --force to replace it.")
    if path.exists() and not _replaceable(path):
        raise FileExistsError(f"{path} exists and holds nothing that logitproc wrote; it is not replaced.")
    check_place(path)


def check_place(path: str | Path) -> None:
    """Raise OSError when nothing new can be made at `path`: the nearest folder that exists takes no new names."""
    path = Path(path)
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=above).cleanup()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {above} takes no new folder ({error.strerror}).") from None


def _replaceable(path: Path) -> bool:
    """Whether `path` is an empty folder, or one that this module, a chain or a converted model wrote."""
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    return not names or bool(names & {_JSON, "chain.json", "modeling_logitproc.py"})


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[TextIO]:
    """Yield a temporary text file that becomes `path` when the block ends, and vanishes when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            yield file
        _sync(Path(name))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a small file, all or nothing."""
    with new_file(path) as file:
        file.write(text)


def write_artifact(
    folder: Path, kind: str, tokenizer: dict, scalars: Mapping, arrays: Mapping[str, np.ndarray]
) -> None:
    """Write both files into an existing folder. The same content gives the same bytes.

    Arrays may be memory maps: they are copied block by block, so they need not fit in memory (the
    safetensors package would hold them all). Integers are stored in the narrowest type that holds them.
    """
    digest = _write_tensors(folder / _TENSORS, arrays)
    (folder / _JSON).write_text(_document(kind, tokenizer, scalars, digest), encoding="utf-8")


def swap_artifact(
    folder: Path, kind: str, tokenizer: dict, scalars: Mapping, arrays: Mapping[str, np.ndarray]
) -> None:
    """Replace the artifact in `folder`, killed at any moment, by nothing or by all of the new one.

    The arrays get a file of their own; the JSON that names it is renamed over the old one.
    Raises FileExistsError when the folder holds anything but an artifact of this kind.
    """
    current = _read_json(folder / _JSON) if (folder / _JSON).is_file() else {}
    if current.get("kind") != kind if current else any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and holds no {kind}; it is not replaced.")
    _drop_arrays(folder, but=current.get("tensors", _TENSORS))  # what a killed call has left
    new = folder / f"artifact-{os.urandom(8).hex()}.safetensors"
    digest = _write_tensors(new, arrays)
    _sync(new)
    write_text(folder / _JSON, _document(kind, tokenizer, scalars, digest, new.name))
    _sync(folder)
    _drop_arrays(folder, but=new.name)


def _drop_arrays(folder: Path, but: str) -> None:
    for file in folder.glob("artifact*.safetensors"):
        if file.name != but:
            file.unlink()


def _document(kind: str, tokenizer: dict, scalars: Mapping, digest: str, tensors: str = _TENSORS) -> str:
    from . import __version__

    document = {
        "format": FORMAT, "kind": kind, "library": __version__, "sha256": digest, "tensors": tensors,
        "tokenizer": tokenizer, "scalars": dict(scalars),
    }  # fmt: skip
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


_BLOCK = 1 << 22
_SAFETENSORS_NAMES = {
    "uint8": "U8", "uint16": "U16", "int32": "I32", "int64": "I64", "float32": "F32", "float64": "F64",
}  # fmt: skip


def _write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    header, offset, stored = {}, 0, {}
    for name in sorted(arrays):
        array = arrays[name]
        dtype = narrowest(array) if array.dtype.kind in "iu" else array.dtype
        size = array.size * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[np.dtype(dtype).name], "shape": list(array.shape),
            "data_offsets": [offset, offset + size],
        }  # fmt: skip
        stored[name], offset = dtype, offset + size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            file.write(part)
        for name in sorted(arrays):
            flat = arrays[name].reshape(-1)
            for start in range(0, flat.size, _BLOCK):
                block = np.ascontiguousarray(flat[start : start + _BLOCK].astype(stored[name]))
                digest.update(block.data.cast("B"))
                file.write(block.data.cast("B"))
    return digest.hexdigest()


def narrowest(array: np.ndarray) -> np.dtype:
    """The smallest of uint8, uint16, int32, int64 that holds every value."""
    if array.size == 0:
        return np.dtype(np.uint8)
    flat = array.reshape(-1)
    blocks = [flat[i : i + _BLOCK] for i in range(0, flat.size, _BLOCK)]
    low, high = min(int(b.min()) for b in blocks), max(int(b.max()) for b in blocks)
    for dtype in _NARROW:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.int64)


def _read_tensors(path: Path, digest: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is damaged: {path.name} is missing. Fit or copy it again.") from None
    if found != digest:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {found[:12]}, {_JSON} expects {digest[:12]}. "
            "Fit or copy it again."
        )
    return load_file(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged: it is not JSON. Fit or copy the artifact again.") from None
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise ValueError(f"{path} is damaged: it does not say its format.")
    missing = {"format", "kind", "sha256", "tokenizer", "scalars"} - set(document)
    if missing and document["format"] <= FORMAT:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}.")
    return document


def _find(folder: str | Path, base: Path | None) -> Path:
    from .bundled import bundled

    candidates = [base / folder] if base else []
    candidates += [Path(folder)]
    if str(folder) in bundled():
        candidates += [bundled()[str(folder)]]
    for candidate in candidates:
        if (candidate / _JSON).is_file():
            return candidate
    names = [name for name, path in bundled().items() if (path / _JSON).is_file()]
    raise FileNotFoundError(
        f"No artifact at {folder}: there is no {_JSON} in it. Bundled: {', '.join(names) or 'none'}."
    )


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
