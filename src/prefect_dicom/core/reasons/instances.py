"""Reasons of instances: what validation or the ledger finds wrong with one.

Findings of validation stand first, the gravest at the top: their order is the order in which an
instance's findings are reported."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons.reason import Consequence, Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition

_THE_NOTE = (
    "Nothing is left to be done: the object is archived, and its line in the study's manifest has "
    "this note."
)

INSTANCES = (
    Reason(
        "wrong-patient",
        OPERATOR,
        Scope.STUDY,
        meaning="An object of another patient arrived for the study.",
        advice="It is quarantined. Find out on the PACS which patient the study belongs to.",
        explanation="""
The object has the study's UID and another PatientID. Two patients share one StudyInstanceUID on
the PACS (a C-MOVE then brings both; Orthanc does not heed the PatientID of a Patient Root
request), or the PACS's database was corrected and its files were not. Nobody but the PACS's staff
can say which is right. `prefect-dicom quarantine show` says what arrived.""",
        consequence=Consequence.QUARANTINE,
        says_more_than_request=True,
    ),
    Reason(
        "uid-mismatch",
        PERMANENT,
        Scope.STUDY,
        meaning="UIDs or SOP class of the object differ from the request that brought it.",
        advice="The object is quarantined or left out; look at it on the PACS.",
        explanation="""
The C-STORE request named another SOP instance or class than its data set holds, so it cannot be
said what it is. Archives that rewrite UIDs while they send (anonymising gateways, merges) do this
when they rewrite one of the two only.""",
        consequence=Consequence.QUARANTINE,
        says_more_than_request=True,
    ),
    Reason(
        "instance-unreadable",
        PERMANENT,
        Scope.STUDY,
        meaning="The object is not a readable DICOM file.",
        advice="Look at the object on the PACS.",
        explanation="""
The first elements of the data set could not be walked: not DICOM, encrypted, or damaged from its
beginning. It was asked for twice. `validation.faulty` decides whether it is archived with this
note or left out.""",
        consequence=Consequence.ASK_AGAIN,
    ),
    Reason(
        "instance-truncated",
        PERMANENT,
        Scope.STUDY,
        meaning="The object ends before its elements do.",
        advice="The copy on the PACS is damaged if it arrives like this twice.",
        explanation="""
A length in the object points behind its end. Networks that lose bytes are rare, as TCP would
notice; files cut by a full disk on a modality or during a migration between archives are not. The
second copy was cut in the same place.""",
        consequence=Consequence.ASK_AGAIN,
    ),
    Reason(
        "pixel-data-length",
        PERMANENT,
        Scope.STUDY,
        meaning="The pixel data is not as long as the header says.",
        advice="Look at the object on the PACS; it arrived like this twice.",
        explanation="""
Rows, Columns, frames and bits ask for more bytes than the pixel data has. Viewers show such an
image with a black rest, or not at all. Typical of exports that were interrupted and of headers
that somebody edited.""",
        consequence=Consequence.ASK_AGAIN,
    ),
    Reason(
        "wrong-transfer-syntax",
        PERMANENT,
        Scope.STUDY,
        meaning="The object is not encoded in the transfer syntax it was sent under.",
        advice="Readers that trust its file meta fail on it; look at the object on the PACS.",
        explanation="""
The data set was announced in one encoding and is in another, for example implicit VR within an
explicit VR context. Some archives store the announced syntax and the original bytes. Most tools
refuse such a file; pydicom reads many of them with `force=True`.""",
        rerun=_THE_NOTE,
        consequence=Consequence.ASK_AGAIN,
    ),
    Reason(
        "transfer-syntax-unknown",
        PERMANENT,
        Scope.STUDY,
        meaning="The object is in a transfer syntax that is not in the standard.",
        advice="It is kept as it came; its inner structure was not checked.",
        explanation="""
