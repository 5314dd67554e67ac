"""Reasons of instances: faults found by validation or by the ledger.

Findings of validation stand first, the gravest at the top: their order is the order in which an
instance's findings are reported."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import shared_texts
from prefect_dicom.core.reasons.reason import Consequence, Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition

INSTANCES = (
    Reason(
        "wrong-patient",
        OPERATOR,
        Scope.STUDY,
        meaning="An instance of another patient arrived for the study.",
        advice="It is quarantined. Find out on the PACS which patient the study belongs to.",
        explanation="""
The instance has the study's UID and another PatientID, and other instances of the study have the
listed one. Two patients share one StudyInstanceUID on the PACS (a C-MOVE then brings both;
Orthanc does not heed the PatientID of a Patient Root request), or a correction on the PACS
reached some of its files. Nobody but the PACS's staff can say which is right. It was requested
twice. `prefect-dicom quarantine show` says what arrived. Where all instances name the same other
PatientID, the reason is `patient-id-differs`.""",
        consequence=Consequence.QUARANTINE,
        says_more_than_request=True,
        acceptable=True,
    ),
    Reason(
        "uid-mismatch",
        PERMANENT,
        Scope.STUDY,
        meaning="UIDs or SOP class of the instance differ from the request that brought it.",
        advice="The instance is quarantined or left out; look at it on the PACS.",
        explanation="""
The C-STORE request named another SOP instance or class than its data set holds, so its identity is
unknown. Systems that rewrite UIDs while they send (anonymising gateways, merges) cause this when
they rewrite only one of the two.""",
        consequence=Consequence.QUARANTINE,
        says_more_than_request=True,
        acceptable=True,
    ),
    Reason(
        "instance-unreadable",
        PERMANENT,
        Scope.STUDY,
        meaning="The instance is not a readable DICOM file.",
        advice="Look at the instance on the PACS.",
        explanation="""
The first elements of the data set could not be read: not DICOM, encrypted, or damaged from its
beginning. It was requested twice. `validation.faulty` decides whether it is archived with this
note or left out.""",
        consequence=Consequence.ASK_AGAIN,
    ),
    Reason(
        "instance-truncated",
        PERMANENT,
        Scope.STUDY,
        meaning="The instance ends before its last element is complete.",
        advice="The copy on the PACS is damaged if it arrives like this twice.",
        explanation="""
The length of an element goes beyond the end of the instance. TCP detects bytes that a network
loses; the usual cause is a file that was cut by a full disk on a modality or during a migration
between PACS. The second copy was cut in the same place.""",
        consequence=Consequence.ASK_AGAIN,
    ),
    Reason(
        "pixel-data-length",
        PERMANENT,
        Scope.STUDY,
        meaning="The pixel data is not as long as the header says.",
        advice="Look at the instance on the PACS; it arrived like this twice.",
        explanation="""
Rows, Columns, frames and bits require more bytes than the pixel data has. Viewers show such an
image partly black, or not at all. Typical of exports that were interrupted and of headers
that somebody edited.""",
        consequence=Consequence.ASK_AGAIN,
    ),
    Reason(
        "wrong-transfer-syntax",
        PERMANENT,
        Scope.STUDY,
        meaning="The instance is not encoded in the transfer syntax it was sent under.",
        advice="Readers that trust its file meta fail on it; look at the instance on the PACS.",
        explanation="""
