"""A cohort file becomes rows, or one list of all that is wrong with it."""

from __future__ import annotations

import io
import zipfile
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path

import openpyxl
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_dicom.cohort.rows import cohort_digest, read_cohort
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import CohortRow, DateRange
from prefect_dicom.core.uids import is_safe_key, is_uid

DAY = date(2024, 1, 31)
FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def read(tmp_path: Path):
    """Reads a cohort given as text, bytes, or rows of an Excel sheet."""

    def read(content: str | bytes, name: str = "cohort.csv") -> list[CohortRow]:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_cohort(path)

    return read


@pytest.fixture
def faults(read):
    """The faults of a cohort that cannot be used."""

    def faults(content: str | bytes, name: str = "cohort.csv") -> tuple[str, ...]:
        with pytest.raises(CohortError) as caught:
            read(content, name)
        assert caught.value.source == name
        return caught.value.faults

    return faults


def workbook(*sheets: list[list[object]], formats: dict[str, str] | None = None) -> bytes:
    """An XLSX file; ``formats`` are number formats by cell of the first sheet."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for rows in sheets:
        sheet = book.create_sheet()
        for row in rows:
            sheet.append(row)
    for place, code in (formats or {}).items():
        book.worksheets[0][place].number_format = code
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


def patched(content: bytes, part: str, old: bytes, new: bytes) -> bytes:
    """The zip file with ``old`` replaced by ``new`` in one of its parts."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name == part:
                assert old in data
                data = data.replace(old, new)
            target.writestr(name, data)
    return stream.getvalue()


def parquet(columns: dict[str, object]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


# --- what is read ---------------------------------------------------------------------------


def test_every_column_of_a_row_is_read_as_written(read):
    content = (
        "PatientID,AccessionNumber,StudyInstanceUID,StudyDate,Modality,StudyDescription\n"
        "000123,A-0007,1.2.840.1,20240131,CT,*Thorax?\n"
    )
    assert read(content) == [
        CohortRow(2, "000123", "A-0007", "1.2.840.1", DateRange(DAY, DAY), "CT", "*Thorax?")
    ]


@pytest.mark.parametrize(
    ("header", "attribute"),
    [
        *((name, "patient_id") for name in ("PatientID", "patient id", "MRN", "Patient")),
        *((name, "patient_id") for name in ("PATIENT_ID", '"(0010,0020)"', '"0010,0020"')),
        *((name, "accession_number") for name in ("Accession Number", "accession", "Acc")),
        ('"(0008,0050)"', "accession_number"),
        *((name, "study_instance_uid") for name in ("study uid", "Study Instance UID", "UID")),
        ('"(0020,000d)"', "study_instance_uid"),
    ],
)
def test_a_column_goes_by_keyword_tag_or_plain_name(read, header, attribute):
    (row,) = read(f"{header}\n12\n")
    assert getattr(row, attribute) == "12"


@pytest.mark.parametrize(
    "name", ["Müller^Jörg^^Dr.", "山田^太郎", "Müller*", "Müller, Jörg", "A=B=C"]
)
def test_a_name_and_a_birth_date_are_read_to_compare_studies_with(read, name):
    header = "MRN;Patient Name;birth date"
    assert read(f"{header}\n7;{name};1931-02-28\n8;;\n") == [
        CohortRow(2, "7", patient_name=name, patient_birth_date=date(1931, 2, 28)),
        CohortRow(3, "8"),
    ]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("^^", "names nobody"),
        ("*", "names nobody"),
        ("A\\B", "backslash"),
        ("A\u2028B", "invisible"),
    ],
)
def test_what_names_nobody_is_refused(faults, cell, words):
    (fault,) = faults(f"MRN,PatientName\n7,{cell}\n")
    assert fault.startswith('line 2, column "PatientName": ') and words in fault


@pytest.mark.parametrize("row", [",Müller^Jörg,", ",,19310228"])
def test_a_name_or_a_birth_date_is_no_key(faults, row):
    (fault,) = faults(f"MRN,PatientName,PatientBirthDate\n{row}\n")
    assert fault.startswith("line 2: no key")


