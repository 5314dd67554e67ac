"""Reasons of deliveries: why a study is not sent to a target, or not verified there."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons.reason import Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition


DELIVERIES = (
    Reason(
        "context-refused",
        OPERATOR,
        Scope.STUDY,
        meaning="The target takes no instances of a class in the transfer syntax they have.",
        advice="Have the target accept SOP class and transfer syntax, then deliver again.",
        explanation="""
Instances are sent byte for byte as they were archived, so the target has to accept the presentation
context of their SOP class with their own transfer syntax. storescp and dcmqrscp accept uncompressed
syntaxes only, unless they are started otherwise (`storescp +xa`); Orthanc has a switch for each
compression, and `UnknownSopClassAccepted`. The detail says how many instances it concerns, and
`deliveries.csv` beside the reports which studies.""",
    ),
    Reason(
        "delivery-refused",
        PERMANENT,
        Scope.STUDY,
        meaning="The target refused instances for what they are.",
        advice="Read the target's log for the status; correct the instances or its rules there.",
        explanation="""
The status of the C-STORE response says that sending the same again cannot help: A9xx (the data set
does not match its SOP class), Cxxx (the target cannot understand it), 0122 (SOP class not
supported), or an invalid UID. The other instances of the study were sent; those that the target
accepted are not sent again.""",
    ),
    Reason(
        "delivery-lacking",
        TRANSIENT,
        Scope.STUDY,
        meaning="The target answered success to instances that it does not have.",
        advice="Look for rules on the target that drop or change instances; then deliver again.",
        explanation="""
The transfer ended with success, and the target does not list the instances, counts fewer of them,
or does not send them back. They were sent again, as often as `destination.attempts` says, to the
same end. Archives do that with rules that discard what they take for duplicates, route instances to
another partition, or coerce their UIDs. An archive that lists late needs a longer
`timeouts.settle_seconds`.""",
    ),
    Reason(
        "delivery-differs",
        PERMANENT,
        Scope.STUDY,
        meaning="The target sends back other bytes than it was sent.",
        advice="Find out what changed them: an instance of the same UID that was there before, "
        "coercion, or another encoding.",
        explanation="""
An instance was read back with C-GET, and the SHA-256 of its data set is not that of the archived
one. Orthanc answers success and keeps the instance it has when the UID is known already
(`OverwriteInstances`); dcmqrscp replaces it; others coerce patient data or add elements of their
own (statuses B000, B006, B007). Nothing is overwritten or deleted at the target by us.""",
    ),
    Reason(
        "commitment-not-offered",
        OPERATOR,
        Scope.STUDY,
        meaning="The target does not offer storage commitment.",
        advice="Set `destination.evidence` to listed or read-back, or have the target offer it.",
        explanation="""
The target refused the presentation context of the Storage Commitment Push Model, or its N-ACTION
as a class or an action that it does not support. dcmqrscp and storescp do not have the service. The
study is there as far as the target lists it; only what `destination.evidence: committed` asks for
is missing.""",
    ),
    Reason(
        "commitment-failed",
        PERMANENT,
        Scope.STUDY,
        meaning="The target does not take responsibility for instances of the study.",
        advice="Read the failure reason in the detail, and the target's log.",
        explanation="""
The report of storage commitment has instances in its Failed SOP Sequence. 0112 says that the target
does not have the instance: it was sent once more and asked again. 0119 says that it has the UID
with another SOP class, so that a UID was used twice. 0122 says that it does not support the class.
0110 and 0213 are asked again for `destination.commit_within_seconds`.""",
    ),
    Reason(
        "commitment-unreported",
        TRANSIENT,
        Scope.STUDY,
        meaning="The target has accepted a request for storage commitment and never reported.",
        advice="Have the target know our AE title with the address and port of the receiver, and "
        "keep `prefect-dicom receiver run` up.",
        explanation="""
The report of storage commitment comes on the association of the request, on a later one, or on a
new association to host and port that the target has in its table for our AE title: that of the
receiver. Orthanc tries once, and never again. A firewall from the target to the receiver, a wrong
port, or a receiver that does not run at that time lose it. A delivery asks again with a new
transaction when `destination.commit_within_seconds` are over.""",
    ),
)
