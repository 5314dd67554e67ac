"""Reasons of cohort rows: results of discovery with their identifiers and filters."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition, Verdict
from prefect_dicom.core.reasons.reason import Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition


ROWS = (
    Reason(
        "all-archived",
        PERMANENT,
        Scope.STUDY,
        meaning="Every study of the row is archived.",
        advice="Nothing to do.",
        explanation="""
Every instance on the PACS's list, read before and after the retrieval, is in the archive, and a
manifest names them all with their hashes.""",
        rerun="None is needed; it would send no request to the PACS.",
    ),
    Reason(
        "some-archived",
        TRANSIENT,
        Scope.STUDY,
        meaning="Some of the row's studies or instances are archived, others are not.",
        advice="See the reasons of its studies, then `prefect-dicom rerun`.",
        explanation="""
The row found several studies, or one of which a part is archived. What is archived stays; only
what is missing is requested again. `prefect-dicom status COHORT` counts the reasons,
`results.csv` has the studies of each line.""",
    ),
    Reason(
        "line-faulty",
        PERMANENT,
        Scope.STUDY,
        meaning="The line of the cohort file has a fault, and was set apart: nothing was asked.",
        advice=(
            "Correct the line (the column `faults` of `results.csv` says what is wrong with it) "
            "and pull the corrected file; what is archived is not asked for again."
        ),
        explanation="""
A file with a faulty line is refused as a whole, so that nobody takes a part for the cohort. With
`--faulty-lines set-apart` (`faulty_lines: set-apart` in a definition) the other lines are pulled,
and each faulty one has this verdict. Faults of the whole file (its header, its encoding, rows that
are hidden, a quote that is never closed) refuse it all the same, and so do those of a list of
exclusions. A corrected file is another cohort, with a ledger entry and a report of its own.""",
        rerun="No: the line stays as it was registered. Pull the corrected file.",
        row_verdict=Verdict.FAULTY,
    ),
    Reason(
        "no-match",
        PERMANENT,
        Scope.STUDY,
        meaning="The PACS has no study with the row's identifiers.",
        advice=(
            "Check the identifiers at their source (leading zeros, case, another PACS); near "
            "misses among the PACS's answers are in `candidates.csv`."
        ),
        explanation="""
The query was answered in full and without a match. Orthanc and dcmqrscp compare PatientID and
AccessionNumber in exact case and with all zeros: `000123` is not `123`. Spreadsheets drop leading
zeros silently; format the column as text before you save. Some PACS store an accession number with
blanks or a prefix of the issuing system: `candidates.csv` then says "has text before it". Where no
study of the row's PatientID has the row's accession number, the patient's studies are the
candidates: the accession number is probably mistyped. Try one row with `prefect-dicom doctor
--accession` or `--patient`.""",
        row_verdict=Verdict.NOT_FOUND,
        specificity=1,
    ),
    Reason(
        "excluded-by-filter",
        PERMANENT,
        Scope.STUDY,
        meaning=(
            "Studies with the row's identifiers exist; none passes the filters of the row "
            "or of the cohort."
        ),
        advice=(
            "Widen the filters of the row or of the cohort's definition if these studies are "
            "wanted."
        ),
        explanation="""
The PACS was queried by the identifiers alone and its answers were filtered here, because PACS match
dates and modalities differently or ignore them: dcmqrscp ignores a modality, some shift the date of
a study near midnight. Nothing is wrong unless you wanted these studies.""",
        row_verdict=Verdict.EXCLUDED,
        specificity=3,
    ),
    Reason(
        "filter-undecided",
        OPERATOR,
        Scope.REQUEST,
        meaning=(
            "The PACS does not return an attribute of a study that a filter of the cohort's "
            "definition needs."
        ),
        advice=(
            "Look at the row's near misses: name the wanted ones by StudyInstanceUID in a list, "
            "or leave the filter out."
        ),
        explanation="""