def test_a_mark_is_a_column_of_no_interest_where_there_are_no_candidates(read):
    assert [row.patient_id for row in read("Take,MRN\n,7\nperhaps,'8\n")] == ["7", "'8"]


def test_columns_of_no_interest_are_ignored(read):
    assert read("Ward,MRN,Remark\nA,7,=1+1\n") == [CohortRow(2, "7")]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_is_found_in_the_header(read, separator):
    content = f"PatientID{separator}Modality\r\n007{separator}CT\r\n"
    assert read(content) == [CohortRow(2, "007", modality="CT")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_files_are_read_with_and_without_a_byte_order_mark(read, encoding):
    assert read("PatientID\nMüller-7\n".encode(encoding)) == [CohortRow(2, "Müller-7")]


def test_surrounding_blanks_are_no_part_of_a_value(read):
    assert read("MRN,ACC\n  007\u00a0,\t8 \n") == [CohortRow(2, "007", "8")]


def test_line_numbers_stay_true_across_blank_lines_and_quoted_line_breaks(read):
    content = '\nMRN,Remark\n\n1,"two\nlines"\n   \n2,x\n'
    assert [(row.line, row.patient_id) for row in read(content)] == [(4, "1"), (7, "2")]


def test_lines_of_separators_at_the_end_of_a_file_are_left_out(read):
    assert len(read("MRN,ACC\n1,2\n,\n,\n")) == 1


def test_duplicate_rows_stay_and_cells_left_empty_are_absent(read):
    content = "MRN,StudyInstanceUID\n1,\n1,\n"
    assert read(content) == [CohortRow(2, "1"), CohortRow(3, "1")]


@pytest.mark.parametrize(
    ("written", "first", "last"),
    [
        ("20240131", DAY, DAY),
        ("2024-01-31", DAY, DAY),
        ("2024-01-31 00:00:00", DAY, DAY),
        ("20240101-20240131", date(2024, 1, 1), DAY),
        ("20240101 - 20240131", date(2024, 1, 1), DAY),
        ("20240131-", DAY, None),
        ("-20240131", None, DAY),
        ("2024-01-01/2024-01-31", date(2024, 1, 1), DAY),
        ("2024-01-31/", DAY, None),
        ("/2024-01-31", None, DAY),
    ],
)
def test_a_date_cell_holds_a_day_or_a_range(read, written, first, last):
    (row,) = read(f"MRN,Date\n1,{written}\n")
    assert row.study_date == DateRange(first, last)


def test_a_range_may_stand_in_two_columns(read):
    rows = read("MRN,from,to\n1,20240101,2024-01-31\n2,,20240131\n3,20240131,\n4,,\n")
    assert [row.study_date for row in rows] == [
        DateRange(date(2024, 1, 1), DAY),
        DateRange(None, DAY),
        DateRange(DAY, None),
        None,
    ]


# --- Excel and Parquet ----------------------------------------------------------------------


def test_excel_text_keeps_its_zeros_and_whole_numbers_become_their_digits(read):
    content = workbook([["MRN", "Acc", "Date"], ["000123", 77, DAY], [8, 5, 20240131]])
    assert read(content, "cohort.xlsx") == [
        CohortRow(2, "000123", "77", study_date=DateRange(DAY, DAY)),
        CohortRow(3, "8", "5", study_date=DateRange(DAY, DAY)),
    ]


def test_a_number_that_excel_shows_with_zeros_is_read_with_them(read):
    content = workbook([["MRN"], [123], [1234567]], formats={"A2": "000000", "A3": "000000"})
    assert [row.patient_id for row in read(content, "cohort.xlsx")] == ["000123", "1234567"]


def test_excel_rows_keep_their_numbers_and_blank_ones_are_skipped(read):
    content = workbook([[], ["MRN"], ["1"], [None], [" "], ["2"]])
    assert [(row.line, row.patient_id) for row in read(content, "c.xlsx")] == [(3, "1"), (6, "2")]


def test_rows_beyond_the_size_a_workbook_states_are_read(read):
    content = workbook([["MRN"], ["1"], ["2"]])
    content = patched(content, "xl/worksheets/sheet1.xml", b'ref="A1:A3"', b'ref="A1:A2"')
    assert len(read(content, "cohort.xlsx")) == 2


def test_the_sheet_that_has_a_header_is_the_cohort(read, faults):
    notes, cohort = [["Some notes"], ["of ours"]], [["MRN"], ["7"]]
    assert read(workbook(notes, cohort), "c.xlsx") == [CohortRow(2, "7")]
    (fault,) = faults(workbook(cohort, notes, cohort), "c.xlsx")
    assert fault.startswith("sheets 1, 3")


def test_rows_that_are_hidden_are_asked_about(faults):
    content = workbook([["MRN"], ["1"], ["2"]])
    sheet = "xl/worksheets/sheet1.xml"
    content = patched(content, sheet, b'<row r="2"', b'<row hidden="1" r="2"')
    (fault,) = faults(content, "c.xlsx")
    assert fault.startswith("1 of 2 rows are hidden")


def test_shared_strings_are_read_without_formatting_and_phonetic_readings(read):
    content = workbook([["MRN"], ["secret"]])
    sheet, types = "xl/worksheets/sheet1.xml", "[Content_Types].xml"
    inline = b't="inlineStr"><is><t>secret</t></is></c>'
    content = patched(content, sheet, inline, b't="s"><v>0</v></c>')
    kind = b"application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    override = b'<Override PartName="/xl/sharedStrings.xml" ContentType="%b" />' % kind
    stream = io.BytesIO(patched(content, types, b"</Types>", override + b"</Types>"))
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr(
            "xl/sharedStrings.xml",
            '<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><si>'
            "<r><t>00</t></r><r><t>7</t></r>"
            '<rPh sb="0" eb="1"><t>x</t></rPh></si></sst>',
        )
    assert read(stream.getvalue(), "c.xlsx") == [CohortRow(2, "007")]


def test_a_character_that_excel_has_escaped_is_a_fault_and_no_part_of_a_name(faults):
    (fault,) = faults(workbook([["MRN_x000D_"], ["0_x0034_"]]), "c.xlsx")
    assert fault.startswith('line 2, column "MRN": holds a control character')


def test_a_workbook_in_the_strict_form_is_refused(faults):
    content = workbook([["MRN"], ["1"]])
    for part, old, new in (
        ("xl/worksheets/sheet1.xml", b"spreadsheetml/2006/main", b"spreadsheetml/main"),
        ("xl/workbook.xml", b"spreadsheetml/2006/main", b"spreadsheetml/main"),
        ("xl/workbook.xml", b"officeDocument/2006/", b"officeDocument/"),
    ):
        content = patched(content, part, old, new)
    for part in ("xl/worksheets/sheet1.xml", "xl/workbook.xml"):
        content = patched(content, part, b"schemas.openxmlformats.org", b"purl.oclc.org/ooxml")
    (fault,) = faults(content, "c.xlsx")
    assert "not as Strict Open XML" in fault


def test_dates_of_a_workbook_that_counts_from_1904_are_right(read):
    content = workbook([["MRN", "Date"], ["1", DAY]])
    sheet = "xl/worksheets/sheet1.xml"
    content = patched(content, sheet, b"<v>45322</v>", b"<v>43860</v>")
    content = patched(content, "xl/workbook.xml", b"<workbookPr />", b'<workbookPr date1904="1"/>')
    assert read(content, "c.xlsx")[0].study_date == DateRange(DAY, DAY)


@pytest.mark.parametrize(
    ("cell", "code", "message"),
    [
        (1.5, None, "fraction"),
        (DAY, None, "is a date"),
        (time(10, 30), None, "fraction"),
        ("=A1", None, "formula"),
        (True, None, "truth value"),
        ("#N/A", None, "error of Excel's"),
        (1234567890123456, None, "more than 15 digits"),
        (123, '"P"000000', "display format"),
        (123456, "000-000", "display format"),
    ],
)
def test_an_excel_cell_that_is_no_exact_text_is_a_fault(faults, cell, code, message):
    content = workbook([["MRN"], [cell]], formats={"A2": code} if code else None)
    (fault,) = faults(content, "c.xlsx")
    assert fault.startswith('line 2, column "MRN": ') and message in fault


def test_parquet_texts_integers_and_dates_are_read_and_nulls_are_absent(read):
    content = parquet(
        {
            "PatientID": ["007", None],
            "AccessionNumber": pyarrow.array([None, 99], pyarrow.int32()),
            "StudyDate": pyarrow.array([DAY, None]),
        }
    )
    assert read(content, "cohort.parquet") == [
        CohortRow(2, "007", study_date=DateRange(DAY, DAY)),
        CohortRow(3, None, "99"),
    ]


def test_a_data_frame_is_read_whatever_types_it_was_written_with(read, tmp_path):
    frame = pandas.DataFrame(
        {
            "mrn": pandas.Categorical(["007", "008"]),
            "acc": [12.0, float("nan")],
            "date from": [pandas.Timestamp(2024, 1, 31), pandas.NaT],
            "ward": [["a"], ["b"]],
        }
    )
    path = tmp_path / "frame.parquet"
    frame.to_parquet(path)
    assert read_cohort(path) == [
        CohortRow(2, "007", "12", study_date=DateRange(DAY, None)),
        CohortRow(3, "008"),
    ]


def test_the_index_of_a_data_frame_and_whole_numbers_with_gaps_are_read_exactly(read, tmp_path):
    numbers = pandas.array([1234567890123456789, None], dtype="Int64")
    index = pandas.Index(["007", "008"], name="MRN")
    path = tmp_path / "frame.parquet"
    pandas.DataFrame({"acc": ["A", None], "UID": numbers}, index=index).to_parquet(path)
    assert read_cohort(path) == [
        CohortRow(2, "007", "A", "1234567890123456789"),
        CohortRow(3, "008"),
    ]


@pytest.mark.parametrize(
    "values",
    [[1.5], [True], [b"1"], [["1"]], [datetime(2024, 1, 31)], [Decimal("1.5")], [float("inf")]],
)
def test_a_parquet_value_that_is_no_exact_text_is_a_fault(faults, values):
    (fault,) = faults(parquet({"PatientID": values}), "c.parquet")
    assert fault.startswith('line 2, column "PatientID": ')


def test_a_parquet_row_without_a_key_is_a_fault(faults):
    (fault,) = faults(parquet({"PatientID": ["1", None]}), "c.parquet")
    assert fault.startswith("line 3: no key")


def test_the_kind_of_file_is_recognised_by_its_bytes(read):
    assert read(workbook([["MRN"], ["7"]]), "export.csv") == [CohortRow(2, "7")]


def test_a_date_beyond_the_calendar_is_a_fault_and_no_warning_repeats_it(faults, recwarn):
    content = workbook([["MRN"], [99999999]], formats={"A2": "yyyy-mm-dd"})
    (fault,) = faults(content, "c.xlsx")
    assert fault.startswith('line 2, column "MRN": holds an error of Excel\'s')
    assert not recwarn.list


# --- faults ---------------------------------------------------------------------------------


def test_all_faults_are_told_at_once_with_line_and_column_and_none_repeats_a_value(faults):
    found = faults(
        "MRN,Accession Number,StudyInstanceUID,Date,Modality\n"
        f"SECRET*,{'SECRET-TOO-LONG' * 5},1.2.SECRET,31.01.2024,SECRET/SECRET\n"
        "SECRET?,,,,\n"
        "SE\\CRET,,,99999999,\n"
    )
    assert [fault.split(":")[0] for fault in found] == [
        'line 2, column "MRN"',
        'line 2, column "Accession Number"',
        'line 2, column "StudyInstanceUID"',
        'line 2, column "Date"',
        'line 2, column "Modality"',
        'line 3, column "MRN"',
        'line 4, column "MRN"',
        'line 4, column "Date"',
    ]
    text = str(CohortError("cohort.csv", found))
    assert not any(value in text for value in ("SECRET", "31.01", "9999", "CRET"))


def test_of_many_faults_the_first_are_told_and_the_others_counted(faults):
    found = faults("MRN\n" + "*\n" * 250)
    assert len(found) == 201
    assert found[199].startswith("line 201,") and found[200] == "and 50 more"


@pytest.mark.parametrize("column", ["PatientID", "AccessionNumber", "StudyInstanceUID"])
@pytest.mark.parametrize(
    "value", ["***", "A*B?C", "1.2.*", "?", "A\\B", '"1\n2"', "1\x002", "1\x7f", "1\u200b2"]
)
def test_what_could_select_others_is_refused(faults, column, value):
    (fault,) = faults(f"{column}\n{value}\n")
    assert fault.startswith(f'line 2, column "{column}": holds a ')


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("PatientID", "x" * 65, "has 65 characters; DICOM allows 64"),
        ("AccessionNumber", "x" * 65, "has 65 characters; no PACS keeps more than 64"),
        ("StudyInstanceUID", "1." + "2" * 63, "has 65 characters; DICOM allows 64"),
        ("StudyInstanceUID", "1..2", "is not a UID"),
        ("StudyInstanceUID", "1.2.x", "is not a UID"),
        ("AccessionNumber", "1.23457E+11", "is a number a spreadsheet has rounded"),
        ("AccessionNumber", '"=""0007"""', "is a spreadsheet formula"),
    ],
)
def test_an_identifier_that_dicom_cannot_hold_is_refused(faults, column, value, message):
    (fault,) = faults(f"{column}\n{value}\n")
    assert fault.startswith(f'line 2, column "{column}": {message}')


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("31.01.2024", "regional"),
        ("01/02/2024", "regional"),
        ("1-2-24", "regional"),
        ("20240230", "calendar"),
        ("20240131-20240101", "ends before it begins"),
        ("2024-01-31/2024-01-01", "ends before it begins"),
        ("-", "range without ends"),
        ("/", "range without ends"),
        ("202401", "not a date"),
        ("*", "not a date"),
        ("2024-01-31 09:00:00", "not a date"),
        ("last week", "not a date"),
    ],
)
def test_a_date_that_can_be_misread_is_refused(faults, written, message):
    (fault,) = faults(f"MRN,StudyDate\n1,{written}\n")
    assert fault.startswith('line 2, column "StudyDate": ') and message in fault


