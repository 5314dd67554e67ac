"""Names of columns that a cohort does not take: which of them look like an identifier or a filter.

A column ``Accession #`` that is passed over widens its row from one study to all of a patient's. So
the names that people, registries and hospitals give such columns are known here, in several
languages, to refuse the file and say what to call them. None is taken by guess.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

IGNORE = "ignore"
"""Word before the name of a column that is to be passed over."""

_LONGEST_NAME = 80
_WORD_ENDS = re.compile(r"(?<=[a-zß-ÿ])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[\W_]+")
# With letters that Unicode does not take apart.
_SIGNS = str.maketrans(
    {"#": " no ", "№": " no ", "º": "o", "°": "o", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "ı": "i"}
)
_TAG = re.compile(r"\(?[0-9a-f]{4},? ?[0-9a-f]{4}\)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Likeness:
    """What an unknown name of a column looks like."""

    attribute: str
    """Keyword of PS3.6, or words for it."""
    remedy: str
    """What to do about the column."""
    name: str
    """The name itself where it consists of known words, else empty: it may be a patient's."""


def words_of(name: str) -> list[str]:
    """Words of a column's name, without case, accents and numbers.

    Examples
    --------
    >>> words_of("Accession #"), words_of("GeburtsDatum_2"), words_of("n° série")
    (['accession', 'no'], ['geburts', 'datum'], ['no', 'serie'])
    """
    text = name[:_LONGEST_NAME].translate(_SIGNS).replace("IDs", "ids")
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    parts = _WORD_ENDS.split("".join(letters))
    words = [word for part in parts if part and (word := part.casefold().rstrip("0123456789"))]
    # D.O.B. is a word.
    return ["".join(words)] if all(len(word) == 1 for word in words[:-1]) and words else words


def nearly_called(meaning: str, name: str) -> Likeness:
    """What a name looks like that is a known one, but for signs and numbers."""
    shown = "" if len(name) > _LONGEST_NAME or any(map(str.isdigit, name)) else name
    return Likeness(meaning, _called(meaning), " ".join(shown.split()))


@lru_cache(maxsize=1024)
def likeness(name: str) -> Likeness | None:
    """What the name of a column that is not taken looks like: an identifier, a filter, or none."""
    if _TAG.fullmatch(name.strip()):
        return Likeness("another attribute", _NOT_IN_A_LIST, "")
    # Several names in one are no separate columns.
    words = [] if "|" in name else words_of(name)
    if not words or words[0] == IGNORE or not _COMMENTS.isdisjoint(words) or _is_count(words):
        return None
    for attribute, remedy, is_like in _KINDS:
        if is_like(words):
            known = len(name) <= _LONGEST_NAME and all(map(_is_known, words))
            return Likeness(attribute, remedy, " ".join(name.split()) if known else "")
    return None


# --- words, folded as in words_of


def _set(text: str) -> frozenset[str]:
    return frozenset(word for each in text.split() for word in words_of(each))


