"""Reasons of studies: why one is not listed, not complete or not archived."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition, Verdict
from prefect_dicom.core.reasons import shared_texts
from prefect_dicom.core.reasons.reason import Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition

STUDIES = (
    Reason(
        "instance-list-empty",
        PERMANENT,
        Scope.STUDY,
        meaning="The PACS lists no instance for the study.",
        advice="The study is gone or empty on the PACS; check there.",
        explanation="""
The study was found, and the query for its series and instances returned none. Either it was emptied
after it was found, or the PACS has only its record: studies that were moved to another PACS, or
whose images have been deleted, look like this.""",
    ),
    Reason(
        "study-gone",
        PERMANENT,
        Scope.STUDY,
        meaning="The PACS had listed the study and does not have it any more.",
        advice="Ask on the PACS whether it was deleted, moved or merged into another study.",
        explanation="""
The study was on the list, a retrieve delivered nothing, and a second query does not list it any
more. Orthanc answers the retrieve with C000, dcmqrscp reports success with nothing sent; the second
query distinguishes both from a broken way back. The study was deleted, merged into another study
under a new UID, or moved to another PACS by its lifetime rules. If it was merged, a new pull of
the same patient or accession number finds its new UID.""",
        stands_though_complete=True,
        needs_diagnosis=True,
    ),
    Reason(
        "study-offline",
        OPERATOR,
        Scope.REQUEST,
        meaning="The PACS says that parts of the study are offline or unavailable.",
        advice="Have the study restored from its medium on the PACS, then rerun.",
        explanation="""
The PACS marks the study's images as OFFLINE or UNAVAILABLE (0008,0056): on a tape or a disc that
somebody has to put in, or lost. NEARLINE ones are requested, and may take the PACS
`timeouts.first_byte_seconds` to fetch.""",
    ),
    Reason(
        "instances-missing",
        TRANSIENT,
        Scope.STUDY,
        meaning="The PACS lists instances that it did not send, even when requested again.",
        advice="`prefect-dicom rerun` requests exactly these; if it persists, read the PACS's log.",
        explanation="""
The received instances are compared with the PACS's list, and missing ones were requested again, in
smaller requests and then one by one. Those still missing, the PACS usually cannot send: a file that
is damaged or missing on its disk, a transfer syntax it would have to convert and cannot (Orthanc
and dcmqrscp do not convert compressed images), a SOP class it will not send. Its status may be
success all the same. Where its answer accounts for everything, for what it has sent and what it
could not, it is believed for what is missing: a note with the cohort has the status, such an
instance is requested twice and at once, and the run does not wait for it. The received ones are
archived already and are not requested again.

If the PACS can never send them, a person can accept the study without them: `prefect-dicom accept`
puts on record who did, and the study gets a manifest that names what is missing.""",
        acceptable=True,
    ),
    Reason(
        "class-not-told",
        OPERATOR,
        Scope.STUDY,
        meaning=(
            "The PACS does not return the SOP classes of the instances, which C-GET has to name, "
            "and none that were tried brought them."
        ),
        advice=(
            "Use C-MOVE, which names no classes: set `retrieve: c-move` for the node, with a "
            "receiver; or have the PACS return SOPClassUID at IMAGE level."
        ),
        explanation="""
Over a C-GET the PACS can send only what was proposed when the association was opened: SOP
classes, each with its transfer syntaxes. Where the PACS returns no SOPClassUID (0008,0016) in
its list, all classes of the standard are proposed in turn, and the usual ones in rare transfer
syntaxes too, over some tens of associations. What is still missing then is of a class or in a
syntax that nobody can guess, such as a vendor's own. With C-MOVE the PACS proposes, and the
receiver takes what it proposes.""",
        says_more_than_request=True,
    ),
    Reason(
        "series-without-instances",
        OPERATOR,
        Scope.STUDY,
        meaning="The PACS lists a series of the study and none of its instances.",
        advice=(
            "Look at the series on the PACS: it is empty, or its instances are not listed. What is "
            "listed of the others is archived."
        ),
        explanation="""
One query for the images of a series was answered with an empty list, though the series is
listed and its count is not zero. It was deleted in part, moved, or is the shell of a series
that never came. The instances of the other series were retrieved and are in the archive,
without a manifest: whether they are the whole study only the PACS's staff can say. A series
that is counted as empty is left out without a word.""",
        stands_though_complete=True,
    ),
    Reason(
        "objects-late",
        TRANSIENT,
        Scope.STUDY,
        meaning="What was asked for came after the end of the request.",
        advice="Raise `timeouts.settle_seconds` of the node, so that nothing is asked for twice.",
        explanation="""
