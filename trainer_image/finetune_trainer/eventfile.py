"""TensorBoard's event file, written without TensorBoard, which would bring gRPC and a web server into the image.

A file is TFRecords (length, CRC, data, CRC), each holding one Event message of TensorFlow's event.proto. Only scalars are
needed, so the five fields that make them up are encoded here:
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/event.proto
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

#: Tags by the names that metrics.jsonl uses.
TAGS = {
    "loss": "train/loss",
    "evalLoss": "eval/loss",
    "learningRate": "train/learning_rate",
    "gradNorm": "train/grad_norm",
    "tokens": "train/tokens",
}


def event_file(metrics: Sequence[Mapping[str, Any]], adapter: Mapping[str, float], base: Mapping[str, float]) -> bytes:
    """The whole file: a scalar per step and metric, and the final evaluation of adapter and base at the last step."""
    first = float(metrics[0].get("time", 0)) if metrics else 0.0
    records = [_record(_double(1, first) + _bytes(3, b"brain.Event:2"))]
    for line in metrics:
        scalars = {tag: line[name] for name, tag in TAGS.items() if line.get(name) is not None}
        records.append(_event(float(line.get("time", 0)), int(line["step"]), scalars))
    final = {f"eval/{name}": value for name, value in adapter.items()}
    final |= {f"base/{name}": value for name, value in base.items()}
    if metrics and final:
        records.append(_event(float(metrics[-1].get("time", 0)), int(metrics[-1]["step"]), final))
    return b"".join(records)


def _event(time: float, step: int, scalars: Mapping[str, float]) -> bytes:
    values = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in scalars.items())
    return _record(_double(1, time) + _integer(2, step) + _bytes(5, values))


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


# ---- protobuf's wire format: a key of field number and type, then the value ------------------------------------------


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


# ---- CRC-32C, masked as TFRecords want it ----------------------------------------------------------------------------


def _table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC = _table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
