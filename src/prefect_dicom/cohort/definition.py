"""A cohort as a definition in YAML: a list, a date window, filters, exclusions, a maximum.

The keys are described in ``docs/cohorts.md``. As with a site file, all faults are told at once,
each with its key and line; those of the lists that a definition names are among them. Values are
not repeated: a definition may be mistyped with a patient's data in it, and faults reach logs.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from calendar import monthrange
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationError

from prefect_dicom.cohort.bounded_regex import bounded_regex
from prefect_dicom.cohort.cells import date_range
from prefect_dicom.cohort.rows import cohort_digest, read_cohort, read_excluded
from prefect_dicom.cohort.table import DateWindow
from prefect_dicom.config.site import NodeName, PlacedPath
from prefect_dicom.config.yaml import Document, Settings, faults_of, text_of
from prefect_dicom.core.errors import CohortError, ConfigurationError
from prefect_dicom.core.model import (
    NO_FILTERS,
    CohortFilters,
    CohortRow,
    DateRange,
    Excluded,
    Filter,
    NodeOrder,
    Pattern,
    PerPatient,
)

SUFFIXES = (".yaml", ".yml")
"""Of the files that are definitions; all others are lists."""
_MOST_MONTHS = 2400
_MOST_YEARS_OF_AGE = 150
_LARGEST_COUNT = 10**9
_LONGEST_PATTERN = 200

_RANGE = re.compile(r"([0-9]{1,9})? ?- ?([0-9]{1,9})?")
_CODE = re.compile(r"[A-Za-z0-9_ *?]{1,16}")


# --- what is written for a filter


def _patterns(value: Any, check: Callable[[str], str]) -> tuple[Pattern, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("expected at least one text in the list")
    return tuple(_pattern(each, check) for each in values)


def _pattern(value: Any, check: Callable[[str], str]) -> Pattern:
    if isinstance(value, Mapping) and value.keys() == {"regex"}:
        expression = value["regex"]
        if not isinstance(expression, str) or not expression:
            raise ValueError("expected a regular expression in quotes behind `regex`")
        try:
            bounded_regex(expression)
        except ValueError as error:
            raise ValueError(f"the expression behind `regex` {error}") from None
        return Pattern(expression, regex=True)
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("expected a text; put numbers in quotes")
    if not isinstance(value, str):
        raise ValueError(
            'expected a text with * and ? as wildcards, {regex: "..."}, or a list of these'
        )
    return Pattern(check(value))


def _text(value: str) -> str:
    text = value.strip()
    if not text or len(text) > _LONGEST_PATTERN or not text.isprintable() or "\\" in text:
        raise ValueError(
            f"expected a text of 1 to {_LONGEST_PATTERN} characters without backslashes and "
            "control characters"
        )
    return text


def _code(value: str) -> str:
    if not _CODE.fullmatch(value):
        raise ValueError("expected codes like CT, each of 1 to 16 letters, digits and _")
    return value


def _sex(value: str) -> str:
    if value not in ("M", "F", "O"):
        raise ValueError("expected M, F or O (PS3.3 C.7.1.1), or a list of these")
    return value


def _texts(value: Any, keyword: str, check: Callable[[str], str] = _text) -> Filter:
    """``is`` is what is written without a key; ``not`` is what must not be."""
    if not isinstance(value, Mapping) or value.keys() == {"regex"}:
        return Filter(keyword, any_of=_patterns(value, check))
    if not value or not value.keys() <= {"is", "not"}:
        raise ValueError("expected a text, a list of texts, or the keys `is` and `not` with such")
    given = {key: _patterns(each, check) for key, each in value.items()}
    return Filter(keyword, given.get("is", ()), given.get("not", ()))


def _number(value: Any, keyword: str, most: int = _LARGEST_COUNT) -> Filter:
    told = (
        "expected a number, a range like 18-80, 18- or -80, or the keys at_least, more_than, "
        f"at_most, less_than with whole numbers up to {most}"
    )
    if isinstance(value, int):
        low = high = value
    elif isinstance(value, str):
        match = _RANGE.fullmatch(value)
        if match is None or not any(match.groups()):
            raise ValueError(told)
        low, high = (None if each is None else int(each) for each in match.groups())
    elif isinstance(value, Mapping) and value:
        low, high = _bounds(value, told)
    else:
        raise ValueError(told)
    for each in (low, high):
        if each is not None and not 0 <= each <= most:
            raise ValueError(told)
    if low is not None and high is not None and low > high:
        raise ValueError("expected a range that does not end before it begins")
    return Filter(keyword, at_least=low, at_most=high)


def _bounds(value: Mapping[str, Any], told: str) -> tuple[int | None, int | None]:
    lower, upper = {"at_least": 0, "more_than": 1}, {"at_most": 0, "less_than": -1}
    ends: list[int | None] = []
    for keys in (lower, upper):
        given = [key for key in keys if key in value]
        if len(given) > 1 or not value.keys() <= {*lower, *upper}:
            raise ValueError(told)
        if any(isinstance(value[key], bool) or not isinstance(value[key], int) for key in given):
            raise ValueError(told)
        ends.append(value[given[0]] + keys[given[0]] if given else None)
    return ends[0], ends[1]


def _dates(value: Any, keyword: str) -> Filter:
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError("expected a date like 20240131, or a range like 20240101-20240131")
    try:
        return Filter(keyword, dates=date_range(value))
    except ValueError as error:
        raise ValueError(f"{error}") from None


def _of(read: Callable[..., Filter], keyword: str, **more: Any) -> Any:
    def validate(value: Any) -> Filter | None:
        return None if value is None else read(value, keyword, **more)

    return Annotated[Any, PlainValidator(validate)]


# --- the keys


class _DateWindow(Settings):
    """Days around a date of each row."""

    around: str = Field(
        min_length=1, max_length=64, description="Name of the list's column with the date."
    )
    days_before: int = Field(0, ge=0, le=36525, description="Days before it.")
    days_after: int = Field(0, ge=0, le=36525, description="Days after it.")


class _Studies(Settings):
    """What a study has to be."""

    StudyDate: _of(_dates, "StudyDate") = Field(None, description="When it was made.")
    ModalitiesInStudy: _of(_texts, "ModalitiesInStudy", check=_code) = Field(
        None, description="Modalities, one of which is in the study."
    )
    Modality: _of(_texts, "ModalitiesInStudy", check=_code) = Field(
        None, description="The same, as in a list."
    )
    StudyDescription: _of(_texts, "StudyDescription") = Field(None, description="Its text.")
    PatientAge: _of(_number, "PatientAge", most=_MOST_YEARS_OF_AGE) = Field(
        None, description="Years of age at the study."
    )
    PatientSex: _of(_texts, "PatientSex", check=_sex) = Field(None, description="M, F or O.")
    InstitutionName: _of(_texts, "InstitutionName") = Field(None, description="Where it was made.")
    BodyPartExamined: _of(_texts, "BodyPartExamined") = Field(
        None, description="Of one of its series."
    )
    NumberOfStudyRelatedSeries: _of(_number, "NumberOfStudyRelatedSeries") = Field(
        None, description="How many series it has."
    )
    NumberOfStudyRelatedInstances: _of(_number, "NumberOfStudyRelatedInstances") = Field(
        None, description="How many instances it has."
    )


class _Series(Settings):
    """What a series has to be to be retrieved."""

    Modality: _of(_texts, "Modality", check=_code) = Field(None, description="Its modality.")
    SeriesDescription: _of(_texts, "SeriesDescription") = Field(None, description="Its text.")
    ProtocolName: _of(_texts, "ProtocolName") = Field(None, description="Its protocol.")
    BodyPartExamined: _of(_texts, "BodyPartExamined") = Field(None, description="Its body part.")
    SeriesNumber: _of(_number, "SeriesNumber") = Field(None, description="Its number.")
    NumberOfSeriesRelatedInstances: _of(_number, "NumberOfSeriesRelatedInstances") = Field(
        None, description="How many instances it has."
    )


class _MostPerPatient(Settings):
    """How many studies of a patient are taken."""

    studies: int = Field(ge=1, le=100_000, description="At most so many.")
    take: Literal["latest", "earliest"] = Field(
        "latest", description="From which end, by StudyDate."
    )


class _Definition(Settings):
    """The outermost keys."""

    nodes: tuple[NodeName, ...] | None = Field(
        None, min_length=1, description="The PACS nodes to ask, the preferred one first."
    )
    every_node: bool = Field(False, description="Ask each of them for every row.")
    list: PlacedPath | None = Field(None, description="A cohort list: CSV, XLSX or Parquet.")
    date_window: _DateWindow | None = Field(None, description="Days around a date of each row.")
    exclude: Any = Field(None, description="Lists of what is never taken.")
    studies: _Studies = Field(default_factory=_Studies, description="What a study has to be.")
    series: _Series = Field(default_factory=_Series, description="What a series has to be.")
    most_per_patient: _MostPerPatient | None = Field(
        None, description="How many studies of a patient are taken."
    )


_OUTERMOST = ", ".join(_Definition.model_fields)


# --- reading


@dataclass(frozen=True, slots=True)
class CohortFile:
    """What a cohort file asks for: its rows, and what is wanted of what they find."""

    rows: list[CohortRow]
    filters: CohortFilters = NO_FILTERS


def is_definition(path: Path) -> bool:
    """Whether a cohort file is a definition in YAML and not a list, by its name."""
    return path.suffix.lower() in SUFFIXES


def cohort_file_digest(path: Path) -> str:
    """SHA-256 (hex) of all a cohort file is made of: the same digest is the same cohort.

    Of a definition these are its bytes and those of the files it names, in its order.

    Raises
    ------
    OSError
        A file cannot be read.
    CohortError
        The definition is no YAML.
    """
    digest = cohort_digest(path)
    if not is_definition(path):
        return digest
    together = hashlib.sha256(bytes.fromhex(digest))
    for _, named in _named(path, _document(path).values):
        together.update(bytes.fromhex(cohort_digest(named)))
    return together.hexdigest()


def nodes_of_definition(path: Path, *, every_node: bool = False) -> NodeOrder | None:
    """The PACS nodes that a definition names; None where it is a list, or names none.

    Parameters
    ----------
    every_node : bool
        Ask each of several for every row, whatever the definition has.

    Raises
    ------
    CohortError
        It is no YAML, or what it has for them is faulty; the other keys are not looked at.
    """
    if not is_definition(path):
        return None
    values = _document(path).values
    given = {key: values[key] for key in ("nodes", "every_node") if key in values}
    try:
        definition = _Definition.model_validate(given)
    except ValidationError:
        # All faults of the file together, this one among them.
        read_cohort_file(path)
        raise
    if definition.nodes is None:
        return None
    every = (every_node or definition.every_node) and len(definition.nodes) > 1
    return NodeOrder(definition.nodes, every)


def read_cohort_file(path: Path) -> CohortFile:
    """Read a cohort file: a list, or a definition in YAML.

    Without a list the rows are the calendar months of ``studies.StudyDate``, numbered from 1.

    Raises
    ------
    CohortError
        With all faults of the definition and of the lists it names; no value is repeated.
    """
    if not is_definition(path):
        return CohortFile(read_cohort(path))
    document = _document(path)
    faults = document.faults
    definition = None
    try:
        context = {"folder": path.expanduser().absolute().parent}
        definition = _Definition.model_validate(document.values, context=context)
    except ValidationError as error:
        faults += faults_of(error, _Definition, document.lines, show=_kind)
    rows: list[CohortRow] = []
    excluded: set[Excluded] = set()
    for key, named in _named(path, document.values):
        try:
            if key == "list":
                rows = read_cohort(named, _date_window(document.values))
            else:
                excluded.update(read_excluded(named))
        except CohortError as error:
            faults += [f"{key}: {fault}" for fault in error.faults]
    faults += _faults_together(document.values, definition)
    if faults or definition is None:
        raise CohortError(path.name, faults)
    if definition.list is None:
        rows = list(_months(definition.studies.StudyDate.dates))
    return CohortFile(rows, _filters(definition, frozenset(excluded)))


def definition_by_date(first: date, last: date) -> str:
    """A definition of everything that was made on some days, both ends included."""
    return f"studies:\n  StudyDate: {first:%Y%m%d}-{last:%Y%m%d}\n"


def _document(path: Path) -> Document:
    try:
        return Document(text_of(path.name, path), path.name, _OUTERMOST)
    except ConfigurationError as error:
        raise CohortError(path.name, error.faults) from None


def _named(path: Path, values: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The files that a definition names, each with its key; faulty names are left out."""
    exclude = values.get("exclude")
    excluded = exclude if isinstance(exclude, list) else [exclude]
    names = [("list", values.get("list"))]
    names += [
        ("exclude" if excluded is not exclude else f"exclude[{number}]", name)
        for number, name in enumerate(excluded)
    ]
    for key, name in names:
        if isinstance(name, str) and name and name.isprintable():
            with contextlib.suppress(RuntimeError):  # a home that is not known
                yield key, path.expanduser().absolute().parent / Path(name).expanduser()