The PACS reported the end of a C-MOVE, and its instances came long after that: it puts retrieves
into a queue of its own, or fetches from tape, and does not wait for it. What comes late is kept
for its study while that lacks it, and a node that was seen to do this is waited for in the rest
of the run.""",
    ),
    Reason(
        "times-vary",
        PERMANENT,
        Scope.STUDY,
        meaning="The PACS sent instances twice, with other dates or times in them each time.",
        advice="The first copies were kept; they differ in nothing else.",
        explanation="""
Instances came more than once, because an association ended early or because the PACS sends
whole studies only, and the copies differ: in the values of dates and times of the instance, and
in nothing else. PACS that make or coerce objects while they send them write that moment into
them. Pixel data and all other elements are the same. Copies that differ in anything else are
`conflicting-content`.""",
        rerun="Nothing is left to be done: the study is archived, and its manifest has this note.",
    ),
    Reason(
        "missing-accepted",
        PERMANENT,
        Scope.STUDY,
        meaning="The study is archived without instances that never came; a person accepted that.",
        advice="Nothing to do; its manifest names what is missing, and who accepted it.",
        explanation="""
The PACS lists instances that it did not send, however they were requested, and somebody has decided
with `prefect-dicom accept` to take the study without them. Its manifest has version 3 and names
them below `missing`, with `accepted_by` and `accepted_at`. Such a study is never called archived
without a word: the verdict of its row is `incomplete`, and `prefect-dicom verify`,
`prefect-dicom rebuild-ledger` and the report count them.""",
        rerun="No: a manifest is final. Should the PACS send the rest some day, pull the study "
        "into another archive prefix.",
        row_verdict=Verdict.INCOMPLETE,
    ),
    Reason(
        "patient-id-differs",
        PERMANENT,
        Scope.STUDY,
        meaning="All instances of the study name the same other PatientID than the PACS lists.",
        advice=(
            "Find out whether that is the patient's number of before; if so, "
            "`prefect-dicom accept` takes the study, and requests no instance again."
        ),
        explanation="""
The PACS lists the study under one PatientID, and every instance that it sent has another: its
database was corrected or merged and its files were not, or a broker adds zeros, a prefix or an
issuer to one of the two. Study, series and SOP instance UIDs are those that were asked for.
Nothing of it is archived; the instances lie in quarantine. `prefect-dicom accept COHORT` lists
such studies and says how the numbers differ (leading zeros, text before or behind, another
number); `accept.csv` in the reports folder has both. A person accepts one study, or the whole
cohort, or names the number in a column OtherPatientID of the cohort file; the ledger has who did
and when.""",
        rerun="Not by itself: `prefect-dicom accept` takes what lies in quarantine. Once the PACS "
        "has been corrected, `prefect-dicom rerun COHORT --reason patient-id-differs` requests the "
        "instances again.",
        stands_though_complete=True,
        says_more_than_request=True,
        acceptable=True,
    ),
    Reason(
        "copy-incomplete",
        OPERATOR,
        Scope.REQUEST,
        meaning="The only usable node lists or counts fewer instances than another node.",
        advice="Have the fuller node repaired, or the study completed on this one, then rerun.",
        explanation="""
