"""Files into rows: the file type is recognised by content, read as a stream, and every row knows its file and line.

A row that cannot be read carries its problem instead of a value; a file that cannot be read at all is an
InvalidDataset.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from finetune_trainer.failures import INVALID_DATASET, RunFailure

FileType = Literal["jsonl", "json", "csv", "parquet"]

MAX_ROW_BYTES = 64 << 20  # a longer row is a mistake (no line breaks, wrong file), and would be held in memory
BOMB_RATIO = 200  # text compresses 3 to 30 times, very repetitive logs about 100, a bomb up to 1,032
BOMB_FREE_BYTES = 256 << 20  # below this no ratio hurts
_BLOCK = 1 << 20
_REPACK = "unpack it, or pack it with gzip"
_ARROW = "is an Arrow file (feather, or save_to_disk of datasets): write it with to_parquet or to_json"
# How files begin that are no dataset here, and what to do with them.
_OTHER_KINDS = (
    (b"PK\x03\x04", f"is compressed as a zip archive: {_REPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed as zstd: {_REPACK}"),
    (b"BZh", f"is compressed as bzip2: {_REPACK}"),
    (b"\xfd7zXZ", f"is compressed as xz: {_REPACK}"),
    (b"\x04\x22\x4d\x18", f"is compressed as lz4: {_REPACK}"),
    (b"\x1f\x8b", "is packed with gzip twice: unpack it once"),
    (b"ARROW1", _ARROW),
    (b"\xff\xff\xff\xff", _ARROW),
    (b"FEA1", _ARROW),
    (b"PARE", "is an encrypted parquet file: write it without encryption"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file: get the file with git lfs pull, and upload that"),
    (b"<!DOCTYPE html", "is a web page: the address is not that of the file itself"),
    (b"<!doctype html", "is a web page: the address is not that of the file itself"),
    (b"<html", "is a web page: the address is not that of the file itself"),
)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half a character


class Row(NamedTuple):
    """One row: file as the user knows it, line (in parquet and JSON arrays the row's number), value or problem."""

    file: str
    line: int
    value: dict[str, Any] | None
    problem: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


class DataFile(NamedTuple):
    """A file on disk, and the name that the user knows it by."""

    path: Path
    name: str


def read(file: DataFile) -> Iterator[Row]:
    """All rows of a file, in bounded memory."""
    with _open(file) as stream:
        head = stream.read(_BLOCK)
        kind = recognise(head, file.name)
        if kind == "parquet":
            yield from _parquet(file, compressed=_is_gzip(file.path))
            return
        source = _Lines(head, stream, file.name)
        yield from {"jsonl": _jsonl, "json": _json, "csv": _csv}[kind](source, file.name)


def recognise(head: bytes, name: str) -> FileType:
    """The file type from its first (unpacked) bytes; the name is used in messages only."""
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, what in _OTHER_KINDS:
        if head.startswith(magic):
            raise RunFailure(INVALID_DATASET, f"{name} {what}")
    if head[257:262] == b"ustar":
        raise RunFailure(INVALID_DATASET, f"{name} is a tar archive: unpack it into a folder")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RunFailure(INVALID_DATASET, f"{name} is UTF-16: save it as UTF-8")
    if b"\x00" in head:
        raise RunFailure(
            INVALID_DATASET, f"{name} is a binary file: datasets are jsonl, json, csv or parquet, each also .gz"
        )
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise RunFailure(INVALID_DATASET, f"{name} is empty")
    return "json" if text.startswith(b"[") else "jsonl" if text.startswith(b"{") else "csv"


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as raw:
        return raw.read(2) == b"\x1f\x8b"


@contextmanager
def _open(file: DataFile) -> Iterator[IO[bytes]]:
    if not _is_gzip(file.path):
        with open(file.path, "rb") as plain:
            yield plain
        return
    with open(file.path, "rb") as raw, gzip.GzipFile(fileobj=raw) as unpacked:
        try:
            yield _Guarded(unpacked, raw, file.name)  # type: ignore[misc]  # read() is all that is used
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RunFailure(
                INVALID_DATASET, f"{file.name} is not a whole gzip file ({error}): upload it again"
            ) from error


class _Guarded:
    """A gzip stream that stops when it grows beyond all reason."""

    def __init__(self, unpacked: gzip.GzipFile, raw: IO[bytes], name: str) -> None:
        self._unpacked, self._raw, self._name, self._size = unpacked, raw, name, 0

    def read(self, size: int) -> bytes:
        data = self._unpacked.read(size)
        self._size += len(data)
        if self._size > BOMB_FREE_BYTES and self._size > BOMB_RATIO * self._raw.tell():
            raise RunFailure(
                INVALID_DATASET,
                f"{self._name} unpacks to more than {BOMB_RATIO} times its size, like a gzip bomb: upload it unpacked "
                "if it is real",
            )
        return data


class _Lines:
    """Lines of bytes with their numbers, none longer than MAX_ROW_BYTES, over a stream whose head was read already."""

    def __init__(self, head: bytes, stream: IO[bytes], name: str) -> None:
        self.head, self._stream, self._name = head.removeprefix(b"\xef\xbb\xbf"), stream, name
        self.line_break = b"\r" if b"\r" in self.head and b"\n" not in self.head else b"\n"  # \r: old Mac, Excel

    def blocks(self) -> Iterator[bytes]:
        yield self.head
        while block := self._stream.read(_BLOCK):
            yield block

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number, rest = 0, b""
        for block in self.blocks():
            *lines, rest = (rest + block).split(self.line_break)
            for line in lines:
                number += 1
                yield number, line
            if len(rest) > MAX_ROW_BYTES:
                raise _too_long(self._name, number + 1)
        if rest:
            yield number + 1, rest


def _too_long(name: str, line: int) -> RunFailure:
    return RunFailure(
        INVALID_DATASET, f"{name}:{line}: row is longer than {MAX_ROW_BYTES >> 20} MiB: is a line break missing?"
    )


def _utf8(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _not_utf8(line: bytes) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}): save the file as UTF-8"
    return ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError when a key is there twice: which value is meant is anyone's guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _row(name: str, number: int, value: Any, halves: bool) -> Row:
    """`halves`: the text has escapes that may be half a character, which no tokenizer takes."""
    if not isinstance(value, dict):
        return Row(name, number, None, f"is a JSON {_json_type(value)}, an object {{...}} is needed")
    if halves and (half := _half(value)):
        return Row(
            name, number, None, f"has the escape {half} without its other half: remove it, or write the character"
        )
    return Row(name, number, value)