def _date_window(values: Mapping[str, Any]) -> DateWindow | None:
    """Date window, unless it is faulty: a list is read though other keys are faulty."""
    try:
        window = _DateWindow.model_validate(values.get("date_window"))
    except ValidationError:
        return None
    return DateWindow(window.around, window.days_before, window.days_after)


def _faults_together(values: Mapping[str, Any], definition: _Definition | None) -> Iterator[str]:
    """What no key has for itself."""
    exclude = values.get("exclude")
    for each in exclude if isinstance(exclude, list) else [exclude]:
        if each is not None and not (isinstance(each, str) and each and each.isprintable()):
            yield "exclude: expected the path of a list, or several in a list"
    for key, named in _named(Path(), values):
        if is_definition(named):
            yield f"{key}: expected a list (CSV, XLSX or Parquet), found a definition"
    studies = values.get("studies")
    if isinstance(studies, Mapping) and {"Modality", "ModalitiesInStudy"} <= studies.keys():
        yield "studies: Modality and ModalitiesInStudy mean the same; leave one out"
    if values.get("list") is not None or definition is None:
        return
    if definition.date_window is not None:
        yield "date_window: expected only together with `list`, around a column of which it is"
    wanted = definition.studies.StudyDate
    if wanted is None or None in (wanted.dates.first, wanted.dates.last):
        yield (
            "studies.StudyDate: expected a range with both ends, like 20240101-20240331, because "
            "there is no `list`: the PACS is asked for month after month of it"
        )
    elif _number_of_months(wanted.dates) > _MOST_MONTHS:
        yield f"studies.StudyDate: expected at most {_MOST_MONTHS // 12} years"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a group of keys"
    if isinstance(value, list):
        return "a list"
    return "a text" if isinstance(value, str) else "a number"