Private transfer syntaxes are legal between partners who know them; this one is in no table here.
The bytes are archived as they came, with their hash.""",
        rerun=_THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "not-inspected",
        PERMANENT,
        Scope.STUDY,
        meaning="The data set is deflated; it is not inflated to look into it.",
        advice="It is kept as it came; identity is by the request alone.",
        explanation="""
A deflated data set would have to be inflated to be looked into, and a small one can inflate to
any size. It is archived unopened.""",
        rerun=_THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "partly-inspected",
        PERMANENT,
        Scope.STUDY,
        meaning="The object has more nested elements than are looked at.",
        advice="It is kept as it came; what lies behind them was not checked.",
        explanation="""
Sequences deep or long beyond what real objects have. They are not followed without end, because a
hostile object could be made of nothing else.""",
        rerun=_THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "patient-id-missing",
        PERMANENT,
        Scope.STUDY,
        meaning="The object has no PatientID, though the PACS lists one for its study.",
        advice="It is kept as it came: its UIDs are those that were asked for.",
        explanation="""
Study, series and SOP instance UID are those that were asked for; only the PatientID is absent or
empty in the object, while the PACS has one in its own database. Typical of raw data and of
structured reports.""",
        rerun=_THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "patient-id-reencoded",
        PERMANENT,
        Scope.STUDY,
        meaning="The object's PatientID and the listed one differ in letters outside ASCII only.",
        advice="It is kept as it came; the PACS's character set does not hold these letters.",
        explanation="""
The PACS answers queries in another character set than its objects are in. Orthanc answers in
ISO_IR 100 unless configured otherwise, and drops letters that do not fit.""",
        rerun=_THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "pixel-data-longer",
        PERMANENT,
        Scope.STUDY,
        meaning="The pixel data is longer than the header says.",
        advice="It is kept as it came; viewers ignore the surplus.",
        explanation="""
More pixel bytes than the header asks for: padding of some modalities, or a trailing frame.""",
        rerun=_THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "trailing-bytes",
        PERMANENT,
        Scope.STUDY,
        meaning="Zeros follow the object's last element.",
        advice="It is kept as it came; readers ignore them.",
        explanation="""
Archives and media writers fill files up to a block size with zeros. No element is affected.""",
        rerun=_THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "conflicting-content",
        OPERATOR,
        Scope.STUDY,
        meaning="Two different objects arrived under one SOP Instance UID.",
        advice="Both lie in quarantine; decide on the PACS which is right.",
        explanation="""
A SOP Instance UID may stand for one object only. Two with different bytes came: an image that was
corrected and sent again, one that exists in two encodings, or two series with the same UIDs
(Orthanc keeps both). Neither is archived until somebody has decided.""",
        stands_though_complete=True,
    ),
    Reason(
        "not-requested",
        PERMANENT,
        Scope.STUDY,
        meaning="An object arrived that nobody asked for.",
        advice="It is quarantined, never archived.",
        explanation="""
The receiver takes what it is sent, so that a PACS never stops a transfer over one stray object,
and keeps apart what belongs to no study that this site has asked for: modalities that know the
same AE title, a PACS that sends priors along, or objects of a study whose run has ended.""",
        rerun="None is needed.",
    ),
    Reason(
        "spool-damaged",
        TRANSIENT,
        Scope.STUDY,
        meaning="A file in the spool no longer has the SHA-256 it arrived with.",
        advice="It is asked for again; check the disk if this repeats.",
        explanation="""
Between its arrival and its upload a file in the spool has changed: a failing disk, a file system
that was full or not cleanly unmounted, or somebody editing files there. Object and archive are
safe: the upload is refused unless the hash from arrival holds.""",
    ),
    Reason(
        "no-longer-listed",
        TRANSIENT,
        Scope.STUDY,
        meaning="The instance arrived and is not on the PACS's list any more.",
        advice="The study changed on the PACS; its manifest names what is listed now.",
        explanation="""
The PACS listed the instance, it arrived, and the next list does not have it: deleted, or moved to
another series, in the meantime.""",
    ),
)
