"""Reasons of studies: why one is not listed, not whole or not archived."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import shared_texts
from prefect_dicom.core.reasons.reason import Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition

_THE_NOTE = (
    "Nothing is left to be done: the object is archived, and its line in the study's manifest has "
    "this note."
)

STUDIES = (
    Reason(
        "instance-list-empty",
        PERMANENT,
        Scope.STUDY,
        meaning="The PACS lists no instance for the study.",
        advice="The study is gone or empty on the PACS; check there.",
        explanation="""
The study was found, and asked for its series and instances it lists none. Either it was emptied
after it was found, or the archive has only its record: studies that were moved to another archive,
or whose images have been deleted, look like this.""",
    ),
    Reason(
        "study-gone",
        PERMANENT,
        Scope.STUDY,
        meaning="The PACS had listed the study and does not have it any more.",
        advice="Ask on the PACS whether it was deleted, moved or merged into another study.",
        explanation="""
The study was on the list, a retrieve brought nothing, and the PACS, asked again, does not list it
any more. Orthanc answers the retrieve with C000, dcmqrscp reports success with nothing sent; both
are told apart from a broken way back by this second query. Deleted, merged into another study
under a new UID, or moved to another archive by its lifetime rules. If it was merged, a new pull of
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
somebody has to put in, or lost. NEARLINE ones are asked for; the PACS fetches them while
`timeouts.first_byte_seconds` lasts.""",
    ),
    Reason(
        "instances-missing",
        TRANSIENT,
        Scope.STUDY,
        meaning="The PACS lists instances that it did not send, though asked for them again.",
        advice="`prefect-dicom rerun` asks for exactly these; if it stays, look at the PACS's log.",
        explanation="""
What arrived is compared with the PACS's list, and what is missing was asked for again, in smaller
pieces and then one by one. What still does not come, the PACS usually cannot send: a file that is
damaged or missing on its disk, a transfer syntax it would have to convert and cannot (Orthanc and
dcmqrscp do not convert compressed images), a SOP class it will not send. Its status may say
success all the same. What has come is archived already and is not asked for again.""",
    ),
    Reason(
        "copy-incomplete",
        OPERATOR,
        Scope.REQUEST,
        meaning="The node that could be asked lists or counts fewer instances than another node.",
        advice="Have the fuller node repaired, or the study completed on this one, then rerun.",
        explanation="""
Of a cohort with several nodes. The node that has most of the study could not deliver it, and the
one asked instead has no copy of all of it: an instance is missing from its list, or it counts less
than the other does. A part of a study is not archived as the whole. The column `nodes` of
`results.csv` says why the fuller node failed. Where that one has deleted the study (`study-gone`),
what another has is taken.""",
    ),
    Reason(
        "completeness-unknown",
        OPERATOR,
        Scope.STUDY,
        meaning=(
            "The PACS lists and counts no instances, and what arrived is not what it says to have "
            "sent."
        ),
        advice=(
            "What came is kept for a rerun. Have the PACS answer queries at IMAGE level, or tell "
            "its counts; compare the study with what the PACS shows."
        ),
        explanation="""
The PACS answers no query at IMAGE level and tells no counts of series. All there is then to judge
by are the counters of the retrieve's final response: success, as many completed as different
objects have arrived, none failed, none with a warning. It was asked more than once, on new
associations, and they never agreed, or there were no counters. Objects of classes that a C-GET did
not propose are counted as failed: with C-MOVE the same PACS may do better.""",
    ),
    Reason(
        "evidence-too-weak",
        OPERATOR,
        Scope.REQUEST,
        meaning="That the study is whole can only be shown by less than the site asks for.",
        advice=(
            "Have the PACS answer queries at IMAGE level, or tell its counts of series; or accept "
            "less with `validation.evidence`."
        ),
        explanation="""
A study is proven whole by the PACS's list of its instances; where queries at IMAGE level are not
answered, by the number of instances in each series; where these are absent too, by what the
PACS says to have sent. The last is the word of the very transfer it is to prove, and is not taken
unless the site says so: `validation.evidence: suboperation-counts`. Of a study of which only some
series are wanted it says nothing at all. Nothing was asked for, unless counts turned out wrong on
the way: then what arrived is kept.""",
        stands_though_complete=True,
    ),
    Reason(
        "series-count-wrong",
        PERMANENT,
        Scope.STUDY,
        meaning="More instances of a series have arrived than the PACS counts in it.",
        advice="All of them are kept; the study was judged without the counts.",
        explanation="""
Counts that an archive keeps beside its images are wrong at times: images that were added later,
deleted, or stored twice. One that is too small shows by what arrives. It was read again, stayed as
it was, and proves nothing: the study was judged as one without counts, and its manifest says
so.""",
        rerun=_THE_NOTE,
    ),
    Reason(
        "study-changed",
        TRANSIENT,
        Scope.REQUEST,
        meaning="The PACS's instance list changed while the study was retrieved.",
        advice="The study is probably still being acquired; rerun when it has settled.",
        explanation="""
The list read after the retrieval differs from the one before it, several times. Images are still
arriving at the PACS, or somebody is correcting the study there. A manifest is only written for a
list that holds still.""",
    ),
    Reason(
        "nothing-arrived",
        TRANSIENT,
        Scope.STUDY,
        meaning="The PACS reported success and nothing arrived.",
        advice="Where C-GET is used, read the PACS's log. Where C-MOVE is used: "
        + shared_texts.WAY_BACK_CHECKLIST,
        explanation="""
The C-MOVE or C-GET ended with success, all counters right, and no instance came. dcmqrscp says so
for a UID it does not know; others count an object as sent when it is in their own queue. A PACS
with several sender nodes may have sent to another destination of the same AE title. The study is
still listed, or the reason would be `study-gone`.
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
Objects that were faulty when they arrived were asked for once more and came the same: so they lie
on the PACS. `validation.faulty: leave-out` says not to archive them; the manifest lists each with
its reason, and everything else of the study is archived.""",
    ),
    Reason(
        "claim-lost",
        TRANSIENT,
        Scope.STUDY,
        meaning="Another run took the study over.",
        advice="Nothing to do: the other run finishes it.",
        explanation="""
A study belongs to one run at a time. Another run took this one over, because this run was held to
be dead: its database connection or its lock was gone. Nothing it writes about the study counts
from then on, so the two cannot disagree.""",
        rerun="None is needed.",
    ),
    Reason(
        "interrupted",
        TRANSIENT,
        Scope.SITE,
        meaning="The run was stopped before the study was finished.",
        advice="`prefect-dicom rerun` goes on from here.",
        explanation="""
Ctrl-C, a signal, a cancelled flow or a restarted worker, or a run that was stopped before it came
to these rows: then its message says why. What had arrived lies in the spool, what was archived is
archived.""",
    ),
    Reason(
        "window-closed",
        TRANSIENT,
        Scope.NODE,
        meaning="The PACS may not be asked at this time of the week.",
        advice="Nothing to do: the next run goes on when a window of the node's "
        "`access_schedule` opens.",
        explanation="""
The site file's `access_schedule` says when a node may be asked, and the run came to the end of a
window, or began outside of all. Nothing has failed: what had arrived lies in the spool, what was
archived is archived, and the claims are given back. `prefect-dicom status` shows when the next
window opens; with `on_close: wait` the run waits for it instead of stopping.""",
    ),
)