def _filters(definition: _Definition, excluded: frozenset[Excluded]) -> CohortFilters:
    studies = tuple(
        wanted
        for key in _Studies.model_fields
        if (wanted := getattr(definition.studies, key)) is not None
    )
    series = tuple(
        wanted
        for key in _Series.model_fields
        if (wanted := getattr(definition.series, key)) is not None
    )
    most = definition.most_per_patient
    return CohortFilters(
        studies=tuple(each for each in studies if each.keyword != "BodyPartExamined"),
        with_series=tuple(each for each in studies if each.keyword == "BodyPartExamined"),
        series=series,
        excluded=excluded,
        per_patient=most and PerPatient(most.studies, most.take == "latest"),
    )


# --- the rows of a definition without a list


def _number_of_months(days: DateRange) -> int:
    first, last = days.first, days.last
    return (last.year - first.year) * 12 + last.month - first.month + 1


def _months(days: DateRange) -> Iterator[CohortRow]:
    for line in range(1, _number_of_months(days) + 1):
        year, month = divmod(days.first.year * 12 + days.first.month + line - 2, 12)
        first = date(year, month + 1, 1)
        last = date(year, month + 1, monthrange(year, month + 1)[1])
        yield CohortRow(line, study_date=DateRange(max(first, days.first), min(last, days.last)))
