"""Files into rows: types by content, places of rows, and files that cannot be read."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.data import rows
from finetune_trainer.data.rows import DataFile, Row, read
from finetune_trainer.failures import RunFailure

TWO = [{"text": "one"}, {"text": "två"}]


def read_bytes(tmp_path: Path, content: bytes, name: str = "data") -> list[Row]:
    path = tmp_path / "file"
    path.write_bytes(content)
    return list(read(DataFile(path, name)))


def parquet(tmp_path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(TWO), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


CONTENTS = {
    "jsonl": b'{"text": "one"}\n\n{"text": "tv\xc3\xa5"}',
    "jsonl with a byte order mark and windows line ends": b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "tv\xc3\xa5"}\r\n',
    "json": json.dumps(TWO, indent=2).encode(),
    "json in one line": json.dumps(TWO).encode(),
    "csv": "text\none\ntvå\n".encode(),
    "jsonl with the line ends of old Macs": '{"text": "one"}\r{"text": "två"}\r'.encode(),
    "csv with the line ends of old Macs": "text\rone\rtvå\r".encode(),
    "csv that begins with empty lines": "\n\ntext\none\ntvå\n".encode(),
    "json with a comma after the last row": b'[{"text": "one"}, {"text": "tv\xc3\xa5"}, ]\n',
    "csv with quotes and windows line ends": 'text\r\n"one"\r\n"två"\r\n'.encode(),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_file_type_is_recognised_by_content(tmp_path: Path, content: bytes, packed: bool) -> None:
    found = read_bytes(tmp_path, gzip.compress(content, mtime=0) if packed else content, name="misleading.parquet")
    assert [row.value for row in found] == TWO


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_parquet_is_read_packed_or_not(tmp_path: Path, packed: bool) -> None:
    content = parquet(tmp_path)
    found = read_bytes(tmp_path, gzip.compress(content, mtime=0) if packed else content)
    assert [(row.line, row.value) for row in found] == [(1, TWO[0]), (2, TWO[1])]


def test_rows_know_their_lines(tmp_path: Path) -> None:
    content = b'{"a": 1}\n\n{"a": 2}\n'
    assert [row.place for row in read_bytes(tmp_path, content, "x.jsonl")] == ["x.jsonl:1", "x.jsonl:3"]
    array = b'[\n  {"a":\n    1},\n  {"a": 2}\n]\n'
    assert [row.place for row in read_bytes(tmp_path, array, "x.json")] == ["x.json:2", "x.json:4"]
    quoted = b'a,b\n1,"two\nlines"\n3,4\n'
    assert [row.place for row in read_bytes(tmp_path, quoted, "x.csv")] == ["x.csv:2", "x.csv:4"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1}\n{"a": }\n', "is not JSON (Expecting value at column 7)"),
        (b'{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n', "cannot be read: 'c' is there twice in one object"),
        (b'{"a": 1}\n{"a": "b\t"}\n', "is not JSON (Invalid control character at column 9)"),
        (b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
        (b'{"a": 1}\n[1]\n', "is a JSON array, an object {...} is needed"),
        (
            b'{"a": "\\ud83d\\ude00"}\n{"a": ["\\ud83d"]}\n',
            r"has the escape \ud83d without its other half: remove it, or write the character",
        ),
        (
            b'[{"a": "\\ud83d\\ude00"}, {"a": "\\ude00"}]',
            r"has the escape \ude00 without its other half: remove it, or write the character",
        ),
        (b'{"a": 1}\n{"a": "\xe5"}\n', "is not UTF-8 (byte 0xe5 at column 8): save the file as UTF-8"),
        (b"a,b\n1,2\n1,2,3\n", "has 3 cells, the CSV header has 2: quote cells that hold ','"),
    ],
)
def test_a_bad_row_carries_its_problem_and_the_others_are_read(tmp_path: Path, content: bytes, problem: str) -> None:
    good, bad = read_bytes(tmp_path, content)
    assert good.value and not good.problem
    assert bad.value is None
    assert bad.problem == problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x is empty"),
        (b" \n", "x is empty"),
        (b"PK\x03\x04abc", "x is compressed as a zip archive: unpack it, or pack it with gzip"),
        (b"\x04\x22\x4d\x18abc", "x is compressed as lz4: unpack it, or pack it with gzip"),
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "x is packed with gzip twice: unpack it once"),
        (
            b"ARROW1\x00\x00",
            "x is an Arrow file (feather, or save_to_disk of datasets): write it with to_parquet or to_json",
        ),
        (b"\xff\xff\xff\xff\x10", "x is an Arrow file (feather, or save_to_disk of datasets)"),
        (b"PAREabc", "x is an encrypted parquet file: write it without encryption"),
        (b"a.jsonl".ljust(257, b"\x00") + b"ustar", "x is a tar archive: unpack it into a folder"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "x is a Git LFS pointer, not the file: get the file with"),
        (b"<!DOCTYPE html><html>", "x is a web page: the address is not that of the file itself"),
        (
            b'{\n "data": [\n',
            "x:1: the object goes on over several lines: write one object per line (jq -c . does that)",
        ),
        (b'[{"a": 1, "a": 2}]', "x:1: cannot be read: 'a' is there twice in one object"),
        (b'\xff\xfe{\x00"\x00', "x is UTF-16: save it as UTF-8"),
        (b"\x00\x01\x02", "x is a binary file: datasets are jsonl, json, csv or parquet, each also .gz"),
        (b'[{"a": 1},\n{"a": 2}', "x:2: the array's closing ] is missing: upload the file again"),
        (b'[{"a": 1},\n{"a": 2,\n}]', "x:3: is not JSON (Illegal trailing comma before end of object)"),
        (b'[{"a": 1}]\n\n[{"a": 2}]\n', "x:3: the array has ended, but the file goes on: make it one array"),
        (b'[{"a": "\xe5"}]', "x:1: is not UTF-8 (byte 0xe5): save the file as UTF-8"),
        (b"a,a\n1,2\n", "x:1: the header needs one distinct name per column, found ['a', 'a']"),
        (b"a,b\n1,\xe5\n", "x:2: is not UTF-8 (byte 0xe5 at column 3): save the file as UTF-8"),
        (b'a,b\n1,"2\n', "x:2: is not CSV (unexpected end of data)"),
        (gzip.compress(b'{"a": 1}\n' * 10_000, mtime=0)[:50], "x is not a whole gzip file"),
        (b"PAR1nonsense", "x: is not a sound parquet file (row 1:"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(RunFailure) as caught:
        read_bytes(tmp_path, content, "x")
    assert caught.value.reason == "InvalidDataset"
    # the JSON decoder's words differ between Python versions
    expected = message.replace(
        "Illegal trailing comma before end of object", "Expecting property name enclosed in double quotes"
    )
    assert caught.value.message.startswith((message, expected))


def test_the_row_numbers_that_pandas_writes_are_a_column_like_any_other(tmp_path: Path) -> None:
    assert [row.value for row in read_bytes(tmp_path, b",text\n0,one\n")] == [{"index": "0", "text": "one"}]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "x")
    with pytest.raises(RunFailure, match="x: two columns have one name: text, text"):
        list(read(DataFile(tmp_path / "x", "x")))


def test_a_tool_call_in_parquet_has_its_own_arguments_only(tmp_path: Path) -> None:
    """Arrow gives every object of a column the keys of all of them, with null in place of what was not there."""
    calls = [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "clock", "arguments": {"zone": "CET"}}]
    pq.write_table(pa.Table.from_pylist([{"tools": calls, "system": None}]), tmp_path / "made.parquet")
    (row,) = read_bytes(tmp_path, (tmp_path / "made.parquet").read_bytes())
    assert row.value == {"tools": calls, "system": None}


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["one", "två"], pa.large_string()),
        pa.array(["one", "två"], pa.string_view()),
        pa.array(["one", "två"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_text_is_read_from_every_kind_of_parquet_column(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "made.parquet")
    assert [row.value for row in read_bytes(tmp_path, (tmp_path / "made.parquet").read_bytes())] == TWO


def test_a_gzip_bomb_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BOMB_FREE_BYTES", 4 << 20)
    with pytest.raises(RunFailure, match="x unpacks to more than 200 times its size, like a gzip bomb"):
        read_bytes(tmp_path, gzip.compress(b'{"a": 1}\n' + b" " * (32 << 20), mtime=0), "x")


def test_a_row_without_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1 << 20)
    for content in (b'{"a": "' + b"x" * (4 << 20), b'[{"a": "' + b"x" * (4 << 20)):
        with pytest.raises(RunFailure, match="x:1: row is longer than 1 MiB: is a line break missing?"):
            read_bytes(tmp_path, content, "x")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_large_file_is_read_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    path, count = tmp_path / "large", 60_000
    row = json.dumps({"text": "word " * 100})
    with open(path, "w") as file:
        file.write({"jsonl": "", "json": "[\n", "csv": "text\n"}[kind])
        file.writelines(
            {"jsonl": f"{row}\n", "json": f"{row},\n", "csv": "word " * 100 + "\n"}[kind] for _ in range(count)
        )
        file.write({"jsonl": "", "json": f"{row}]", "csv": "word\n"}[kind])
    assert path.stat().st_size > 28 << 20
    tracemalloc.start()
    try:
        read_rows = sum(1 for _ in read(DataFile(path, "large")))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read_rows >= count
    assert peak < 12 << 20


def test_a_parquet_file_of_one_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    text = ["word " * 1000] * 6000
    table = pa.table({"text": text, "number": list(range(6000))})
    pq.write_table(table, tmp_path / "large", row_group_size=6000, use_dictionary=False, compression="none")
    assert (tmp_path / "large").stat().st_size > 28 << 20
    del table
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        assert sum(1 for _ in read(DataFile(tmp_path / "large", "large"))) == 6000
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 12 << 20