def _half(value: Any) -> str:
    """The first half of a character (a lone surrogate) that stands alone in a value."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return ""


def _json_type(value: Any) -> str:
    names = {
        list: "array",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
        dict: "object",
    }
    return names[type(value)]


def _jsonl(lines: _Lines, name: str) -> Iterator[Row]:
    for number, line in lines:
        if not line.strip():
            continue
        text = _utf8(line)
        if text is None:
            yield Row(name, number, None, _not_utf8(line))
            continue
        try:
            yield _row(name, number, _DECODER.decode(text), halves=_HALF.search(text) is not None)
        except json.JSONDecodeError as error:
            if number == 1 and error.pos >= len(text.rstrip()) and text.rstrip().endswith(("{", "[", ",")):
                raise RunFailure(
                    INVALID_DATASET,
                    f"{name}:1: the object goes on over several lines: write one object per line (jq -c . does that), or all "
                    "of them in one array [...]",
                ) from error
            hint = "; jsonl has one whole object per line" if number == 1 else ""
            what = error.msg.removesuffix(" at")
            yield Row(name, number, None, f"is not JSON ({what} at column {error.colno}){hint}")
        except RecursionError:
            yield Row(name, number, None, "is nested too deeply")
        except ValueError as error:
            yield Row(name, number, None, f"cannot be read: {error}")


def _json(lines: _Lines, name: str) -> Iterator[Row]:
    """The objects of one JSON array, each decoded as soon as it is complete; line is where the object begins."""
    buffer, position, line, first, done = "", 0, 1, True, False
    text = _decoded(lines, name)
    while True:
        while position < len(buffer) and (buffer[position] in " \t\r\n" or (first and buffer[position] == "[")):
            line += buffer[position] == "\n"
            first = first and buffer[position] != "["
            position += 1
        if position < len(buffer):
            if buffer[position] == "]":
                _refuse_more(name, line, chain([buffer[position + 1 :]], text))
                return
            if buffer[position] == ",":
                position += 1
                continue
            try:
                value, end = _DECODER.raw_decode(buffer, position)
                complete = end < len(buffer) or done  # a number at the end of the buffer may go on
            except RecursionError as error:
                raise RunFailure(INVALID_DATASET, f"{name}:{line}: is nested too deeply") from error
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 16
                if done or not cut_off:
                    at = line + buffer.count("\n", position, error.pos)
                    what = error.msg.removesuffix(" at")
                    raise RunFailure(INVALID_DATASET, f"{name}:{at}: is not JSON ({what})") from error
                complete = False
            except ValueError as error:
                raise RunFailure(INVALID_DATASET, f"{name}:{line}: cannot be read: {error}") from error
            if complete:
                yield _row(name, line, value, halves=_HALF.search(buffer, position, end) is not None)
                line += buffer.count("\n", position, end)
                position = end
                continue
        elif done:
            raise RunFailure(INVALID_DATASET, f"{name}:{line}: the array's closing ] is missing: upload the file again")
        buffer, position = buffer[position:], 0
        if len(buffer) > MAX_ROW_BYTES:
            raise _too_long(name, line)
        # decoding is tried again from the object's start: doubling what is read keeps that linear for long objects
        wanted = max(_BLOCK, len(buffer))
        while wanted > 0 and (more := next(text, None)) is not None:
            buffer += more
            wanted -= len(more)
        done = wanted > 0


def _refuse_more(name: str, line: int, text: Iterator[str]) -> None:
    """A file that goes on after its array would lose what follows."""
    for part in text:
        blank = len(part) - len(part.lstrip())
        line += part.count("\n", 0, blank)
        if blank < len(part):
            raise RunFailure(
                INVALID_DATASET, f"{name}:{line}: the array has ended, but the file goes on: make it one array"
            )


def _decoded(lines: _Lines, name: str) -> Iterator[str]:
    """Text of the whole file in blocks that end at a line break or at the end of a character."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    for block in _with_end(lines.blocks()):
        try:
            text = decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            at = line + error.object[: error.start].count(b"\n")
            raise RunFailure(
                INVALID_DATASET,
                f"{name}:{at}: is not UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8",
            ) from error
        line += text.count("\n")
        yield text


