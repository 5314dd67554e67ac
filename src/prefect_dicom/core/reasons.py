"""The reason codes: what happened, whether trying again can help, what a person should do.

One table for everything that can become of a row, a study, an instance or a run. A code is
stable: people filter and count by it. The advice is printed wherever the code is.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefect_dicom.core.model import Disposition

TRANSIENT, PERMANENT, OPERATOR = Disposition


PAGE = "docs/reasons.md"
"""Where every reason has a section of its own; ``prefect-dicom explain`` prints it."""


def pointer(code: str) -> str:
    """Where to read more about a reason."""
    return f"{PAGE}#{code}"


@dataclass(frozen=True, slots=True)
class Reason:
    """One row of the table."""

    code: str
    disposition: Disposition
    meaning: str
    advice: str

    @property
    def what_to_do(self) -> str:
        """The advice as it is shown to people: with where to read more."""
        return f"{self.advice} More: {pointer(self.code)}"


_RECEIVER_CHECKLIST = (
    "Check on the PACS: our AE title in exact case, our address as the PACS sees it (NAT, "
    "containers), the port open from the PACS to us, permission to send to us. "
    "`prefect-dicom doctor` prints the line to add."
)

_TABLE = (
    # --- rows
    ("all-archived", PERMANENT, "Every study of the row is archived.", "Nothing to do."),
    (
        "some-archived",
        TRANSIENT,
        "Some of the row's studies or instances are archived, others are not.",
        "See the reasons of its studies, then `prefect-dicom rerun`.",
    ),
    (
        "no-match",
        PERMANENT,
        "The PACS has no study with the row's identifiers.",
        "Check the identifiers at their source (leading zeros, case, another archive); what the "
        "PACS answered that is nearly the same is in `candidates.csv`.",
    ),
    (
        "excluded-by-filter",
        PERMANENT,
        "Studies with the row's identifiers exist; none passes its date, modality or description, "
        "or what else the cohort wants.",
        "Widen the filters of the row or of the cohort's definition if these studies are wanted.",
    ),
    (
        "filter-undecided",
        OPERATOR,
        "The PACS does not tell of a study what a filter of the cohort's definition needs to know.",
        "Look at the row's near misses: name the wanted ones by StudyInstanceUID in a list, or "
        "leave the filter out.",
    ),
    (
        "window-empty",
        PERMANENT,
        "The PACS has no study of these days.",
        "Nothing to do, unless there should be some.",
    ),
    (
        "beyond-the-maximum",
        PERMANENT,
        "The row's studies are more than the cohort takes of one patient.",
        "Raise `most_per_patient` of the definition if they are wanted.",
    ),
    (
        "selected-otherwise",
        OPERATOR,
        "The study is archived, or under way, with other series than this cohort wants of it.",
        "Pull this cohort with another archive prefix and another ledger: an archive holds a study "
        "under one selection, and nothing in it is overwritten.",
    ),
    (
        "several-patients",
        OPERATOR,
        "The row's identifiers belong to studies of more than one patient.",
        "Mark the right ones of the candidates in `candidates.csv` and pull that file, or add "
        "PatientID or StudyInstanceUID to the row.",
    ),
    (
        "name-disagrees",
        PERMANENT,
        "The row's identifiers were found, with a patient's name or birth date that is not the "
        "row's, or with none.",
        "Check the row's identifiers; where the studies are right all the same, mark them in "
        "`candidates.csv` and pull that file.",
    ),
    (
        "key-ignored",
        OPERATOR,
        "The PACS answered with others than the row's studies: it does not match by this "
        "identifier, and whether it has them cannot be told.",
        "Name the studies by StudyInstanceUID, or have matching by this key enabled on the PACS.",
    ),
    (
        "identifier-missing",
        OPERATOR,
        "The PACS's answers do not tell the identifier that the row asks by, so whose studies "
        "they are cannot be checked.",
        "Name the studies by StudyInstanceUID, or have the key returned by the PACS.",
    ),
    (
        "list-unproved",
        OPERATOR,
        "The PACS cut its list of the row's studies short and may have more of them. Those it "
        "told of are pulled.",
        "Have the PACS's limit of answers raised, or give the row more keys; the column `gaps` "
        "of `results.csv` says where studies may be missing.",
    ),
    (
        "unsafe-uid",
        PERMANENT,
        "The PACS names the study by an empty UID or one with wildcards; asking for it would "
        "select others.",
        "Have the study's UID repaired on the PACS.",
    ),
    (
        "unsafe-patient-id",
        PERMANENT,
        "The Patient Root names a study with its PatientID, and this one is empty or holds "
        "wildcards; asking for it would select others.",
        "Set `information_model: study-root` for the node, which needs no PatientID.",
    ),
    # --- studies
    (
        "instance-list-empty",
        PERMANENT,
        "The PACS lists no instance for the study.",
        "The study is gone or empty on the PACS; check there.",
    ),
    (
        "study-gone",
        PERMANENT,
        "The PACS had listed the study and does not have it any more.",
        "Ask on the PACS whether it was deleted, moved or merged into another study.",
    ),
    (
        "study-offline",
        OPERATOR,
        "The PACS says that parts of the study are offline or unavailable.",
        "Have the study restored from its medium on the PACS, then rerun.",
    ),
    (
        "instances-missing",
        TRANSIENT,
        "The PACS lists instances that it did not send, though asked for them again.",
        "`prefect-dicom rerun` asks for exactly these; if it stays, look at the PACS's log.",
    ),
    (
        "copy-incomplete",
        OPERATOR,
        "The node that could be asked lists or counts fewer instances than another node.",
        "Have the fuller node repaired, or the study completed on this one, then rerun.",
    ),
    (
        "completeness-unknown",
        OPERATOR,
        "The PACS lists and counts no instances, and what came is not what it says to have sent.",
        "What came is kept for a rerun. Have the PACS answer queries at IMAGE level, or tell its "
        "counts; compare the study with what the PACS shows.",
    ),
    (
        "evidence-too-weak",
        OPERATOR,
        "That the study is whole can only be shown by less than the site asks for.",
        "Have the PACS answer queries at IMAGE level, or tell its counts of series; or accept less "
        "with `validation.evidence`.",
    ),
    (
        "series-count-wrong",
        PERMANENT,
        "More instances of a series have arrived than the PACS counts in it.",
        "All of them are kept; the study was judged without the counts.",
    ),
    (
        "study-changed",
        TRANSIENT,
        "The PACS's instance list changed while the study was retrieved.",
        "The study is probably still being acquired; rerun when it has settled.",
    ),
    (
        "nothing-arrived",
        TRANSIENT,
        "The PACS reported success and nothing arrived.",
        _RECEIVER_CHECKLIST,
    ),
    (
        "instances-rejected",
        PERMANENT,
        "Instances are faulty at their source and the site's policy leaves them out.",
        "The manifest names them; set `validation.faulty: archive` to keep them with a warning.",
    ),
    (
        "claim-lost",
        TRANSIENT,
        "Another run took the study over.",
        "Nothing to do: the other run finishes it.",
    ),
    (
        "interrupted",
        TRANSIENT,
        "The run was stopped before the study was finished.",
        "`prefect-dicom rerun` goes on from here.",
    ),
    (
        "window-closed",
        TRANSIENT,
        "The PACS may not be asked at this time of the week.",
        "Nothing to do: the next run goes on when a window of the node's `courtesy` opens.",
    ),
    # --- instances
    (
        "instance-unreadable",
        PERMANENT,
        "The object is not a readable DICOM file.",
        "Look at the object on the PACS.",
    ),
    (
        "instance-truncated",
        PERMANENT,
        "The object ends before its elements do.",
        "The copy on the PACS is damaged if it arrives like this twice.",
    ),
    (
        "pixel-data-length",
        PERMANENT,
        "The pixel data is not as long as the header says.",
        "Look at the object on the PACS; it arrived like this twice.",
    ),
    (
        "uid-mismatch",
        PERMANENT,
        "UIDs or SOP class of the object differ from the request that brought it.",
        "The object is quarantined or left out; look at it on the PACS.",
    ),
    (
        "transfer-syntax-unknown",
        PERMANENT,
        "The object is in a transfer syntax that is not in the standard.",
        "It is kept as it came; its inner structure was not checked.",
    ),
    (
        "not-inspected",
        PERMANENT,
        "The data set is deflated; it is not inflated to look into it.",
        "It is kept as it came; identity is by the request alone.",
    ),
    (
        "wrong-transfer-syntax",
        PERMANENT,
        "The object is not encoded in the transfer syntax it was sent under.",
        "Readers that trust its file meta fail on it; look at the object on the PACS.",
    ),
    (
        "pixel-data-longer",
        PERMANENT,
        "The pixel data is longer than the header says.",
        "It is kept as it came; viewers ignore the surplus.",
    ),
    (
        "trailing-bytes",
        PERMANENT,
        "Zeros follow the object's last element.",
        "It is kept as it came; readers ignore them.",
    ),
    (
        "partly-inspected",
        PERMANENT,
        "The object has more nested elements than are looked at.",
        "It is kept as it came; what lies behind them was not checked.",
    ),
    (
        "patient-id-missing",
        PERMANENT,
        "The object has no PatientID, though the PACS lists one for its study.",
        "It is kept as it came: its UIDs are those that were asked for.",
    ),
    (
        "patient-id-reencoded",
        PERMANENT,
        "The object's PatientID and the listed one differ in letters outside ASCII only.",
        "It is kept as it came; the PACS's character set does not hold these letters.",
    ),
    (
        "wrong-patient",
        OPERATOR,
        "An object of another patient arrived for the study.",
        "It is quarantined. Find out on the PACS which patient the study belongs to.",
    ),
    (
        "conflicting-content",
        OPERATOR,
        "Two different objects arrived under one SOP Instance UID.",
        "Both lie in quarantine; decide on the PACS which is right.",
    ),
    (
        "not-requested",
        PERMANENT,
        "An object arrived that nobody asked for.",
        "It is quarantined, never archived.",
    ),
    (
        "spool-damaged",
        TRANSIENT,
        "A file in the spool no longer has the SHA-256 it arrived with.",
        "It is asked for again; check the disk if this repeats.",
    ),
    (
        "no-longer-listed",
        TRANSIENT,
        "The instance arrived and is not on the PACS's list any more.",
        "The study changed on the PACS; its manifest names what is listed now.",
    ),
    # --- the PACS node
    (
        "pacs-address",
        OPERATOR,
        "The PACS's host name does not resolve.",
        "Correct `host` of the node.",
    ),
    (
        "pacs-refused",
        TRANSIENT,
        "Nothing listens at the PACS's address and port.",
        "Check host and port, and whether the PACS runs.",
    ),
    (
        "pacs-unreachable",
        TRANSIENT,
        "The PACS's address does not answer.",
        "Check the firewall from this host to the PACS.",
    ),
    (
        "pacs-reset",
        TRANSIENT,
        "The PACS closed the connection at once.",
        "Often plain DICOM to a TLS port, or an address filter on the PACS.",
    ),
    (
        "pacs-silent",
        TRANSIENT,
        "The PACS accepted the connection and then said nothing.",
        "It may be busy; rerun later or lower `limits.associations`.",
    ),
    (
        "pacs-slow",
        TRANSIENT,
        "The PACS takes several times as long as usual to begin its answers.",
        "Nothing to do: it is asked for less at a time until it is quicker; or lower "
        "`limits.associations`.",
    ),
    (
        "association-lost",
        TRANSIENT,
        "The association ended in the middle of a request.",
        "Rerun; if it repeats, look for time-outs of firewalls between here and the PACS.",
    ),
    (
        "association-stalled",
        TRANSIENT,
        "Nothing arrived for the configured stall time.",
        "Rerun, or raise `timeouts.stall_seconds` for a slow archive.",
    ),
    (
        "called-ae-title-unknown",
        OPERATOR,
        "The PACS does not know itself by the called AE title.",
        "Correct `called_ae_title` of the node; case matters.",
    ),
    (
        "calling-ae-title-unknown",
        OPERATOR,
        "The PACS does not know our AE title.",
        "Have our AE title and address added to the PACS's table of known nodes.",
    ),
    (
        "association-rejected",
        OPERATOR,
        "The PACS rejected the association without a reason that helps.",
        "Ask the PACS administrator; often an unknown AE title or a disabled node.",
    ),
    (
        "protocol-not-supported",
        OPERATOR,
        "The PACS does not take the protocol version, application context or parameters that "
        "DICOM associations begin with.",
        "Check `port` of the node: something other than the PACS's DICOM service answers there.",
    ),
    (
        "pacs-busy",
        TRANSIENT,
        "The PACS is at its limit of associations or resources.",
        "Rerun later, or lower `limits.associations`.",
    ),
    (
        "not-permitted",
        OPERATOR,
        "The PACS refused or aborted the request: our AE title may lack the permission.",
        "Have query and retrieve allowed for our AE title on the PACS. Where only C-GET is "
        "refused, set `retrieve: c-move` for the node.",
    ),
    (
        "service-not-offered",
        OPERATOR,
        "The PACS does not offer the service or information model.",
        "Try the other `information_model` of the node, or the other way to retrieve "
        "(`retrieve: c-move` or `retrieve: c-get`).",
    ),
    (
        "move-destination-unknown",
        OPERATOR,
        "The PACS does not know our receiver's AE title as a move destination.",
        _RECEIVER_CHECKLIST,
    ),
    (
        "move-destination-failed",
        OPERATOR,
        "The PACS could not send to our receiver.",
        _RECEIVER_CHECKLIST,
    ),
    (
        "node-sends-nothing",
        OPERATOR,
        "Study after study is listed by the PACS and none of their instances arrives.",
        _RECEIVER_CHECKLIST,
    ),
    (
        "requests-keep-failing",
        OPERATOR,
        "One query after the other fails at the PACS, and none succeeds in between.",
        "See the reasons of the rows that failed and the PACS's log; then `prefect-dicom doctor`.",
    ),
    (
        "sop-classes-refused",
        PERMANENT,
        "The PACS offers C-GET, but accepted none of the instances' SOP classes with our role.",
        "Set `retrieve: c-move` for this node.",
    ),
    (
        "request-refused",
        PERMANENT,
        "The PACS cannot process the request.",
        "Run with a single row of this kind and read the PACS's log.",
    ),
    (
        "pacs-failure",
        TRANSIENT,
        "The PACS reported a processing failure.",
        "Rerun later; if it stays, read the PACS's log.",
    ),
    (
        "answer-unusable",
        TRANSIENT,
        "The PACS's answer could not be decoded.",
        "Rerun; if it stays, report the PACS's version.",
    ),
    (
        "answers-capped",
        OPERATOR,
        "The PACS ended a list of answers before its end, and it could not be made whole.",
        "Have the limit of answers raised on the PACS.",
    ),
    # --- our side
    (
        "configuration-faulty",
        OPERATOR,
        "The site's configuration cannot be used.",
        "Correct the keys named in the message.",
    ),
    (
        "cohort-faulty",
        OPERATOR,
        "The cohort file cannot be used.",
        "Correct the lines named in the message.",
    ),
    (
        "receiver-taken",
        OPERATOR,
        "The receiver's port or AE title is in use by something else.",
        "Stop the other program, or give this site another port and AE title.",
    ),
    (
        "receiver-unreachable",
        TRANSIENT,
        "The managed receiver could not be started or reached.",
        "Read its log in the spool directory.",
    ),
    (
        "spool-full",
        OPERATOR,
        "The disk reserve of the spool is reached.",
        "Free space on the spool's disk, or point `spool.path` to a larger one.",
    ),
    (
        "spool-unusable",
        OPERATOR,
        "The spool directory cannot be made or written.",
        "Check `spool.path`: a directory of its own that this user may write.",
    ),
    (
        "spool-unsafe",
        OPERATOR,
        "The spool directory is open to other users, or is a symbolic link.",
        "Give it mode 0700 and a real path.",
    ),
    (
        "archive-conflict",
        OPERATOR,
        "The archive holds other bytes under the key of an instance.",
        "Compare the archived object with the one on the PACS; nothing was overwritten.",
    ),
    (
        "archive-refused",
        OPERATOR,
        "The archive refused the request: credentials, permission or settings.",
        "Check credentials, bucket policy and encryption settings; `prefect-dicom doctor`.",
    ),
    (
        "archive-missing",
        OPERATOR,
        "The bucket or directory of the archive does not exist.",
        "Create it, or correct `archive`.",
    ),
    (
        "archive-unavailable",
        TRANSIENT,
        "The archive did not answer, or answered that it is overloaded.",
        "Rerun later.",
    ),
    (
        "archive-checksum",
        TRANSIENT,
        "The bytes at the archive are not those that arrived.",
        "They are sent again; check network and disk if this repeats.",
    ),
    (
        "archive-full",
        OPERATOR,
        "The disk or the quota of the archive is full.",
        "Free or add space at the archive, then rerun.",
    ),
    (
        "manifest-unreadable",
        OPERATOR,
        "A study's manifest in the archive cannot be read.",
        "Restore it from a version; if this software is older than the manifest, upgrade it.",
    ),
    (
        "archive-object-missing",
        OPERATOR,
        "An object named by a manifest is not in the archive.",
        "Somebody removed it; restore it from a version or pull the study into a new prefix.",
    ),
    (
        "ledger-unavailable",
        OPERATOR,
        "The ledger cannot be opened, read or written.",
        "Check the path or URL of `ledger`, its permissions and its disk.",
    ),
    (
        "ledger-busy",
        TRANSIENT,
        "Another program kept the ledger locked, or the connection to its server broke.",
        "Rerun; close what else has the ledger open, such as a database browser.",
    ),
    (
        "ledger-damaged",
        OPERATOR,
        "The ledger's database is damaged.",
        "Put a copy in its place, without the -wal and -shm files beside it, or make a new one "
        "with `prefect-dicom rebuild-ledger`; what is archived is found again.",
    ),
    (
        "ledger-too-new",
        OPERATOR,
        "The ledger was written by a newer version of this software.",
        "Upgrade prefect-dicom.",
    ),
    (
        "ledger-unsafe",
        OPERATOR,
        "The ledger's file is open to other users.",
        "Give it mode 0600: it holds identifiers of patients.",
    ),
    (
        "cohort-name-taken",
        OPERATOR,
        "Another cohort has this name already.",
        "Choose another name.",
    ),
    (
        "cohort-unknown",
        OPERATOR,
        "The ledger has no cohort of this name or number.",
        "Check the name, and whether this is the right ledger.",
    ),
    (
        "unexpected",
        TRANSIENT,
        "Something happened that this software has no name for.",
        "Rerun; report it with the traceback from the local log.",
    ),
)

REASONS: dict[str, Reason] = {row[0]: Reason(*row) for row in _TABLE}


def reason_for(code: str) -> Reason:
    """The reason with this code; an unknown code is a bug and raises KeyError."""
    return REASONS[code]


LIST_UNPROVED = "list-unproved"
FILTER_UNDECIDED = "filter-undecided"
BEYOND_THE_MAXIMUM = "beyond-the-maximum"
SELECTED_OTHERWISE = "selected-otherwise"

COPY_INCOMPLETE = "copy-incomplete"
STUDY_GONE = "study-gone"

OF_ONE_REQUEST = {
    "answer-unusable",
    "answers-capped",
    "association-lost",
    "copy-incomplete",
    "evidence-too-weak",
    "filter-undecided",
    "pacs-failure",
    "request-refused",
    "study-changed",
    "study-offline",
    "unsafe-patient-id",
}
"""Ends of one query that say nothing about the next: the others go on."""