_COMMENTS = _set(
    "comment comments remark remarks note notes bemerkung bemerkungen kommentar hinweis notiz "
    "commentaire commentaires remarque comentario comentarios observacion observaciones nota "
    "opmerking anmerkung uwagi poznamka"
)
_COUNTS = _set("count counts anzahl total quantity amount")
_MANY = _set(
    "studies series instances images patients exams examinations scans rows visits etudes images "
    "patients examens estudios imagenes pacientes studi immagini pazienti"
)
_NUMBERS = _set(
    "no nr num numb number numbers nummer numer numero numeros cislo numara nro code codes key id "
    "ids ident identifier identifiers identifikation identification identifiant identifiants "
    "identificador identificativo identyfikator kennung kennzeichen n номер ид"
)
_PATIENTS = _set(
    "patient patients patientin pat pt pts paciente pacientes paziente pazienti pacjent pacjenta "
    "pacient pacienta patientens potilas potilaan hasta beteg pasient patienten patiënt пациент "
    "пациента"
)
_PATIENT_IDS = _set(
    "mrn mrns urn emrn mpi empi nhs nhc ipp cpr ssn chi pesel prontuario personnummer "
    "fodselsnummer henkilotunnus patid patids patnr patno ptid pid pids patientid patientids "
    "patientnr patientno patientnumber patientnummer patientennummer patientennr patientenid "
    "patientenkennung patientcode patientkey patientident hospitalnumber hospitalno chartnumber "
    "chartno recordnumber medicalrecordnumber krankenaktennummer identifiantpatient"
)
_FORMER = _set(
    "old former previous prior earlier other alternate alternative alt second secondary merged "
    "alte alter fruhere ancien ancienne anterior anteriore vecchio oude gammel"
)
_RECORDS = _set(
    "medical record chart hospital clinical mrn klinik dossier akte akten aktenzeichen expediente "
    "cartella"
)
_EXAMS = _set(
    "exam exams examination examinations examen examens esame esami exame exames "
    "untersuchung untersuchungen untersuchungs procedure procedures prozedur procedimiento "
    "onderzoek undersokelse undersokning undersogelse tutkimus tutkimuksen badanie badania "
    "vysetreni vizsgalat исследование исследования tetkik inceleme scan scans imaging acquisition "
    "bildgebung aufnahme"
)
_STUDIES = _set("study studies studie studien etude etudes estudio estudios studio studi estudo")
_ORDERS = _set(
    "order orders request requisition requisitions filler placer auftrag auftrags anforderung "
    "anforderungs demande bon peticion solicitud richiesta pedido zlecenie zlecenia ris "
    "pacs radiology radiologie rontgen xray ray film remiss befund report "
    "направления"
)
_ACCESSIONS = _set(
    "accession accessions accessionno accessionnr accessionnum accessionid accessionnumbers acc "
    "accs accno accnr accnum accid acsn acn accn accessionnummer examid examno examnumber "
    "orderid orderno ordernumber requestid requestnumber auftragsnummer auftragsnr "
    "anforderungsnummer anforderungsnr untersuchungsnummer untersuchungsnr untersuchungsid "
    "zugangsnummer accesion accessione acessao requisicao accettazione akzession akzessions "
    "akzessionsnummer akzessionsnr tutkimusnumero remissnummer remissid rekvisition "
    "rekvisitionsnr rekvisitionsnummer requisition befundnummer befundnr befundid"
)
_ACCESS = _set("access acces acceso accesso acesso zugang zugangs protokol")
_BIRTHS = _set(
    "dob bday birthday birthdate birth born geb gebdat gebdatum geburt geburts geburtsdatum "
    "geburtstag geburtsdat geboren geboortedatum geboorte naissance ddn nacimiento fdn nascita "
    "nascimento urodzenia urodzony narozeni narozen fodselsdato fodsel fodt fodelsedatum fodd "
    "syntymaaika syntyma dogum szuletesi szuletes yob рождения рождение"
)
_DATES = _set(
    "date dates datum data daten datums dat dt day days tag tage fecha fechas jour jours dia dias "
    "giorno dato datoer dag dzien den paiva paivamaara pvm tarih tarihi datetime datetimes "
    "timestamp termin zeitpunkt year years jahr annee annees ano anos anno rok vuosi yil month "
    "months monat mois mes mese miesiac period periode zeitraum when from until since дата даты"
)
_DATA = _set("data daten dat")
_TIMES = _set(
    "time times zeit uhrzeit heure heures hora horas ora ore tijd tid czas cas aika saat время"
)
_DATES_OF_OTHERS = _set(
    "index death died dead deceased consent consented enrolment enrollment enrolled inclusion "
    "included randomisation randomization randomised randomized diagnosis diagnosed onset surgery "
    "operation op treatment therapy therapie chemo radiotherapy biopsy lab labs sample blood "
    "follow followup survival event recurrence relapse progression admission admitted discharge "
    "discharged withdrawal withdrawn revoked export exported import imported entry entered created "
    "modified updated update signed signature baseline point vaccination tod todes sterbe "
    "einschluss einwilligung einwilligungs diagnose entlassung deces "
    "muerte morte fallecimiento consentimiento consentement consenso diagnostic"
)
_NAMES = _set(
    "name names nom noms nombre nombres nome nomi naam navn namn nimi isim jmeno nev adi soyadi "
    "фио имя фамилия"
)
_NAME_PARTS = _set(
    "full last first family given middle complete of de del des du der the patient s voll"
)
_SURE_NAMES = _set(
    "surname forename lastname firstname familyname givenname fullname nachname vorname "
    "familienname prenom apellido apellidos cognome sobrenome nazwisko imie prijmeni achternaam "
    "voornaam etternavn fornavn efternamn fornamn sukunimi etunimi soyad patientname "
    "patientenname patname ptname фамилия фио"
)
_MODALITIES = _set("mod mods modality modalities modal")
_TYPES = _set("type types typ typen art tipo tipos kind sort soort rodzaj tur")
_DESCRIPTIONS = _set(
    "desc descr description descriptions beschreibung bezeichnung descripcion descrizione "
    "descricao omschrijving opis popis beskrivelse title titel text name names code codes"
)
_DESCRIPTIONS_AT_TIMES = _set("title titel text name names code codes opis popis")
_SERIES = _set(
    "серия серии series serie serien seri seriesuid seriesuids serieuid serienummer seriennummer"
)
_INSTANCES = _set("sop sops sopuid instanceuid instanceuids imageuid imageuids instance image")
_UIDS = _set(
    "uid uids suid siuid studyuid studyuids studyinstance studyiuid studyiuids iuid oid uuid guid"
)
_BODY_PARTS = _set("bodypart bodyparts korperteil korperregion organ")
_VISITS = _set(
    "visit visits encounter encounters episode episodes case cases fall falle fallnummer fallnr "
    "csn admission"
)
_FILLERS = _set(
    "of de del der des la le les l d di da do the and for in on a an my our all list hospital "
    "clinic performed done made acquired requested scheduled start end begin beginning ende beginn "
    "first last to von bis zum vom am"
)
_OTHER_KEYWORDS = _set(
    "studyid studytime patientbirthtime otherpatientids otherpatientnames "
    "otherpatientid issuerofpatientid issuerofaccessionnumber institutionname stationname "
    "referringphysicianname bodypartexamined protocolname laterality admissionid "
    "requestedprocedureid requestedproceduredescription sopclassuid sopclassesinstudy "
    "acquisitionnumber"
)
"""Attributes that PACS match by, and lists do not."""