def test_the_two_ends_of_a_range_are_compared(faults):
    (fault,) = faults("MRN,from,to\n1,20240131,20240101\n")
    assert fault.startswith("line 2: the date range ends before it begins")


@pytest.mark.parametrize("modality", ["CT*", "CT/MR", "CT\\MR", "a very long modality"])
def test_a_modality_is_one_code(faults, modality):
    (fault,) = faults(f"MRN,Modality\n1,{modality}\n")
    assert fault.startswith('line 2, column "Modality": is not one modality code')


def test_a_row_needs_a_key(faults):
    found = faults("MRN,Modality,Description,Ward\n1,,,\n,,,\n,CT,,\n,,,A\n2,,,\n")
    assert [fault.split(";")[0] for fault in found] == [
        "line 3: no key",
        "line 4: no key",
        "line 5: no key",
    ]


@pytest.mark.parametrize("content", ["", "\n\n", "PatientID\n", "MRN,ACC\n,\n", "\ufeff"])
def test_an_empty_cohort_is_a_fault(faults, content):
    (fault,) = faults(content)
    assert "is empty" in fault or "no rows" in fault


def test_an_empty_workbook_and_an_empty_table_are_faults(faults):
    assert "is empty" in faults(workbook([]), "c.xlsx")[0]
    assert "no rows" in faults(workbook([["MRN"]]), "c.xlsx")[0]
    assert "no rows" in faults(parquet({"MRN": pyarrow.array([], "string")}), "c.parquet")[0]


