"""A multipart upload as it arrives: which file begins, its bytes, its end. Nothing is held but the headers of one part."""

from __future__ import annotations

import logging
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from .answers import Refusal

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every malformed body, which is the client's fault
MAX_PARTS = 1_000
_MAX_NAME_BYTES = 4_096


class Form:
    """python-multipart calls back in the middle of a write; what it said is kept until the caller can await for it."""

    def __init__(self, boundary: bytes) -> None:
        self._said: list[tuple[str, bytes]] = []
        self._field, self._value, self._disposition = bytearray(), bytearray(), b""
        self._parts, self._ended = 0, False
        callbacks: dict[str, Any] = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header,
            "on_headers_finished": self._file,
            "on_part_data": self._data,
            "on_part_end": lambda: self._said.append(("end", b"")),
            "on_end": self._finished,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)  # pyright: ignore[reportArgumentType]
        except (FormParserError, ValueError):
            raise Refusal(400, "the multipart boundary is missing or wrong") from None

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """("file", its name), ("data", bytes), ("end", b"") in order. Raises Refusal."""
        self._said = []
        try:
            self._parser.write(data)
        except (FormParserError, ValueError):
            raise Refusal(400, "the multipart body is malformed") from None
        return self._said

    def finish(self) -> None:
        if not self._ended:
            raise Refusal(400, "the multipart body is cut short")

    def _begin(self) -> None:
        self._parts, self._disposition = self._parts + 1, b""
        if self._parts > MAX_PARTS:
            raise Refusal(400, f"more than {MAX_PARTS} files in one request")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._said.append(("data", data[start:end]))

    def _header(self) -> None:
        if bytes(self._field).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field, self._value = bytearray(), bytearray()

    def _file(self) -> None:
        name = parse_options_header(self._disposition.decode("latin-1"))[1].get(b"filename", b"")
        if not 0 < len(name) <= _MAX_NAME_BYTES or b"\0" in name:
            raise Refusal(400, "each part needs a filename, which is the path to write")
        self._said.append(("file", name))

    def _finished(self) -> None:
        self._ended = True