# Without blanks between words: parts of a compound, or of a name in Chinese or Japanese.
_PARTS = {
    kind: parts.split()
    for kind, parts in (
        ("birth", "geburt birth geboorte 生年月日 出生 生日 생년월일 γεννησ לידה ميلاد"),
        (
            "date",
            "datum datetime dateof paiva 日期 検査日 撮影日 检查时间 검사일 날짜 "
            "ημερομηνια תאריך تاريخ",
        ),
        ("series", "seriesinst serieninst シリーズ 序列"),
        (
            "accession",
            "accession akzession 受付番号 受付no オーダー番号 検査番号 検査id 检查号 检查编号 "
            "检查流水号 "
            "影像号 放射号 登记号 접수번호 검사번호 προσβασης הדחול גישה الدخول",
        ),
        (
            "patient",
            "患者id 患者番号 患者编号 病历号 病人id 住院号 환자번호 historiaclinica rodnecislo",
        ),
        ("modality", "modalit modalid modalnosc модальност モダリティ 检查类型"),
        ("name", "患者氏名 患者姓名 患者名 姓名 氏名 환자명 성명"),
        ("exam", "untersuchung examination 检查项目 検査名"),
    )
}
_FOLDED_PARTS = {
    kind: tuple("".join(words_of(part)) for part in parts) for kind, parts in _PARTS.items()
}
_ENDS_IN_DATE = re.compile(r".+(?:date|datum|dato)")
_DATES_ALONE = _set("dos performed performedon performedat acquired acquiredon beginn ende von bis")
"""Names that are those of a date where they stand alone."""
_NO_DATES = _set("update candidate validate mandate")


def _has(words: list[str], *kinds: frozenset[str]) -> bool:
    """Whether there is a word of each kind."""
    return all(not kind.isdisjoint(words) for kind in kinds)


def _has_part(words: list[str], kind: str) -> bool:
    joined = "".join(words)
    return any(part in joined for part in _FOLDED_PARTS[kind])


def _is_count(words: list[str]) -> bool:
    joined = "".join(words)
    starts = ("numberof", "noof", "nrof", "numof", "nombrede", "numerode", "numerodi")
    of_many = words[-1] in _MANY or joined.startswith("numberofstudyrelated")
    return _has(words, _COUNTS) or (joined.startswith(starts) and of_many)


def _is_birth(words: list[str]) -> bool:
    return _has(words, _BIRTHS) or _has_part(words, "birth")


def _is_series(words: list[str]) -> bool:
    if _has(words, _SERIES) or _has_part(words, "series"):
        return True
    of_one = _has(words, _INSTANCES) and not _has(words, _STUDIES)
    return of_one and _has(words, _UIDS | _NUMBERS | {"sop"})


def _is_uid(words: list[str]) -> bool:
    return _has(words, _UIDS) or words == ["study", "instance"]


def _is_of_others(words: list[str]) -> bool:
    """Whether a date or time is of something else than a study."""
    joined = "".join(words)
    compounds = any(len(other) > 4 and other in joined for other in _DATES_OF_OTHERS)
    return compounds or _has(words, _DATES_OF_OTHERS)


def _is_date(words: list[str]) -> bool:
    if _is_of_others(words) or not _NO_DATES.isdisjoint(words):
        return False
    if "".join(words) in _DATES_ALONE:
        return True
    dates = [word for word in words if word in _DATES or _ENDS_IN_DATE.fullmatch(word)]
    if not dates and not _has_part(words, "date"):
        return False
    # In English and German these are what is measured.
    if set(dates) <= _DATA and dates:
        return len(words) == 1 or _has(words, _EXAMS | _STUDIES)
    return True