@pytest.mark.parametrize(
    "content", ["0001,CT\n0002,MR\n", "Modality,Date\nCT,20240131\n", "PatientID|Acc\n1|2\n"]
)
def test_a_file_without_a_header_of_identifiers_is_refused(faults, content):
    (fault,) = faults(content)
    assert fault.startswith("line 1: no column that identifies") and "header line" in fault
    assert "0001" not in fault


def test_two_columns_of_one_meaning_are_refused(faults):
    (fault,) = faults("MRN,Ward,patient_id\n1,a,2\n")
    assert fault.startswith("line 1: columns 1 and 3 both mean PatientID")
    (fault,) = faults(parquet({"MRN": ["1"], "ward": ["a"], "patient": ["2"]}), "c.parquet")
    assert fault.startswith("line 1: columns 1 and 3 both mean PatientID")
    (fault,) = faults("MRN,StudyDate,StudyDateTo\n1,,\n")
    assert fault.startswith("line 1: both StudyDate and")


def test_a_torn_line_is_refused_where_it_would_lose_or_shift_a_key(faults, read):
    found = faults("MRN,Remark,ACC\n1,a\nb,2\n3,c,d,4\n")
    assert [fault.split(" where")[0] for fault in found] == [
        "line 2: has 2 fields",
        "line 3: has 2 fields",
        "line 4: has 4 fields",
    ]
    assert len(read("MRN,Remark\n1\n2,a,,\n")) == 2


