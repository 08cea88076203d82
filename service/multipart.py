"""A multipart body, read as it arrives and held once, under limits."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import (
    InvalidRequestError,
    PayloadTooLargeError,
    TooManyFramesError,
    UnsupportedMediaError,
    ValidationError,
)
from service.limits import FILE_FIELDS as FILE_FIELDS
from service.settings import LimitSettings

_FIELDS = 32  # a form has six at most
_FIELD_BYTES_SPARE = 1024  # form fields but metadata are short
# As nearly every client writes it; python-multipart reads the rest, several times as slowly.
_PLAIN_DISPOSITION = re.compile(
    rb'form-data; name="(?P<name>[A-Za-z0-9_.-]*)"(?:; filename="(?P<file_name>[A-Za-z0-9_. -]*)")?'
)


@dataclass(slots=True)
class Form:
    """What a multipart body held.

    Args:
        fields: Text fields by name.
        files: Content of the file fields by name, in the order they came.
    """

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


async def read_form(
    request: Request, limits: LimitSettings, file_fields: Collection[str] = FILE_FIELDS
) -> Form:
    """Read a multipart request, which `service.middleware` bounds as a whole.

    Args:
        request: With an unread body.
        limits: What it may hold.
        file_fields: Names of the fields that hold files.

    Raises:
        UnsupportedMediaError: The body is not multipart/form-data.
        InvalidRequestError: The body is broken, or ends early.
        PayloadTooLargeError: A file or a field is over its limit.
        TooManyFramesError: There are more frames than the limit.
        ValidationError: A field is repeated, or is not text, or there are too many.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise UnsupportedMediaError(
            "expected a body of type multipart/form-data, got "
            f"{request.headers.get('content-type', 'none')!r}"
        )
    if not options.get(b"boundary"):
        raise InvalidRequestError("expected a multipart boundary in Content-Type, got none")
    try:
        reader = _FormReader(
            options[b"boundary"], limits, file_fields
        )  # a boundary can be too long
        async for chunk in request.stream():
            reader.write(chunk)
        return reader.finish()
    except FormParserError as error:
        raise InvalidRequestError(
            "expected a well-formed multipart body, got one that is broken or ends early"
        ) from error


class _FormReader:
    """Collects the parts that python-multipart announces, refusing early what is over a limit."""

    def __init__(
        self, boundary: bytes, limits: LimitSettings, file_fields: Collection[str]
    ) -> None:
        self._limits = limits
        self._file_fields = file_fields
        self._form = Form()
        self._finished = False
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._part: bytes | bytearray = b""
        self._is_file = self._is_blank = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._add_content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def write(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def finish(self) -> Form:
        self._parser.finalize()
        if not self._finished:
            raise InvalidRequestError(
                "expected a closing multipart boundary, got the end of the body"
            )
        return self._form

    def _begin_part(self) -> None:
        self._headers = {}
        self._part = b""

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _begin_content(self) -> None:
        name, file_name = _read_disposition(self._headers.get(b"content-disposition", b""))
        if name is None:
            raise InvalidRequestError("expected a name for each part of the form, got one without")
        self._name = name.decode("utf-8", "replace")
        # Not by the file name: a client library may leave it out, and what it says is not to be
        # trusted.
        self._is_file = self._name in self._file_fields
        # So a browser sends a file input that was left blank, and the page of documentation without
        # any name.
        self._is_blank = not file_name
        if not self._is_file and file_name is not None:
            raise ValidationError(
                f"expected files in the fields {', '.join(self._file_fields)}, "
                f"got one in {self._name!r}",
                f"/{self._name}",
            )
        files = self._form.files.get(self._name, ())
        if self._name.endswith("frames") and len(files) >= self._limits.frames:
            raise TooManyFramesError(f"expected at most {self._limits.frames} frames, got more")

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        limit = self._limits.file_bytes
        if not self._is_file:
            limit = self._limits.metadata_bytes + _FIELD_BYTES_SPARE
        if len(self._part) + end - start > limit:
            raise PayloadTooLargeError(
                f"expected at most {limit} bytes in the field {self._name!r}, got more"
            )
        if not self._part:  # most parts come in one piece, which need not be copied again
            self._part = data[start:end]
            return
        if isinstance(self._part, bytes):
            # Not a list of pieces: a client that sends single bytes would take 50 times as many.
            self._part = bytearray(self._part)
        self._part += memoryview(data)[start:end]

    def _end_part(self) -> None:
        if self._is_file and self._is_blank and not self._part:
            return
        if self._is_file:
            self._form.files.setdefault(self._name, []).append(bytes(self._part))
            self._part = b""
            return
        if self._name in self._form.fields:
            raise ValidationError(f"expected {self._name!r} once, got it again", f"/{self._name}")
        if len(self._form.fields) >= _FIELDS:
            raise ValidationError(f"expected at most {_FIELDS} fields, got more", "/")
        try:
            self._form.fields[self._name] = self._part.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValidationError(f"expected text in {self._name!r}", f"/{self._name}") from error

    def _end(self) -> None:
        self._finished = True


def _read_disposition(header: bytes) -> tuple[bytes | None, bytes | None]:
    """Name and file name of a part, None where there is none."""
    if (plain := _PLAIN_DISPOSITION.fullmatch(header)) is not None:
        return plain["name"], plain["file_name"]
    _, options = parse_options_header(header)
    return options.get(b"name"), options.get(b"filename")
