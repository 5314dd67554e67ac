"""Cohort files in CSV.

Split by the standard library's csv module: ``pandas.read_csv`` silently fills short lines up and
drops a stray quote, and it numbers records where faults need the lines of the file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import islice

from prefect_dicom.cohort.columns import meaning_of
from prefect_dicom.cohort.table import BLANKS, Table, UnreadableFile


def read_csv(data: bytes) -> Table:
    """Read a CSV file with the separator whose header names most columns.

    Raises
    ------
    UnreadableFile
        It is empty, of another encoding, or its header cannot be read.
    """
    text = _decoded(data)
    best: tuple[tuple[int, int], str, int, list[str]] | None = None
    for separator in ",;\t":
        try:
            line, header = next(_records(text, separator))
        except StopIteration:
            raise UnreadableFile("is empty; expected is a header line and rows below it") from None
        except UnreadableFile:
            continue
        score = (sum(meaning_of(name) is not None for name in header), len(header))
        if best is None or score > best[0]:
            best = (score, separator, line, header)
    if best is None:
        raise UnreadableFile(
            "the header line cannot be read with comma, semicolon or tab as separator; check its "
            "double quotes"
        )
    _, separator, line, header = best
    return Table(
        line=line,
        header=header,
        records=islice(_records(text, separator), 1, None),
        content=str,
        every_field_written=True,
    )


def _decoded(data: bytes) -> str:
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    encoding = "utf-16" if utf16 else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise UnreadableFile(
            f"line {line}: the file is not {'UTF-16' if utf16 else 'UTF-8'} (perhaps Latin-1 or "
            'Windows-1252); save it as "CSV UTF-8"'
        ) from None
    if "\0" in text.partition("\n")[0]:
        raise UnreadableFile('holds NUL characters and is not a text file; save it as "CSV UTF-8"')
    return text


def _records(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Records with the line each begins in; blank lines, and empty records at the end, left out.

    Strict, because a quote that is never closed would otherwise swallow the rows after it.
    """
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
    empty: list[tuple[int, list[str]]] = []
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error:
            raise UnreadableFile(
                f"line {line}: a double quote is not closed, or stands inside a quoted text "
                'without being doubled (""); rows from here on were not read'
            ) from None
        if any(field.strip(BLANKS) for field in record):
            yield from empty
            empty.clear()
            yield line, record
        elif len(record) > 1:
            # Only separators: Excel leaves such lines at the end; elsewhere a row lost its key.
            empty.append((line, record))