@pytest.mark.parametrize("line", ['3,"open', '3,"a"b"'])
def test_a_broken_quote_does_not_swallow_the_rows_after_it(faults, line):
    found = faults(f"MRN,Remark\n1*,a\n{line}\n4,a\n")
    assert found[0].startswith('line 2, column "MRN"')
    assert found[1].startswith("line 3: a double quote")


def test_a_file_in_another_encoding_is_refused_with_the_line(faults):
    (fault,) = faults("MRN\n1\nMüller\n".encode("latin-1"))
    assert fault.startswith("line 3: the file is not UTF-8")
    (fault,) = faults("MRN\n1\n".encode("utf-16-le"))
    assert "NUL" in fault


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "c.xls", "old Excel file"),
        (b"PK\x03\x04 and so on", "c.xlsx", "not an Excel workbook"),
        (b"MRN\n1\n", "c.xlsx", "is called .xlsx and is none"),
        (b"PAR1 and so on PAR1", "c.parquet", "not a Parquet file"),
    ],
)
def test_a_file_that_is_not_what_it_is_called_is_refused(faults, content, name, message):
    (fault,) = faults(content, name)
    assert message in fault


@pytest.mark.needs("time")
def test_a_workbook_that_inflates_to_too_much_is_refused_unread(faults):
    stream = io.BytesIO(workbook([["MRN"], ["1"]]))
    with (
        zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("xl/media/large.bin", "w") as part,
    ):
        for _ in range(257):
            part.write(bytes(1024**2))
    (fault,) = faults(stream.getvalue(), "c.xlsx")
    assert fault.startswith("is larger than 256 MiB")


