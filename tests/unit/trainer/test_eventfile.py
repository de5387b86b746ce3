"""TensorBoard's event file, read back by a reader of its own.

That TensorBoard itself reads it was seen once with tensorboard 2.21 (EventAccumulator): all tags, steps and values.
"""

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_trainer.eventfile import crc32c, event_file

METRICS = [
    {
        "step": step,
        "loss": 2.0 / step,
        "learningRate": 1e-4,
        "gradNorm": 0.5,
        "tokens": 900 * step,
        "time": 1.7e9 + step,
    }
    for step in (1, 2, 300)
]


def records(data: bytes) -> Iterator[bytes]:
    """The TFRecords of a file, both checksums checked."""

    def masked(part: bytes) -> int:
        crc = crc32c(part)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(body)
        yield body
        data = data[16 + length :]


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            value |= (byte & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        value = message[place : place + size]
        place += size
        yield number, struct.unpack("<d" if kind == 1 else "<f", value)[0] if kind in (1, 5) else value


def scalars(data: bytes) -> dict[tuple[str, int], float]:
    found = {}
    for record in list(records(data))[1:]:
        event = dict(fields(record))
        for _, value in fields(event[5]):
            parts = dict(fields(value))
            found[parts[1].decode(), event[2]] = parts[2]
    return found


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_the_file_begins_with_the_version_that_readers_look_for() -> None:
    event = dict(fields(next(records(event_file(METRICS, {}, {})))))
    assert event == {1: pytest.approx(1.7e9 + 1), 3: b"brain.Event:2"}


def test_every_metric_of_every_step_is_in_it() -> None:
    read = scalars(event_file([*METRICS[:2], {**METRICS[2], "evalLoss": 1.25}], {}, {}))
    assert read["train/loss", 2] == 1.0
    assert read["train/tokens", 300] == 270_000
    assert read["eval/loss", 300] == 1.25 and ("eval/loss", 2) not in read
    assert {tag for tag, _ in read} == {
        "train/loss", "train/learning_rate", "train/grad_norm", "train/tokens", "eval/loss",
    }  # fmt: skip


def test_the_final_evaluation_stands_at_the_last_step() -> None:
    read = scalars(event_file(METRICS, {"loss": 1.5, "perplexity": 4.5}, {"loss": 3.0}))
    assert (read["eval/loss", 300], read["eval/perplexity", 300], read["base/loss", 300]) == (1.5, 4.5, 3.0)


def test_a_run_without_a_step_is_a_file_too() -> None:
    assert scalars(event_file([], {"loss": 1.0}, {})) == {}
