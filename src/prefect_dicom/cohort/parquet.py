"""Cohort files in Parquet, through pandas."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from datetime import date
from decimal import Decimal

from prefect_dicom.cohort.columns import is_window_column, meaning_of
from prefect_dicom.cohort.row_choices import marks_rows
from prefect_dicom.cohort.table import DateWindow, Table, UnfitCell, exact_digits, refuse_larger


def read_parquet(data: bytes, window: DateWindow | None) -> Table:
    """Read a Parquet file; the names of its columns count as line 1.

    Raises
    ------
    UnreadableFile
        It is too large; what the libraries raise of a damaged file passes.
    """
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(io.BytesIO(data))
    refuse_larger(
        sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
    )
    names = metadata.schema.to_arrow_schema().names
    return Table(
        line=1,
        header=names,
        records=_records(data, names, window),
        content=cell_content,
        every_field_written=False,
    )


def _records(
    data: bytes, names: Sequence[str], window: DateWindow | None
) -> Iterator[tuple[int, Sequence[object]]]:
    import pandas

    known = [
        name
        for name in names
        if meaning_of(name) is not None
        or is_window_column(window, name)
        or marks_rows(name) is not None
    ]
    # Arrow's types keep whole numbers whole where there are gaps between them.
    frame = pandas.read_parquet(io.BytesIO(data), columns=known, dtype_backend="pyarrow")
    # A column may have been made the index of the frame that was written.
    frame = frame.reset_index().reindex(columns=list(names))
    for line, row in enumerate(frame.itertuples(index=False, name=None), 2):
        yield line, [None if value is pandas.NA else value for value in row]


def cell_content(value: object) -> str | date | None:
    """Content of a cell of a data frame; None where it is missing.

    Raises
    ------
    UnfitCell
        It is neither text nor a whole number nor a date.
    """
    # NaN and NaT, the other forms of nothing, differ from themselves.
    if value is None or value != value:
        return None
    if isinstance(value, str | date):
        return value
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return exact_digits(value, exact=not isinstance(value, float))
    raise UnfitCell("is neither text nor a whole number nor a date; write it as text")