def test_a_workbook_with_entities_that_multiply_is_refused(faults):
    entities = f'<!DOCTYPE w [<!ENTITY a "{"a" * 100_000}"><!ENTITY b "{"&a;" * 1000}">'
    entities += f'<!ENTITY c "{"&b;" * 1000}">]><worksheet '
    content = workbook([["MRN"], ["1"], [2]])
    sheet = "xl/worksheets/sheet1.xml"
    content = patched(content, sheet, b"<worksheet ", entities.encode())
    content = patched(content, sheet, b"<v>2</v>", b"<v>&c;</v>")
    (fault,) = faults(content, "c.xlsx")
    assert "damaged" in fault


@pytest.mark.needs("time")
def test_a_row_where_excel_has_none_is_a_fault(faults):
    content = workbook([["MRN"], [1], [2]])
    sheet = "xl/worksheets/sheet1.xml"
    content = patched(content, sheet, b'r="3"', b'r="99999999"')
    (fault,) = faults(content, "c.xlsx")
    assert fault.startswith("after line 2: the file is damaged")


def test_a_path_that_cannot_be_read_is_a_fault_too(tmp_path):
    for path in (tmp_path / "missing.csv", tmp_path):
        with pytest.raises(CohortError) as caught:
            read_cohort(path)
        assert len(caught.value.faults) == 1


def test_the_digest_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "cohort.csv"
    path.write_bytes(b"abc")
    assert cohort_digest(path).startswith("ba7816bf8f01cfea414140de5dae2223")


# --- anything at all ------------------------------------------------------------------------


