"""The documents of one file: a UTF-8 text, or the rows of a .jsonl, .parquet or .arrow file."""

from __future__ import annotations

import codecs
import importlib
import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt.data.documents import Document, NotText, Piece
from gpt.data.instructions import FIELDS, instruction
from gpt.errors import InputError, first_line, shown
from gpt.files import open_regular
from kernels.files import json_object

LINE_LIMIT = 1 << 26  # bytes of the longest line of a .jsonl file
BATCH = 256  # rows of a .parquet file that are held at a time

Row = tuple[str, dict[str, Any]]  # where it is, as in Document, and its fields


def read_documents(path: Path, *, text_field: str, keep_newlines: bool) -> Iterator[Document]:
    """The documents of a file, one at a time; a row without text is a document without pieces.

    Args:
        path: A .jsonl, .parquet or .arrow file, else a UTF-8 text, which is one document.
        text_field: The field of a row that has its text. A row without it may be an instruction.
        keep_newlines: Leave CRLF as it is, instead of LF.

    Raises:
        NotText: The file is empty, binary or not UTF-8, or its first row has no text.
        InputError: The file cannot be read, or a row is damaged. The message has the file and the line.
    """
    if (rows := ROWS.get(path.suffix)) is None:
        yield _document(f"data: {path}", [Piece(read_text(path))], keep_newlines)
        return
    for where, row in rows(path, [text_field, *FIELDS]):
        yield _document(where, _pieces(where, row, text_field), keep_newlines)


def _document(where: str, pieces: Sequence[Piece], keep_newlines: bool) -> Document:
    """A document without empty pieces."""
    if not keep_newlines:
        pieces = [piece._replace(text=piece.text.replace("\r\n", "\n")) for piece in pieces]
    return Document(where, [piece for piece in pieces if piece.text])


def _pieces(where: str, row: dict[str, Any], text_field: str) -> list[Piece]:
    """The pieces of a row: its text, or an instruction."""
    if text_field not in row:
        if pieces := instruction(where, row):
            return pieces
        raise _no_text(where.removeprefix("data: "), list(row), [text_field])
    text = row[text_field]
    if not isinstance(text, str | None):
        reason = f"{where.removeprefix('data: ')} has {shown(text)} as {text_field!r}"
        raise NotText("without rows of text", reason, "a text")
    return [Piece(text or "")]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        NotText: The file is empty, or is not UTF-8 text. The message names the path and the first wrong byte.
        InputError: The file cannot be read.
    """
    with open_regular(path, "data") as file:
        try:
            content = file.read()
        except OSError as error:
            raise InputError(f"data: cannot read {path}: {error.strerror}") from error
    if (offset := content.find(b"\0")) >= 0:
        raise NotText("binary", f"{path} is binary (a NUL at byte {offset})", "UTF-8 text")
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} (0x{content[error.start]:02x})"
        raise NotText("not UTF-8", f"{path} is not UTF-8 at {byte}", "UTF-8 text") from error
    if not text:
        raise NotText("empty", f"{path} is empty", "UTF-8 text")
    return text


def jsonl_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """The JSON objects of a .jsonl file, with all their fields; blank lines are passed over.

    Raises:
        InputError: The file cannot be read, or a line is too long or not a JSON object in UTF-8.
    """
    with open_regular(path, "data") as file:
        for number in itertools.count(1):
            try:
                line = file.readline(LINE_LIMIT + 1)
            except OSError as error:
                raise InputError(f"data: cannot read {path}: {error.strerror}") from error
            if not line:
                return
            place = f"{path}:{number}"
            if len(line) > LINE_LIMIT:
                raise InputError(f"data: {place} has more than {LINE_LIMIT:,} bytes, the most of a line")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.isspace():
                yield f"data: {place}", _json_row(line, place)


def _json_row(line: bytes, place: str) -> dict[str, Any]:
    try:
        return json_object(line, place)
    except ValueError as error:
        reason = first_line(error).removesuffix(", expected a JSON object")
        raise NotText("without rows of text", reason, "a JSON object") from error


def parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """The rows of a .parquet file, with those of `fields` that it has.

    Raises:
        InputError: pyarrow is not installed, or the file is damaged or has none of `fields`.
    """
    with _arrow_file(path) as (arrow, file):
        table = arrow.parquet.ParquetFile(file)
        columns = _columns(path, table.schema_arrow.names, fields)
        yield from _rows(path, table.iter_batches(BATCH, columns=columns))


def arrow_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """The rows of an .arrow file, as Hugging Face `datasets` writes it, with those of `fields` that it has.

    Raises:
        InputError: pyarrow is not installed, or the file is damaged or has none of `fields`.
    """
    with _arrow_file(path) as (arrow, file):
        stream = arrow.ipc.open_stream(file)
        columns = _columns(path, stream.schema.names, fields)
        yield from _rows(path, (batch.select(columns) for batch in stream))


def _rows(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    """The rows of Arrow batches, which are checked first: a damaged one may point outside of itself."""
    number = itertools.count(1)
    for batch in batches:
        batch.validate(full=True)
        for begin in range(0, len(batch), BATCH):
            for row in batch.slice(begin, BATCH).to_pylist():
                yield f"data: {path}: row {next(number)}", row


def _columns(path: Path, names: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Those of `fields` that are among the columns `names`, of which each has to be there once."""
    columns = [field for field in fields if names.count(field) == 1]
    if not columns:
        raise _no_text(str(path), names, fields)
    return columns


def _no_text(place: str, names: Sequence[str], fields: Sequence[str]) -> NotText:
    return NotText(
        "without rows of text",
        f"{place} has the fields {shown(list(names))}",
        f"{fields[0]!r} among them (--text_field names another), or 'prompt' and 'completion', or 'messages'",
    )


@contextmanager
def _arrow_file(path: Path) -> Iterator[tuple[Any, Any]]:
    """pyarrow, and `path` mapped into memory for it: a damaged length cannot make it allocate more.

    Raises:
        InputError: pyarrow is not installed, or reports an error inside the block.
    """
    try:
        importlib.import_module("pyarrow.parquet")
        arrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise InputError(
            f"data: {path} needs pyarrow ({first_line(error)}), expected it installed: pip install pyarrow"
        ) from error
    with open_regular(path, "data") as file:
        try:
            yield arrow, arrow.BufferReader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except InputError:
            raise
        except (arrow.ArrowException, OSError, ValueError) as error:
            reason = first_line(error)
            raise InputError(f"data: {path} cannot be read as {path.suffix[1:]}: {reason}") from error


ROWS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
