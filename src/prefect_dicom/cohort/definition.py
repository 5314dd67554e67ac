"""A cohort as a definition in YAML: a list, a date window, filters, exclusions, a maximum.

The keys are described in ``docs/cohorts.md``. As with a site file, all faults are reported at once,
each with its key and line; those of the lists that a definition names are among them. Values are
not repeated: a definition may be mistyped with a patient's data in it, and faults reach logs.
"""

from __future__ import annotations

import contextlib
import hashlib
from calendar import monthrange
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from prefect_dicom.cohort.filter_syntax import (
    check_code,
    check_sex,
    read_by,
    read_dates,
    read_number,
    read_texts,
)
from prefect_dicom.cohort.list_options import NO_CHOICES, FaultyLines, HiddenRows, ListOptions
from prefect_dicom.cohort.modalities import is_defined
from prefect_dicom.cohort.rows import CohortList, cohort_digest, read_excluded, read_list
from prefect_dicom.cohort.table import DateWindow
from prefect_dicom.config.fields import NodeName, PlacedPath
from prefect_dicom.config.messages import faults_of
from prefect_dicom.config.settings import Settings
from prefect_dicom.config.yaml import Document, text_of
from prefect_dicom.core.errors import CohortError, ConfigurationError
from prefect_dicom.core.model import (
    NO_FILTERS,
    CohortFilters,
    CohortRow,
    DateRange,
    Excluded,
    FaultyLine,
    NodeOrder,
    PerPatient,
)

SUFFIXES = (".yaml", ".yml")
"""Of the files that are definitions; all others are lists."""
_MOST_MONTHS = 2400
_MOST_YEARS_OF_AGE = 150


# --- the keys


class _DateWindow(Settings):
    """Days around a date of each row."""

    around: str = Field(
        min_length=1, max_length=64, description="Name of the list's column with the date."
    )
    days_before: int = Field(default=0, ge=0, le=36525, description="Days before it.")
    days_after: int = Field(default=0, ge=0, le=36525, description="Days after it.")


class _Studies(Settings):
    """What a study has to be."""

    StudyDate: Annotated[Any, read_by(read_dates, "StudyDate")] = Field(
        default=None, description="When it was made."
    )
    ModalitiesInStudy: Annotated[
        Any, read_by(read_texts, "ModalitiesInStudy", check=check_code)
    ] = Field(default=None, description="Modalities, one of which is in the study.")
    Modality: Annotated[Any, read_by(read_texts, "ModalitiesInStudy", check=check_code)] = Field(
        default=None, description="The same, as in a list."
    )
    StudyDescription: Annotated[Any, read_by(read_texts, "StudyDescription")] = Field(
        default=None, description="Its text."
    )
    PatientAge: Annotated[Any, read_by(read_number, "PatientAge", most=_MOST_YEARS_OF_AGE)] = Field(
        default=None, description="Years of age at the study."
    )
    PatientSex: Annotated[Any, read_by(read_texts, "PatientSex", check=check_sex)] = Field(
        default=None, description="M, F or O."
    )
    InstitutionName: Annotated[Any, read_by(read_texts, "InstitutionName")] = Field(
        default=None, description="Where it was made."
    )
    BodyPartExamined: Annotated[Any, read_by(read_texts, "BodyPartExamined")] = Field(
        default=None, description="Of one of its series."
    )
    NumberOfStudyRelatedSeries: Annotated[
        Any, read_by(read_number, "NumberOfStudyRelatedSeries")
    ] = Field(default=None, description="How many series it has.")
    NumberOfStudyRelatedInstances: Annotated[
        Any, read_by(read_number, "NumberOfStudyRelatedInstances")
    ] = Field(default=None, description="How many instances it has.")


class _Series(Settings):
    """What a series has to be to be retrieved."""

    Modality: Annotated[Any, read_by(read_texts, "Modality", check=check_code)] = Field(
        default=None, description="Its modality."
    )
    SeriesDescription: Annotated[Any, read_by(read_texts, "SeriesDescription")] = Field(
        default=None, description="Its text."
    )
    ProtocolName: Annotated[Any, read_by(read_texts, "ProtocolName")] = Field(
        default=None, description="Its protocol."
    )
    BodyPartExamined: Annotated[Any, read_by(read_texts, "BodyPartExamined")] = Field(
        default=None, description="Its body part."
    )
    SeriesNumber: Annotated[Any, read_by(read_number, "SeriesNumber")] = Field(
        default=None, description="Its number."
    )
    NumberOfSeriesRelatedInstances: Annotated[
        Any, read_by(read_number, "NumberOfSeriesRelatedInstances")
    ] = Field(default=None, description="How many instances it has.")


class _MostPerPatient(Settings):
    """How many studies of a patient are taken."""

    studies: int = Field(ge=1, le=100_000, description="At most so many.")
    take: Literal["latest", "earliest"] = Field(
        default="latest", description="From which end, by StudyDate."
    )


class _Definition(Settings):
    """The outermost keys."""

    nodes: tuple[NodeName, ...] | None = Field(
        default=None, min_length=1, description="The PACS nodes to ask, the preferred one first."
    )
    every_node: bool = Field(default=False, description="Ask each of them for every row.")
    list: PlacedPath | None = Field(
        default=None, description="A cohort list: CSV, XLSX or Parquet."
    )
    date_window: _DateWindow | None = Field(
        default=None, description="Days around a date of each row."
    )
    hidden_rows: HiddenRows | None = Field(
        default=None, description="Whether rows that a workbook hides are taken."
    )
    faulty_lines: FaultyLines | None = Field(
        default=None, description="Whether faulty lines of the list are set apart."
    )
    exclude: Any = Field(default=None, description="Lists of what is never taken.")
    studies: _Studies = Field(default_factory=_Studies, description="What a study has to be.")
    series: _Series = Field(default_factory=_Series, description="What a series has to be.")
    most_per_patient: _MostPerPatient | None = Field(
        default=None, description="How many studies of a patient are taken."
    )


