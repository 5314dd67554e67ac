"""A column is taken, refused because it looks like one to be taken, or named as ignored."""

from __future__ import annotations

import pytest

from prefect_dicom.cohort.column_names import likeness
from prefect_dicom.cohort.rows import read_cohort, read_excluded, read_list
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import CohortRow, Excluded
from tests.support.lists import FORMATS, read_as, workbook

NAMES = {
    "AccessionNumber": """
        Accession #|Accession No.|Acc. Nr|accession-number|AccNo|Nº accession|Accession ID|Exam ID
        Order Number|Auftragsnummer|Anforderungs-Nr.|Untersuchungsnummer|RIS number|Study number
        Numéro d'accès|Nº de acceso|検査番号|检查号|X-ray no
        Akzessionsnr.|Numero accettazione|Remiss-ID|Rekvisition
        Requisition|Order|Befundnummer|Report ID|影像号|検査ID|Номер направления
        Αριθμός πρόσβασης|מספר גישה""",
    "StudyDate": """
        Exam Date|exam_dt|ExamDate|Date of exam|dateofexam|Scan Date|CT date|Acquisition Date|Date2
        Untersuchungsdatum|Datum der Untersuchung|Datum|Studiendatum|Fecha de estudio|Date/Time
        Date de l'examen|Data esame|data badania|Onderzoeksdatum|дата исследования|検査日|Year
        Tutkimuspäivä|Undersökningsdatum|Undersøgelsesdato|Tetkik Tarihi|검사일
        Ημερομηνία|תאריך|DOS|Performed on|Acquired|von|bis|Beginn""",
    "PatientBirthDate": """
        DOB|D.O.B.|dob|Birth Date 2|Date of Birth|Born|Geburtsdatum|geb.|GebDat|date de naissance
        Fecha de nacimiento|data di nascita|geboortedatum|fødselsdato|дата рождения|生年月日
        생년월일
        Datum narození|Doğum tarihi|Születési dátum|תאריך לידה|Ημερομηνία γέννησης""",
    "a key of series": """
        SeriesInstanceUID|Series Instance UID|SeriesUID|Series|série|Serie|Série UID|Series Number
        Series Description|SeriesDescription|SOPInstanceUID|SOP Instance UID|Instance Number|серия
        シリーズ""",
    "StudyInstanceUID": "Study-UID|SUID|UIDs|Study Instance UIDs|StudyIUID|study_instance",
    "PatientID": """
        MRN#|MRN No|Patient-ID|Patient Number|PatientID2|PatientenID|Patienten-Nr.|PatNr|PID|NHC
        numéro patient|ID paciente|Medical Record Number|Hospital No|患者ID|Paciente
        Numéro de dossier|Akten-Nr.|номер пациента|환자번호|Historia clínica""",
    "OtherPatientID": "Old MRN|Former MRN|Previous MRN|alte Patientennummer|Alt. Patient ID",
    "PatientName": """
        Name|Patient's Name|Nachname|Vorname|Last Name|First Name|Nom|Prénom|Apellidos|cognome
        фамилия|氏名|患者名""",
    "Modality": "Modalität|Modalité|modalidad|Mod|Exam type|Untersuchungsart|モダリティ|Modality 1",
    "StudyDescription": """
        Exam|Examination|Procedure|Untersuchung|Study Desc|Exam Description|Beschreibung|Examen""",
    "StudyTime": "Exam time|Uhrzeit|heure",
    "another attribute": """
        StudyID|Study ID|StudyTime|BodyPartExamined|body part|InstitutionName|(0020,000e)""",
    "the number of a visit": "Visit number|Fallnummer|Encounter ID",
}
LIKE = [
    (name.strip(), attribute)
    for attribute, names in NAMES.items()
    for name in names.replace("\n", "|").split("|")
    if name.strip()
]
HARMLESS = """
    Comment|Comments|Ward|Remark|Age|Sex|Gender|Group|Consent|Diagnosis|Hospital|Notes|Index Date
    Date of death|Consent Date|Last update|Subject ID|Pseudonym|Number of series|# of instances
    NumberOfStudyRelatedInstances|Referring physician|Hospital Name|Site|Weight|Timepoint|No.|ID
    Survival time|ignore Exam Date|ignore DOB|Comment on the exam date|Bemerkung|Stage|Protocol
    Überlebenszeit|Einschlussdatum|OP-Datum|Candidate|Study|line|node|verdict|Unnamed: 0
    Performed by|Order status|Sort order
"""
OTHERS = [name.strip() for name in HARMLESS.replace("\n", "|").split("|") if name.strip()]


def refusal(read, *arguments: object) -> tuple[str, ...]:
    with pytest.raises(CohortError) as caught:
        read(*arguments)
    return caught.value.faults


@pytest.mark.parametrize(("name", "attribute"), LIKE)
def test_a_column_that_looks_like_an_identifier_or_a_filter_refuses_the_list(
    tmp_path, name, attribute
):
    path = tmp_path / "list.csv"
    path.write_text(f'StudyInstanceUID;"{name}"\n1.2.3;A3\n')
    [fault] = refusal(read_cohort, path)
    assert fault.startswith("line 1, column 2")
    assert f"looks like {attribute} and is not taken" in fault
    remedies = {"a key of series": "series are chosen in a definition"}
    if not attribute.startswith(("another", "the", "StudyTime")):
        assert remedies.get(attribute, f"name it {attribute}") in fault