The data set was announced in one encoding and is in another, for example implicit VR within an
explicit VR context. Some PACS store the announced syntax and the original bytes. Most tools
refuse such a file; pydicom reads many of them with `force=True`.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.ASK_AGAIN,
    ),
    Reason(
        "sop-class-differs",
        PERMANENT,
        Scope.STUDY,
        meaning="The instance is of another SOP class than the PACS lists for it.",
        advice="It is kept as it came: request and data set agree on what it is.",
        explanation="""
All UIDs are those that were asked for, and the C-STORE request names the class that the data
set has. Only the list says another: PACS keep one class for a whole series, or the retired
class that a modality was once configured with. Where request and data set differ, it is
`uid-mismatch`.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "file-meta-inside",
        PERMANENT,
        Scope.STUDY,
        meaning="The data set begins with file meta information, which belongs before it.",
        advice="It is kept as it came; strict readers stumble over elements of group 0002.",
        explanation="""
Senders that take a file for a data set send (0002,0010), or all of group 0002, as if it were a
part of it. Everything behind it was read and is whole.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "element-malformed",
        PERMANENT,
        Scope.STUDY,
        meaning="An element of the instance is not encoded as the standard has it.",
        advice="It is kept as it came; all that identifies it was read, and nothing is cut.",
        explanation="""
A private element without a VR (`??`), a private sequence whose items are in the other byte
order, or one that cannot be walked and whose end was found all the same. Modalities and
migrations between archives leave such elements; images and identifiers are not affected.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "transfer-syntax-unknown",
        PERMANENT,
        Scope.STUDY,
        meaning="The instance is in a transfer syntax that is not in the standard.",
        advice="It is archived as received; its inner structure was not checked.",
        explanation="""
Private transfer syntaxes are allowed between systems that agree on them; this one is not known
here. The bytes are archived as received, with their hash.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "not-inspected",
        PERMANENT,
        Scope.STUDY,
        meaning="The data set is deflated and was not inflated for validation.",
        advice="It is archived as received; its identity comes from the request alone.",
        explanation="""
Validation would have to inflate the data set, and a small one can inflate to any size. It is
archived without validation.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "partly-inspected",
        PERMANENT,
        Scope.STUDY,
        meaning="The instance has more nested elements than validation reads.",
        advice="It is archived as received; the elements after them were not checked.",
        explanation="""
Its sequences are deeper or longer than in real instances. Validation stops there, because a
hostile instance could consist of nothing else.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "patient-id-missing",
        PERMANENT,
        Scope.STUDY,
        meaning="The instance has no PatientID, though the PACS lists one for its study.",
        advice="It is archived as received: its UIDs are the requested ones.",
        explanation="""
Study, series and SOP instance UID are the requested ones; only the PatientID is absent or
empty in the instance, while the PACS has one in its own database. Typical of raw data and of
structured reports.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "patient-id-accepted",
        PERMANENT,
        Scope.STUDY,
        meaning="The instance names another PatientID than the PACS lists, as a person accepted.",
        advice="It is kept as it came: who has accepted it and when is in the ledger.",
        explanation="""
`prefect-dicom accept` or a column OtherPatientID of the cohort file says that this PatientID is the
same patient's. Study, series and SOP instance UID are those that were asked for.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "patient-id-reencoded",
        PERMANENT,
        Scope.STUDY,
        meaning="The instance's PatientID and the listed one differ only in letters outside ASCII.",
        advice="It is archived as received; the PACS's character set does not hold these letters.",
        explanation="""
The PACS answers queries in another character set than that of its instances. Orthanc answers in
ISO_IR 100 unless configured otherwise, and drops letters that do not fit.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "pixel-data-longer",
        PERMANENT,
        Scope.STUDY,
        meaning="The pixel data is longer than the header says.",
        advice="It is archived as received; viewers ignore the surplus.",
        explanation="""
More pixel bytes than the header requires: padding of some modalities, or a trailing frame.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "trailing-bytes",
        PERMANENT,
        Scope.STUDY,
        meaning="Zeros or blanks follow the instance's last element.",
        advice="It is archived as received; readers ignore them.",
        explanation="""
PACS and media writers fill files up to a block size with zeros, and some put a blank behind a data
set of odd length. No element is affected.""",
        rerun=shared_texts.THE_NOTE,
        consequence=Consequence.WARN,
    ),
    Reason(
        "conflicting-content",
        OPERATOR,
        Scope.STUDY,
        meaning="Two instances with different bytes arrived under one SOPInstanceUID.",
        advice="Both are in quarantine; decide on the PACS which is right.",
        explanation="""
A SOPInstanceUID identifies one instance only. Two with different bytes arrived: an image that was
corrected and sent again, one that exists in two encodings, or two series with the same UIDs
(Orthanc keeps both). Neither is archived until somebody has decided. Copies that differ in dates
and times only are no conflict: see `times-vary`.""",
        stands_though_complete=True,
    ),
    Reason(
        "not-requested",
        PERMANENT,
        Scope.STUDY,
        meaning="An instance arrived that no request was made for.",
        advice="It is quarantined, never archived.",
        explanation="""
The receiver accepts what it is sent, so that a PACS never stops a transfer because of one stray
instance, and quarantines what belongs to no requested study: from modalities that send to the same
AE title, from a PACS that sends prior studies too, or of a study whose run has ended.""",
        rerun="None is needed.",
    ),
    Reason(
        "spool-damaged",
        TRANSIENT,
        Scope.STUDY,
        meaning="A file in the spool no longer has the SHA-256 it arrived with.",
        advice="It is requested again; check the disk if this repeats.",
        explanation="""
Between its arrival and its upload a file in the spool has changed: a failing disk, a file system
that was full or not cleanly unmounted, or somebody editing files there. The archive is
safe: an upload whose bytes do not have the hash from arrival is refused.""",
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