An attribute that a PACS does not support is absent from its answers, and some leave out ages, sexes
or numbers of instances though they have them. An empty or unreadable date, sex, age or number
counts as unknown; an empty description counts as a text without words. A study whose PatientID or
accession number differs from an excluded one in case, blanks or leading zeros alone belongs here
too: it may be the same. Studies that pass all filters are pulled.""",
        row_verdict=Verdict.AMBIGUOUS,
        specificity=8,
        beside_studies=True,
    ),
    Reason(
        "window-empty",
        PERMANENT,
        Scope.STUDY,
        meaning="The PACS has no study in this date window.",
        advice="Nothing to do, unless there should be some.",
        explanation="""
A cohort without a list is queried month by month, and each month is a row. The query for the dates
of this row returned no study, before any filter was applied.""",
        row_verdict=Verdict.EXCLUDED,
        specificity=2,
    ),
    Reason(
        "beyond-the-maximum",
        PERMANENT,
        Scope.STUDY,
        meaning="The patient has more studies than the cohort's maximum per patient.",
        advice="Raise `most_per_patient` of the definition if they are wanted.",
        explanation="""
All rows of a cohort are queried first. Then the latest or earliest studies of each PatientID, as
the PACS returns it, are taken by StudyDate and, within a day, by UID. Studies without a date are
the last to be taken. Studies without a PatientID are not counted together.""",
        row_verdict=Verdict.EXCLUDED,
    ),
    Reason(
        "selected-otherwise",
        OPERATOR,
        Scope.STUDY,
        meaning=(
            "The study is archived, or being pulled, with another selection of series than this "
            "cohort's."
        ),
        advice=(
            "Pull this cohort with another archive prefix and another ledger: an archive holds a "
            "study under one selection, and nothing in it is overwritten."
        ),
        explanation="""
The selection of series is written into the manifest of a study (`selection`), and into the ledger
when the study is listed. Object keys consist of UIDs alone, so a second selection of the same study
would use the same keys with another manifest.""",
        failover=False,
    ),
    Reason(
        "several-patients",
        OPERATOR,
        Scope.STUDY,
        meaning="The row's identifiers belong to studies of more than one patient.",
        advice=(
            "Mark the right ones of the candidates in `candidates.csv` and pull that file, or add "
            "PatientID, IssuerOfPatientID or StudyInstanceUID to the row."
        ),
        explanation="""
One accession number, one study UID or one PatientID belongs to studies of different patients. That
happens with numbers of several hospitals in one PACS, after an incomplete merge, and with test
patients. Under one PatientID, patients are told apart by issuers, birth dates and names: two birth
dates, or two issuers without one birth date, are two people; one birth date is one person, however
the name is spelled, and after a marriage. None is chosen by guess: a wrong patient in a cohort is
worse than a missing one. A column IssuerOfPatientID, PatientName or PatientBirthDate beside the
PatientID says who is meant. The candidates are in `candidates.csv` in the reports folder, a line
for each: write `x` into the column Take of those you want, and pull the file as a cohort of its
own.""",
        row_verdict=Verdict.AMBIGUOUS,
        specificity=10,
        settles_row=True,
    ),
    Reason(
        "name-disagrees",
        PERMANENT,
        Scope.STUDY,
        meaning=(
            "The row's identifiers were found, with a patient's name or birth date that is not "
            "the row's, or with none."
        ),
        advice=(
            "Check the row's identifiers; where the studies are right all the same, mark them in "
            "`candidates.csv` and pull that file."
        ),
        explanation="""
A mistyped accession number is often the number of a stranger's study. Where the cohort file has a
column PatientName or PatientBirthDate, every study that the identifiers find is compared with them,
and one that differs keeps the whole row from being taken. Names are compared without regard to
case, accents and titles, group by group (Latin, ideographic, phonetic); `Müller, Jörg` with a comma
and `Mueller^Joerg` are not the same and are called "written otherwise". A PACS that drops the
letters it cannot send (Orthanc answers in Latin-1 whatever the instances hold) or does not return
the birth date leaves nothing to compare: such rows end here too. `candidates.csv` says for each
study what differs.""",
        row_verdict=Verdict.AMBIGUOUS,
        specificity=9,
        settles_row=True,
    ),
    Reason(
        "known-otherwise",
        OPERATOR,
        Scope.STUDY,
        meaning=(
            "The PACS answers the query for the row's identifier with studies under another "
            "identifier."
        ),
        advice=(
            "Mark the right ones of the candidates in `candidates.csv` and pull that file, or give "
            "the other number in a column OtherPatientID."
        ),
        explanation="""