@pytest.mark.parametrize("name", OTHERS)
def test_a_column_that_looks_like_none_is_ignored_and_named(tmp_path, name):
    path = tmp_path / "list.csv"
    path.write_text(f'PatientID;"{name}"\n000123;x\n')
    given = read_list(path)
    assert given.rows == [CohortRow(2, "000123")]
    shown = "number 2" if any(map(str.isdigit, name)) else f'"{name}"'
    assert given.notes == (f"columns that are ignored: {shown}",)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (("MRN", "Accession #"), ("000123", "A3")),
        (("PatientID", "Exam Date"), ("000123", "2024-02-03")),
        (("PatientID", "DOB"), ("000123", "1999-01-01")),
        (("StudyInstanceUID", "SeriesInstanceUID"), ("1.2.3", "1.2.3.2")),
        (("PatientID", "Geburtsdatum"), ("000123", "1999-01-01")),
    ],
)
def test_every_format_is_refused_alike(tmp_path, kind, columns, row):
    [fault] = refusal(read_as, kind, tmp_path, columns, row)
    assert fault.startswith(f'line 1, column 2 "{columns[1]}": looks like ')


def test_the_name_of_the_index_of_a_frame_is_looked_at_too(tmp_path):
    import pandas

    from prefect_dicom.cohort.data_frame import read_frame

    frame = pandas.DataFrame({"MRN": ["000123"]}, index=pandas.Index(["A3"], name="Accession #"))
    [fault] = refusal(read_frame, frame)
    assert 'column 1 "Accession #": looks like AccessionNumber' in fault
    frame.to_parquet(tmp_path / "list.parquet")
    [fault] = refusal(read_cohort, tmp_path / "list.parquet")
    assert '"Accession #": looks like AccessionNumber' in fault


def test_series_alone_are_told_where_they_are_chosen(tmp_path):
    (tmp_path / "list.csv").write_text("SeriesInstanceUID\n1.2.3.4\n")
    faults = refusal(read_cohort, tmp_path / "list.csv")
    assert "series are chosen in a definition" in faults[0]
    assert "no column that identifies" in faults[1]


def test_all_such_columns_are_told_at_once(tmp_path):
    (tmp_path / "list.csv").write_text("MRN,Accession #,DOB,Comment,Exam Date\n1,2,3,4,5\n")
    faults = refusal(read_cohort, tmp_path / "list.csv")
    assert [fault.split(":")[0] for fault in faults] == [
        'line 1, column 2 "Accession #"',
        'line 1, column 3 "DOB"',
        'line 1, column 5 "Exam Date"',
    ]


def test_a_name_that_may_be_a_patients_is_not_repeated(tmp_path):
    (tmp_path / "list.csv").write_text("MRN,Meier Anna geb. 1950,Meier 4711\n1,2,3\n")
    [fault] = refusal(read_cohort, tmp_path / "list.csv")
    assert fault.startswith("line 1, column 2: looks like PatientBirthDate")
    assert likeness("Date of birth").name == "Date of birth"
    (tmp_path / "list.csv").write_text("MRN,Meier 4711,Meier^Anna\n1,2,3\n")
    given = read_list(tmp_path / "list.csv")
    assert given.notes == ("columns that are ignored: number 2, number 3",)


def test_what_is_understood_stays_understood(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("MRN,Accession Number,Comment\n000123,A3,x\n")
    assert read_cohort(path) == [CohortRow(2, "000123", "A3")]
    path.write_text("MRN,Patient ID\n1,2\n")
    [fault] = refusal(read_cohort, path)
    assert fault.startswith("line 1: columns 1 and 2 both mean PatientID")


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_values_below_no_name_are_named(tmp_path, kind):
    if kind == "csv":
        path = tmp_path / "list.csv"
        path.write_text("PatientID,,\n000123,A3,\n000124,,\n")
    else:
        path = workbook(tmp_path / "list.xlsx", [["PatientID"], ["000123", "A3"], ["000124"]])
    given = read_list(path)
    assert [row.patient_id for row in given.rows] == ["000123", "000124"]
    assert given.notes == ("columns with values and without a name, ignored: number 2",)


# --- lists of exclusions


def test_an_exclusion_with_such_a_column_is_refused(tmp_path):
    path = tmp_path / "withdrawn.csv"
    path.write_text("MRN,Accession #\n000123,A3\n")
    [fault] = refusal(read_excluded, path)
    assert fault.startswith('line 1, column 2 "Accession #": looks like AccessionNumber')


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("StudyDate", "20240203"),
        ("Modality", "CT"),
        ("StudyDescription", "Head"),
        ("Issuer", "NORTH"),
        ("from", "20240203"),
    ],
)
def test_an_exclusion_leaves_out_no_more_than_it_says(tmp_path, column, value):
    path = tmp_path / "withdrawn.csv"
    path.write_text(f"MRN,ACC,{column}\n000123,,{value}\n000124,A4,{value}\n000125,,\n")
    [fault] = refusal(read_excluded, path)
    assert fault.startswith("line 2: gives a patient with a date, modality, description or issuer")
    path.write_text(f"MRN,ACC,{column},PatientName\n000124,A4,{value},X\n000125,,,Y\n")
    assert read_excluded(path) == [Excluded("000124", "A4"), Excluded("000125")]