def _with_end(blocks: Iterator[bytes]) -> Iterator[bytes | None]:
    yield from blocks
    yield None


def _csv(lines: _Lines, name: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    header_line = lines.head.lstrip(b"\r\n").split(lines.line_break, 1)[0].decode(errors="replace")
    delimiter = max(",;\t", key=header_line.count)

    def text() -> Iterator[str]:
        for number, line in lines:
            decoded = _utf8(line)
            if (
                decoded is None
            ):  # a quoted field may span lines, so the next row's start is unknown: the file is refused
                raise RunFailure(INVALID_DATASET, f"{name}:{number}: {_not_utf8(line)}")
            yield decoded + "\n"

    reader = csv.reader(text(), delimiter=delimiter, strict=True)
    try:
        cells = next((cells for cells in reader if cells), [])
        header = [column.strip() for column in cells]
        if header[:1] == [""]:
            header[0] = "index"  # pandas' to_csv writes row numbers without a name
        if len(set(header)) != len(header) or not all(header):
            raise RunFailure(
                INVALID_DATASET,
                f"{name}:{reader.line_num}: the header needs one distinct name per column, found {header}",
            )
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield Row(name, start, dict(zip(header, cells, strict=True)))
            elif cells:
                yield Row(
                    name,
                    start,
                    None,
                    f"has {len(cells)} cells, the CSV header has {len(header)}: quote cells that hold {delimiter!r}",
                )
            start = reader.line_num + 1
    except csv.Error as error:
        raise RunFailure(INVALID_DATASET, f"{name}:{reader.line_num}: is not CSV ({error})") from error


def _parquet(file: DataFile, compressed: bool) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = file.path
    if compressed:  # parquet is read from its end: it needs a real file
        path = file.path.with_name(file.path.name + ".unpacked")
        with _open(file) as packed, open(path, "wb") as unpacked:
            while block := packed.read(_BLOCK):
                unpacked.write(block)
    number = 0
    try:
        # by pages: a row group, which may be the whole file, is never in memory as a whole
        with pq.ParquetFile(path, buffer_size=_BLOCK, pre_buffer=False) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise RunFailure(INVALID_DATASET, f"{file.name}: two columns have one name: {', '.join(names)}")
            for batch in table.iter_batches(batch_size=512):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(file.name, number, {name: _without_null(part) for name, part in value.items()})
    except (pa.ArrowException, OSError) as error:
        raise RunFailure(
            INVALID_DATASET, f"{file.name}: is not a sound parquet file (row {number + 1}: {error})"
        ) from error
    finally:
        if compressed:
            path.unlink(missing_ok=True)


def _without_null(value: Any) -> Any:
    """A cell without the nulls inside it: parquet gives every object of a column the keys of all of them, so that a tool
    call would show arguments of the other tools."""
    if isinstance(value, dict):
        return {name: _without_null(part) for name, part in value.items() if part is not None}
    return [_without_null(part) for part in value] if isinstance(value, list) else value