def rows_or_faults(path: Path, content: bytes) -> None:
    """The property: safe rows or faults, and no other end."""
    path.write_bytes(content)
    try:
        rows = read_cohort(path)
    except CohortError as error:
        assert error.faults
        return
    assert rows
    for row in rows:
        keys = [row.patient_id, row.accession_number, row.study_instance_uid]
        given = [key for key in keys if key is not None]
        assert given and all(is_safe_key(key) for key in given)
        assert row.study_instance_uid is None or is_uid(row.study_instance_uid)
        assert len(row.patient_id or "") <= 64 and len(row.accession_number or "") <= 64


@FUZZ
@given(content=st.binary(max_size=300))
def test_any_bytes_are_rows_or_faults(tmp_path, content):
    rows_or_faults(tmp_path / "any.csv", content)


@FUZZ
@given(
    header=st.permutations(["PatientID", "acc", "uid", "date", "PatientName", "other"])
    | st.permutations(["CandidateOf", "Take", "PatientID", "uid", "date"]),
    body=st.text(st.sampled_from(list('01.,;\t"\n\r\\*?-A\u00a0\0\u2028é/')), max_size=120),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_text_below_a_header_is_rows_or_faults(tmp_path, header, body, encoding):
    content = ",".join(header) + "\n" + body
    rows_or_faults(tmp_path / "any.csv", content.encode(encoding))


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.dates(date(1900, 3, 1)),
    st.text(st.characters(min_codepoint=32, blacklist_categories=["Cs"]), max_size=20).filter(
        lambda text: not text.endswith(("\ufffe", "\uffff"))
    ),
)


@settings(FUZZ, max_examples=100)
@given(rows=st.lists(st.lists(CELLS, max_size=5), max_size=5))
@pytest.mark.needs("time")
def test_any_cells_of_a_workbook_are_rows_or_faults(tmp_path, rows):
    content = workbook([["MRN", "acc", "uid", "date", "description"], *rows])
    rows_or_faults(tmp_path / "any.xlsx", content)


SEEDS = {
    "any.xlsx": workbook([["MRN", "date"], ["007", DAY], [8, 20240131]], formats={"A3": "000"}),
    "any.parquet": parquet({"MRN": ["007", "008"], "date": [DAY, DAY], "acc": [1, 2]}),
}


@settings(FUZZ, max_examples=200)
@given(
    name=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=4),
    length=st.floats(0.5, 1),
)
@pytest.mark.needs("time")
def test_a_damaged_file_is_rows_or_faults(tmp_path, name, changes, length):
    content = bytearray(SEEDS[name])
    for place, replacement in changes:
        at = int(place * (len(content) - 1))
        content[at : at + len(replacement)] = replacement
    if length < 0.9:
        del content[int(length * len(content)) :]
    rows_or_faults(tmp_path / name, bytes(content))


@settings(FUZZ, max_examples=200)
@given(
    part=st.sampled_from(
        [
            "xl/worksheets/sheet1.xml",
            "xl/workbook.xml",
            "xl/styles.xml",
            "xl/_rels/workbook.xml.rels",
        ]
    ),
    place=st.floats(0, 1),
    replacement=st.sampled_from([b"<", b'"', b"9", b"-", b"s", b"", b"<f/>", b"</c>", b"99999999"]),
)
@pytest.mark.needs("time")
def test_a_workbook_damaged_inside_is_rows_or_faults(tmp_path, part, place, replacement):
    seed = SEEDS["any.xlsx"]
    data = zipfile.ZipFile(io.BytesIO(seed)).read(part)
    at = int(place * (len(data) - 1))
    content = patched(seed, part, data, data[:at] + replacement + data[at + 1 :])
    rows_or_faults(tmp_path / "any.xlsx", content)


@pytest.mark.needs("time")
def test_a_hundred_thousand_rows_are_read(tmp_path):
    path = tmp_path / "large.csv"
    with path.open("w") as file:
        file.write("MRN;Acc;Date\n")
        file.writelines(f"{n:08d};A{n:07d};20240101-20240131\n" for n in range(100_000))
    rows = read_cohort(path)
    assert len(rows) == 100_000
    assert rows[-1] == CohortRow(
        100_001, "00099999", "A0099999", study_date=DateRange(date(2024, 1, 1), DAY)
    )