_OUTERMOST = ", ".join(_Definition.model_fields)


# --- reading


@dataclass(frozen=True, slots=True)
class CohortFile:
    """What a cohort file asks for: its rows, and what is wanted of what they find."""

    rows: list[CohortRow]
    filters: CohortFilters = NO_FILTERS
    faulty: tuple[FaultyLine, ...] = ()
    """Lines of the list that were set apart."""
    notes: tuple[str, ...] = ()
    """What was not taken of the files, in words that repeat no value."""


def is_definition(path: Path) -> bool:
    """Whether a cohort file is a definition in YAML and not a list, by its name."""
    return path.suffix.lower() in SUFFIXES


def cohort_file_digest(path: Path, options: ListOptions = NO_CHOICES) -> str:
    """SHA-256 (hex) of all a cohort file is made of: the same digest is the same cohort.

    Of a definition these are its bytes and those of the files it names, in its order. What was
    chosen for the rows of a list makes another cohort of it.

    Raises
    ------
    OSError
        A file cannot be read.
    CohortError
        The definition is no YAML.
    """
    digest = cohort_digest(path)
    if not is_definition(path) and not options.text:
        return digest
    together = hashlib.sha256(bytes.fromhex(digest))
    if is_definition(path):
        for _, named in _named(path, _document(path).values):
            together.update(bytes.fromhex(cohort_digest(named)))
    together.update(options.text.encode())
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


def read_cohort_file(path: Path, options: ListOptions = NO_CHOICES) -> CohortFile:
    """Read a cohort file: a list, or a definition in YAML.

    Without a list the rows are the calendar months of ``studies.StudyDate``, numbered from 1.

    Parameters
    ----------
    options : ListOptions
        What a person has chosen for lists; it takes precedence over a definition's keys.

    Raises
    ------
    CohortError
        With all faults of the definition and of the lists it names; no value is repeated.
    """
    if not is_definition(path):
        given = read_list(path, options=options)
        return CohortFile(given.rows, faulty=given.faulty, notes=given.notes)
    document = _document(path)
    faults = document.faults
    definition = None
    try:
        context = {"folder": path.expanduser().absolute().parent}
        definition = _Definition.model_validate(document.values, context=context)
    except ValidationError as error:
        faults += faults_of(error, _Definition, document.lines, show=_kind)
    options = options.or_else(_list_options(document.values))
    listed = CohortList([])
    excluded: set[Excluded] = set()
    for key, named in _named(path, document.values):
        try:
            if key == "list":
                listed = read_list(named, _date_window(document.values), options)
            else:
                excluded.update(read_excluded(named, options))
        except CohortError as error:
            faults += [f"{key}: {fault}" for fault in error.faults]
    faults += _faults_together(document.values, definition)
    if faults or definition is None:
        raise CohortError(path.name, faults)
    if definition.list is None:
        listed = CohortList(list(_months(definition.studies.StudyDate.dates)))
    filters = _filters(definition, frozenset(excluded))
    notes = (*listed.notes, *_notes_on(filters))
    return CohortFile(listed.rows, filters, listed.faulty, notes)


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


def _list_options(values: Mapping[str, Any]) -> ListOptions:
    """Choices for lists, without those that are faulty: a list is read though keys are faulty."""
    hidden, faulty = values.get("hidden_rows"), values.get("faulty_lines")
    return ListOptions(
        hidden if hidden in get_args(HiddenRows) else None,
        faulty if faulty in get_args(FaultyLines) else None,
    )


def _notes_on(filters: CohortFilters) -> Iterator[str]:
    """What is worth a look in filters that are no fault."""
    for each in (*filters.studies, *filters.series):
        patterns = [p for p in (*each.any_of, *each.none_of) if not p.regex]
        if each.keyword in ("ModalitiesInStudy", "Modality") and any(
            not is_defined(p.text) for p in patterns if set(p.text).isdisjoint("*?")
        ):
            yield (
                f"{each.keyword}: a modality that DICOM does not define; it finds studies only on "
                "a PACS that uses it"
            )


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
    elif _number_of_months(wanted.dates.first, wanted.dates.last) > _MOST_MONTHS:
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
    per_patient = None if most is None else PerPatient(most.studies, most.take == "latest")
    return CohortFilters(
        studies=tuple(each for each in studies if each.keyword != "BodyPartExamined"),
        with_series=tuple(each for each in studies if each.keyword == "BodyPartExamined"),
        series=series,
        excluded=excluded,
        per_patient=per_patient,
    )


# --- the rows of a definition without a list


def _number_of_months(first: date, last: date) -> int:
    return (last.year - first.year) * 12 + last.month - first.month + 1


def _months(days: DateRange) -> Iterator[CohortRow]:
    """One row for each calendar month of a range with both ends."""
    if days.first is None or days.last is None:
        raise ValueError("the range is open")
    for line in range(1, _number_of_months(days.first, days.last) + 1):
        year, month = divmod(days.first.year * 12 + days.first.month + line - 2, 12)
        first = date(year, month + 1, 1)
        last = date(year, month + 1, monthrange(year, month + 1)[1])
        yield CohortRow(line, study_date=DateRange(max(first, days.first), min(last, days.last)))