The PACS does match by this key: a query for a number that no patient has returned nothing. The
query for the row's number returned studies with another number. The row's number is probably a
former one (patients that were merged or moved, prefixes that a broker adds), and the studies are
filed under the present one. Only the PACS says that both are the same patient, so a person has to
check: the candidates are in `candidates.csv`, and studies under the row's own number are
pulled.""",
        row_verdict=Verdict.AMBIGUOUS,
        specificity=8,
        beside_studies=True,
    ),
    Reason(
        "key-ignored",
        OPERATOR,
        Scope.STUDY,
        meaning=(
            "The PACS answered with other studies than the row's: it does not match by this "
            "identifier, and whether it has the row's studies is unknown."
        ),
        advice=(
            "Name the studies by StudyInstanceUID, or have matching by this key enabled on the "
            "PACS."
        ),
        explanation="""
A PACS that does not support a key leaves it out of the matching and answers with all studies.
dcmqrscp does so with every key it does not support. No answer had the row's identifier, and a query
for a number that no patient has was answered with studies too.""",
        specificity=6,
        inconclusive=True,
    ),
    Reason(
        "identifier-missing",
        OPERATOR,
        Scope.STUDY,
        meaning=(
            "The PACS's answers lack the identifier that the row was queried by, so they cannot be "
            "compared with the row."
        ),
        advice="Name the studies by StudyInstanceUID, or have the key returned by the PACS.",
        explanation="""
Return keys are optional for many PACS: the answer then lacks the PatientID or the accession number
of the row, and that it belongs to the row would be a guess. The same holds for an IssuerOfPatientID
that the row has and no answer returns. Study UIDs are in every answer.""",
        specificity=5,
        inconclusive=True,
    ),
    Reason(
        "list-unproved",
        OPERATOR,
        Scope.STUDY,
        meaning=(
            "The PACS cut its list of the row's studies short and may have more of them. Those it "
            "returned are pulled."
        ),
        advice=(
            "Have the PACS's limit of answers raised, or give the row more keys; the column "
            "`gaps` of `results.csv` says where studies may be missing."
        ),
        explanation="""
The list of answers ended at the PACS's limit, with a status that says so (FE00, B001, A700) or
without one, and the query was partitioned: by halves of the dates down to single days, by modality,
by the last or first characters of accession number or PatientID. A partition that is cut short too,
and that none of these divides further, is named in the column `gaps` of `results.csv`: days, with a
modality where only that one is cut, or "studies without a date", which no range of dates finds.
"Studies without a UID of their own" are of several patients under one StudyInstanceUID, or have one
that cannot be queried. The studies that were found are pulled; whether the row is complete, a
person has to check by the gaps. Orthanc's limit is `LimitFindResults`.""",
        specificity=7,
        beside_studies=True,
    ),
    Reason(
        "unsafe-uid",
        PERMANENT,
        Scope.STUDY,
        meaning=(
            "The study's UID on the PACS is empty or has wildcards; a request with it would select "
            "other studies."
        ),
        advice="Have the study's UID repaired on the PACS.",
        explanation="""
A request with an empty UID, or with `*`, `?` or a backslash in it, selects other studies than the
one meant: dcmqrscp answers an empty StudyInstanceUID with all it holds. Such a UID comes from
a defective modality or import; it is never sent.""",
        rerun="Yes, with `--reason unsafe-uid`, once the UID has been repaired.",
        specificity=4,
        stands_though_complete=True,
    ),
    Reason(
        "unsafe-patient-id",
        PERMANENT,
        Scope.REQUEST,
        meaning=(
            "A retrieve in the Patient Root model needs a PatientID, and this one is empty or has "
            "wildcards; a request with it would select other patients."
        ),
        advice="Set `information_model: study-root` for the node, which needs no PatientID.",
        explanation="""
In the Patient Root model a retrieve has the PatientID as a key too. A PatientID of `***`, which
real PACS hold, selects every patient: dcmqrscp sends them all. The Study Root model identifies a
study by its UID alone; nearly every PACS offers it.""",
    ),
)