Only in cohorts with several nodes. The node with the most instances could not deliver the study,
and the next node does not have all of them: an instance is missing from its list, or its count is
smaller. A part of a study is not archived as the whole. The column `nodes` of `results.csv` says
why the fuller node failed. Where the fuller node has deleted the study (`study-gone`), another
node's instances are archived.""",
    ),
    Reason(
        "completeness-unknown",
        OPERATOR,
        Scope.STUDY,
        meaning=(
            "The PACS lists and counts no instances, and the received ones do not match the "
            "counters of its retrieve responses."
        ),
        advice=(
            "The received instances are kept for a rerun. Have the PACS answer queries at IMAGE "
            "level, or return its counts; compare the study with what the PACS shows."
        ),
        explanation="""
The PACS answers no query at IMAGE level and returns no counts of series. The only evidence left is
the final response of the retrieve: success, as many completed sub-operations as different instances
received, none failed, none with a warning. The retrieve was repeated on new associations, and the
counters never agreed or were absent. Instances of classes that a C-GET did
not propose are counted as failed: with C-MOVE the same PACS may do better.""",
    ),
    Reason(
        "evidence-too-weak",
        OPERATOR,
        Scope.REQUEST,
        meaning="The evidence that the study is complete is weaker than the site requires.",
        advice=(
            "Have the PACS answer queries at IMAGE level, or return its counts of series; or "
            "accept weaker evidence with `validation.evidence`."
        ),
        explanation="""
A study is proven complete by the PACS's list of its instances; where queries at IMAGE level are not
answered, by the number of instances in each series; where these are absent too, by the counters of
the retrieve. The last are a statement of the transfer that they are to prove, and are accepted only
with `validation.evidence: suboperation-counts`. For a study of which only some series are selected
they prove nothing. No retrieve was sent, unless counts turned out wrong during it: then the
received instances are kept.""",
        stands_though_complete=True,
    ),
    Reason(
        "series-count-wrong",
        PERMANENT,
        Scope.STUDY,
        meaning="More instances of a series have arrived than the PACS counts in it.",
        advice="All of them are kept; the study was judged without the counts.",
        explanation="""
Counts that a PACS stores are wrong at times: images were added later, deleted, or stored twice.
More instances arrived than this count. A second query returned the same count, so it was not used:
the study was judged as one without counts, and its manifest says so.""",
        rerun=shared_texts.THE_NOTE,
    ),
    Reason(
        "study-changed",
        TRANSIENT,
        Scope.REQUEST,
        meaning="The PACS's instance list changed while the study was retrieved.",
        advice="The study is probably still being acquired; rerun when it is complete on the PACS.",
        explanation="""
The list read after the retrieval differs from the one before it, several times. Images are still
arriving at the PACS, or somebody is correcting the study there. A manifest is only written for a
list that did not change.""",
    ),
    Reason(
        "nothing-arrived",
        TRANSIENT,
        Scope.STUDY,
        meaning="The PACS reported success and nothing arrived.",
        advice="Where C-GET is used, read the PACS's log. Where C-MOVE is used: "
        + shared_texts.WAY_BACK_CHECKLIST,
        explanation="""
The C-MOVE or C-GET ended with success and correct counters, and no instance arrived. dcmqrscp says
so for a UID it does not know; others count an instance as sent when it is in their own queue. A
PACS with several sender nodes may have sent to another destination of the same AE title. The study
is still listed, or the reason would be `study-gone`.
"""
        + shared_texts.WAY_BACK_EXPLANATION,
        needs_diagnosis=True,
    ),
    Reason(
        "instances-rejected",
        PERMANENT,
        Scope.STUDY,
        meaning="Instances are faulty at their source and the site's policy leaves them out.",
        advice=(
            "The manifest names them; set `validation.faulty: archive` to keep them with a warning."
        ),
        explanation="""
Instances that were faulty when they arrived were requested once more and arrived the same: they are
faulty on the PACS. `validation.faulty: leave-out` says not to archive them; the manifest lists each
with its reason, and everything else of the study is archived.""",
    ),
    Reason(
        "claim-lost",
        TRANSIENT,
        Scope.STUDY,
        meaning="Another run has claimed the study.",
        advice="Nothing to do: the other run finishes it.",
        explanation="""
A study belongs to one run at a time. Another run took this one over, because this run was taken for
dead: its database connection or its lock was gone. The ledger refuses what this run writes about
the study from then on, so the two cannot disagree.""",
        rerun="None is needed.",
    ),
    Reason(
        "interrupted",
        TRANSIENT,
        Scope.SITE,
        meaning="The run was stopped before the study was finished.",
        advice="`prefect-dicom rerun` continues from here.",
        explanation="""
Ctrl-C, a signal, a cancelled flow or a restarted worker, or a run that was stopped before it came
to these rows: then its message says why. Received instances stay in the spool, archived studies
stay archived.""",
    ),
    Reason(
        "window-closed",
        TRANSIENT,
        Scope.NODE,
        meaning="The PACS may not be queried at this time of the week.",
        advice="Nothing to do: the next run goes on when a window of the node's "
        "`access_schedule` opens.",
        explanation="""
The site file's `access_schedule` says when a node may be queried, and the run came to the end of a
window, or began outside all windows. Nothing has failed: received instances stay in the spool,
archived studies stay archived, and the claims are released. `prefect-dicom status` shows when the
next window opens; with `on_close: wait` the run waits for it instead of stopping.""",
    ),
)