def _is_time(words: list[str]) -> bool:
    is_compound = any(word.endswith(("uhrzeit", "ungszeit", "examtime")) for word in words)
    return (_has(words, _TIMES) or is_compound) and not _is_of_others(words)


def _is_accession(words: list[str]) -> bool:
    return (
        _has(words, _ACCESSIONS)
        or _has_part(words, "accession")
        or _has(words, _EXAMS | _ORDERS | _ACCESS, _NUMBERS - {"code", "codes", "key"})
        or words in (["an"], ["order"])
        or _has(words, _STUDIES, _NUMBERS - {"id", "ids", "code", "codes", "key"})
    )


def _is_patient_id(words: list[str]) -> bool:
    return (
        _has(words, _PATIENT_IDS)
        or _has_part(words, "patient")
        or _has(words, _PATIENTS, _NUMBERS)
        or _has(words, _RECORDS, _NUMBERS)
        or _PATIENTS.issuperset(words)
    )


def _is_other_patient_id(words: list[str]) -> bool:
    return _has(words, _FORMER) and _is_patient_id(words)


def _is_patient_name(words: list[str]) -> bool:
    if _has(words, _SURE_NAMES) or _has_part(words, "name"):
        return True
    return _has(words, _NAMES) and (_NAMES | _NAME_PARTS | _PATIENTS).issuperset(words)


def _is_modality(words: list[str]) -> bool:
    return (
        _has(words, _MODALITIES)
        or _has_part(words, "modality")
        or _has(words, _EXAMS | _STUDIES, _TYPES)
        or "".join(words) in ("untersuchungsart", "untersuchungstyp", "studientyp")
    )


def _is_description(words: list[str]) -> bool:
    if _DESCRIPTIONS.issuperset(words) and not _DESCRIPTIONS_AT_TIMES.issuperset(words):
        return True
    if _has(words, _STUDIES, _DESCRIPTIONS - {"code", "codes", "name", "names"}):
        return True
    return (_has(words, _EXAMS) or _has_part(words, "exam")) and (
        (_EXAMS | _DESCRIPTIONS | _FILLERS | _STUDIES).issuperset(words)
        or (len(words) == 1 and _has_part(words, "exam"))
    )


_SURE_VISITS = _set("fallnummer fallnr csn")


def _is_visit(words: list[str]) -> bool:
    return _has(words, _SURE_VISITS) or _has(words, _VISITS, _NUMBERS)


def _is_other(words: list[str]) -> bool:
    return "".join(words) in _OTHER_KEYWORDS or (
        _has(words, _BODY_PARTS - {"organ"}) or words == ["body", "part"]
    )


_NOT_IN_A_LIST = (
    f"a list does not choose by it; choose by it in a definition, or write `{IGNORE}` before its "
    "name if it is to choose nothing"
)


def _called(keyword: str) -> str:
    return f"name it {keyword}, or write `{IGNORE}` before its name if it is to choose nothing"


_KINDS: tuple[tuple[str, str, Callable[[list[str]], bool]], ...] = (
    ("another attribute", _NOT_IN_A_LIST, _is_other),
    (
        "a key of series",
        "series are chosen in a definition (its key `series`), a list chooses whole studies: leave "
        f"the column out, or write `{IGNORE}` before its name",
        _is_series,
    ),
    ("PatientBirthDate", _called("PatientBirthDate"), _is_birth),
    ("StudyInstanceUID", _called("StudyInstanceUID"), _is_uid),
    ("StudyDate", _called("StudyDate"), _is_date),
    ("StudyTime", _NOT_IN_A_LIST, _is_time),
    ("PatientName", _called("PatientName"), _is_patient_name),
    ("OtherPatientID", _called("OtherPatientID"), _is_other_patient_id),
    ("PatientID", _called("PatientID"), _is_patient_id),
    ("AccessionNumber", _called("AccessionNumber"), _is_accession),
    ("the number of a visit", _NOT_IN_A_LIST, _is_visit),
    ("Modality", _called("Modality"), _is_modality),
    ("StudyDescription", _called("StudyDescription"), _is_description),
)
"""The first that a name is like counts."""

_KNOWN = frozenset().union(
    _NUMBERS, _PATIENTS, _PATIENT_IDS, _RECORDS, _EXAMS, _STUDIES, _ORDERS, _ACCESSIONS,
    _BIRTHS, _DATES, _TIMES, _NAMES, _NAME_PARTS, _SURE_NAMES, _MODALITIES, _TYPES,
    _DESCRIPTIONS, _SERIES, _INSTANCES, _UIDS, _FORMER, _BODY_PARTS, _VISITS, _FILLERS,
)  # fmt: skip


def _is_known(word: str) -> bool:
    return word in _KNOWN or any(word in parts for parts in _FOLDED_PARTS.values())
