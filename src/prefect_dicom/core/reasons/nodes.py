"""Reasons of PACS nodes: connections, associations, DIMSE statuses and silence."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import shared_texts
from prefect_dicom.core.reasons.reason import Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition


NODES = (
    Reason(
        "pacs-address",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS's host name does not resolve.",
        advice="Correct `host` of the node.",
        explanation="""
The name of `host` has no address here. Compare `getent hosts NAME` on this machine; in a
container, names of the hospital's network need its DNS server. An IP address works too.""",
    ),
    Reason(
        "pacs-refused",
        TRANSIENT,
        Scope.NODE,
        meaning="Nothing listens at the PACS's address and port.",
        advice="Check host and port, and whether the PACS runs.",
        explanation="""
The host answered that nothing listens on the port: the PACS service is down, the port is wrong
(104, 11112 and 4242 are common), or a firewall rejects instead of dropping. The node is waiting for
longer and longer, then disabled until a rerun.""",
        retry_once=True,
    ),
    Reason(
        "pacs-unreachable",
        TRANSIENT,
        Scope.NODE,
        meaning="The PACS's address does not answer.",
        advice="Check the firewall from this host to the PACS.",
        explanation="""
Packets to the address got no answer at all: a firewall that drops them, a wrong address, a host
that is off, a missing route or VPN. Ask for the rule *from this host to host and port of the
node*. The detail in brackets has the operating system's error.""",
    ),
    Reason(
        "pacs-reset",
        TRANSIENT,
        Scope.NODE,
        meaning="The PACS closed the connection at once.",
        advice="Often plain DICOM to a TLS port (set `tls` of the node), or an address filter.",
        explanation="""
The connection was opened and closed again before any PDU. On the first contact
this is nearly always a port that expects TLS, an address filter (tcp wrappers, "allowed hosts"),
or another service; the node is then disabled at once. After a success in
the same run it rather is a PACS that restarts or has no room for more connections, and the node is
waiting.""",
        retry_once=True,
        transient_before_success=False,
    ),
    Reason(
        "pacs-silent",
        TRANSIENT,
        Scope.NODE,
        meaning="The PACS accepted the connection and sent no answer.",
        advice="It may be busy; rerun later or lower `limits.associations`.",
        explanation="""
Orthanc accepts any number of associations and serves four at a time; the others wait.
Single-threaded PACS do the same with two. A proxy without its backend accepts and stays
silent for ever. Lower `limits.associations`, or raise `timeouts.acse_seconds`.""",
        unanswered=True,
    ),
    Reason(
        "pacs-slow",
        TRANSIENT,
        Scope.NODE,
        meaning="The PACS takes several times as long as usual to begin its answers.",
        advice=(
            "Nothing to do: it gets fewer requests at a time until it answers faster; or lower "
            "`limits.associations`."
        ),
        explanation="""
A node is compared with its own usual latency: three of its last ten requests, for different
studies, took at least three seconds and four times the usual until the first answer or the first
instance. The limit of concurrent requests is then halved, and raised by one after each five minutes
without. That is common by day, while clinicians use the PACS; no row or study fails because of
it.""",
    ),
    Reason(
        "association-lost",
        TRANSIENT,
        Scope.REQUEST,
        meaning="The association ended in the middle of a request.",
        advice=(
            "Rerun; if it repeats at once, the PACS's log says why; if after the same number of "
            "minutes, look for time-outs of firewalls between here and the PACS."
        ),
        explanation="""
The connection ended, with an A-ABORT or without, while an answer was due. The same request was
repeated once at once on a new association, and received instances are kept. The message says how
long after the request it was. If one study or query does this every time and within seconds, the
PACS's process crashes over it (its log says so); if any does after the same number of minutes, a
firewall forgets idle connections.""",
        retry_once=True,
        counts_against_node=True,
        unanswered=True,
        cuts_transfer=True,
        acceptable=True,
    ),
    Reason(
        "association-stalled",
        TRANSIENT,
        Scope.NODE,
        meaning="Nothing arrived for the configured stall time.",
        advice="Rerun, or raise `timeouts.stall_seconds` for a slow PACS.",
        explanation="""
Neither an instance nor an answer came for `timeouts.stall_seconds` (before the first one:
`timeouts.first_byte_seconds`). PACS that fetch from tape or a cloud tier can take half an hour
to begin. The request was cancelled, and received instances are kept.""",
        unanswered=True,
        cuts_transfer=True,
        acceptable=True,
    ),
    Reason(
        "called-ae-title-unknown",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS does not accept the called AE title as its own.",
        advice="Correct `called_ae_title` of the node; case matters.",
        explanation="""
Rejection (1,1,7). dcmqrscp and most commercial PACS compare the called AE title, in exact
case; Orthanc accepts any unless `DicomCheckCalledAet` is set.""",
    ),
    Reason(
        "calling-ae-title-unknown",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS does not know our AE title.",
        advice="Have our AE title and address added to the PACS's table of known nodes.",
        explanation="""
Rejection (1,1,3): `calling_ae_title` of the node is not in the PACS's table. Many check the address
together with the title, and reject a known title from another address with the same numbers.
Orthanc does not reject: it aborts the first request, see `not-permitted`. `prefect-dicom doctor`
prints the line to add.""",
    ),
    Reason(
        "association-rejected",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS rejected the association without a reason that helps.",
        advice="Ask the PACS administrator; often an unknown AE title or a disabled node.",
        explanation="""
The rejection gives no usable reason; the three numbers (result, source, reason; PS3.8 9.3.4) are in
the message. Seen with titles that the PACS does not know, nodes that are disabled, licences that
ran out, and for a moment while a PACS starts or reads its tables again: so it is tried twice more,
and then the node is disabled.""",
        # A PACS that starts, or reads its tables again, may say this too.
        disables_node_after=3,
    ),
    Reason(
        "protocol-not-supported",
        OPERATOR,
        Scope.NODE,
        meaning=(
            "The PACS does not support the protocol version, application context or parameters of "
            "the association request."
        ),
        advice=(
            "Check `port` of the node: something other than the PACS's DICOM service answers there."
        ),
        explanation="""
The rejection concerns the protocol, not our AE title: application context, protocol version or a
parameter of the association request (PS3.8 9.3.2). Another program than a PACS listens there, a
DICOM gateway of another service, or a very old device.""",
    ),
    Reason(
        "pacs-busy",
        TRANSIENT,
        Scope.NODE,
        meaning="The PACS is at its limit of associations or resources.",
        advice="Rerun later, or lower `limits.associations`.",
        explanation="""
Rejection (1 or 2,3,1) or (1 or 2,3,2), or status 0213, A7xx, A701: at its limit. dcmqrscp with 16
associations allowed rejects the seventeenth with (2,3,2). The node is waiting, and then gets one
concurrent request less for the rest of the run. If it happens at every run, lower
`limits.associations`, or share the PACS with a `pacs-NODE` limit of Prefect.""",
    ),
    Reason(
        "not-permitted",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS refused or aborted the request: our AE title may lack the permission.",
        advice=(
            "Have query and retrieve allowed for our AE title on the PACS, or for the account of "
            "`authentication` on a DICOMweb server. Where only C-GET is refused, set "
            "`retrieve: c-move` for the node."
        ),
        explanation="""
Status 401 or 403 of a DICOMweb server, status 0124, or an A-ABORT right after the first request.
Orthanc accepts every association and answers C-ECHO, and aborts the query of a title that is not in
`DicomModalities` or lacks `AllowFind`, `AllowMove` or `AllowGet`. Others have separate permissions
for query, for retrieve and for each destination. Because this concerns every study, the node is
disabled at the first of them; only a C-GET that is refused so is replaced by C-MOVE, where the site
has a receiver.""",
        refuses_service=True,
    ),
    Reason(
        "service-not-offered",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS does not offer the service or information model.",
        advice=(
            "Try the other `information_model` of the node, or the other way to retrieve "
            "(`retrieve: c-move` or `retrieve: c-get`). Of a DICOMweb node, check the paths in "
            "`dicomweb`, `search_path` and `retrieve_path`."
        ),
        explanation="""
The presentation context was refused, or the request with 0118, 0122 or 0211. A DICOMweb server
answered a search with 404, 405 or 501, or sent us elsewhere: its paths are others. Some PACS offer
one of Study Root and Patient Root, C-MOVE without C-GET, or neither to nodes of this kind. The
conformance statement of the product says which, and so does `prefect-dicom doctor --probe`. Where
the site has a receiver, C-MOVE takes the place of a C-GET that is not offered.""",
        refuses_service=True,
    ),
    Reason(
        "move-destination-unknown",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS does not know our receiver's AE title as a move destination.",
        advice=shared_texts.WAY_BACK_CHECKLIST,
        explanation="""
Status A801. dcmqrscp says so; Orthanc answers C000 to the same mistake, which then ends as
`node-sends-nothing`, and old versions of it abort. The title in question is `receiver.ae_title`,
which may differ from the node's `calling_ae_title`: both must be known to the PACS.
"""
        + shared_texts.WAY_BACK_EXPLANATION,
    ),
    Reason(
        "move-destination-failed",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS could not send to our receiver.",
        advice=shared_texts.WAY_BACK_CHECKLIST,
        explanation="""
Status A702 with nothing arrived. dcmqrscp says so when our receiver refuses the connection, rejects
the association, or takes none of the contexts. If others of the run's studies arrive, the way is
open and it is these studies that the PACS cannot send: instances it cannot read, or would have to
convert.
"""
        + shared_texts.WAY_BACK_EXPLANATION,
        needs_diagnosis=True,
        may_stop_midway=True,
    ),
    Reason(
        "sender-not-allowed",
        OPERATOR,
        Scope.NODE,
        meaning=(
            "Nothing arrived, and meanwhile our receiver refused a connection from an address that "
            "is not in `allowed_senders`."
        ),
        advice=(
            "If the address in the message or in the notes of `prefect-dicom status` is the "
            "PACS's, add it to `receiver.allowed_senders`."
        ),
        explanation="""
The receiver accepts connections only from the addresses of `receiver.allowed_senders`; where the
site file has none, from those that the `host` of each node resolves to. A PACS of several machines
sends from another address than it receives requests at, and so does one behind NAT, in a container,
or with several networks. The address was refused before a byte was read. `receiver.log` in the
spool names it too.""",
        needs_diagnosis=True,
        explains_silence=2,
    ),
    Reason(
        "receiver-title-unknown",
        OPERATOR,
        Scope.NODE,
        meaning=(
            "Nothing arrived, and meanwhile our receiver rejected an association that called "
            "another AE title than its own."
        ),
        advice=(
            "Have the title of our receiver corrected in the PACS's table of known nodes, in exact "
            "case, or set `receiver.ae_title` to what the PACS calls: the message, or the notes of "
            "`prefect-dicom status`, name it."
        ),
        explanation="""
Rejection (1,1,7). AE titles are compared in exact case; blanks and NULs around them are ignored.
The PACS accepted our title as the destination of the C-MOVE; the entry from which it takes address
and port has another title. `receiver.log` in the spool names that title too.""",
        needs_diagnosis=True,
        explains_silence=8,
    ),
    Reason(
        "sender-not-understood",
        OPERATOR,
        Scope.NODE,
        meaning=(
            "Nothing arrived, and meanwhile our receiver closed a connection that did not begin "
            "with an association request it can read."
        ),
        advice=(
            "The message, or the notes of `prefect-dicom status`, say what was received: please "
            "report it, with the PACS's product and version."
        ),
        explanation="""
The connection came from an allowed address, and began with another protocol, or with an association
request that cannot be read. TLS where it is not expected is `sender-with-tls`. `receiver.log` in
the spool says what was wrong.""",
        needs_diagnosis=True,
        explains_silence=1,
    ),
    Reason(
        "c-get-sends-nothing",
        OPERATOR,
        Scope.NODE,
        meaning=(
            "The PACS lists one study after the other and sends none of their instances by C-GET."
        ),
        advice=(
            "Read the PACS's log for the requests that ended so: permissions of our AE title, "
            "instances that it cannot read; or set `retrieve: c-move` for this node, with a "
            "`receiver` that the PACS can reach."
        ),
        explanation="""
Three studies in a row (ten, where others had come before) were listed by the PACS, are still there
on a second look, and not even a single instance of them came. In a C-GET instances arrive on our
own association: no address, port or firewall on the way back is involved. Possible causes are the
permission to retrieve, which some PACS deny without an error, a presentation context that the PACS
does not use for its instances, and storage that it cannot read. The studies that were tried keep
their reasons, the others stay pending; `prefect-dicom pull` with the same cohort file continues
with those.""",
    ),
    Reason(
        "node-sends-nothing",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS lists one study after the other and none of their instances arrives.",
        advice=shared_texts.WAY_BACK_CHECKLIST,
        explanation="""
Three studies in a row (ten, where others had come before) were listed by the PACS, are still there
on a second look, and not even a single instance of them came. Orthanc answers C000 for all of
these: a destination it does not know, one it cannot reach, one that does not answer. The studies
that were tried keep their reasons, the others stay pending.

If it really is these studies that cannot be sent, `prefect-dicom pull` with the same cohort file
continues with the pending ones and skips those that failed.
"""
        + shared_texts.WAY_BACK_EXPLANATION,
    ),
    Reason(
        "requests-keep-failing",
        OPERATOR,
        Scope.NODE,
        meaning="One query after the other fails at the PACS, and none succeeds in between.",
        advice=(
            "See the reasons of the rows that failed and the PACS's log; then `prefect-dicom "
            "doctor`."
        ),
        explanation="""
Ten queries in a row were refused, could not be decoded, or lost their association. One such query
fails its row only; ten mean a PACS whose database is down, that is being upgraded, or that does not
support this kind of query at all. The queried rows keep their reasons, the others
stay pending.""",
    ),
    Reason(
        "sop-classes-refused",
        PERMANENT,
        Scope.NODE,
        meaning=(
            "The PACS offers C-GET, but accepted none of the instances' SOP classes with our role."
        ),
        advice=(
            "Set `retrieve: c-move` for this node, and give the site a `receiver` that the PACS "
            "can reach, if it has none."
        ),
        explanation="""
In a C-GET the instances arrive on our own association, for which the PACS has to accept us as the
SCP of each storage class (role selection, PS3.7 D.3.3.4). This one offers C-GET and
accepted none of the classes of these instances. A PACS that says nothing of roles is asked all the
same, three times at most: some send without. If no instance has arrived by C-GET before, it is
replaced by C-MOVE for the rest of the run, where the site has a receiver.""",
        acceptable=True,
    ),
    Reason(
        "request-refused",
        PERMANENT,
        Scope.REQUEST,
        meaning="The PACS cannot process the request.",
        advice="Run with a single row of this kind and read the PACS's log.",
        explanation="""
Statuses of this kind blame the request: A900 (does not match the SOP class), Cxxx to a query
(unable to process), 0106, 0117, 0120, 0121 (a value is bad or missing). Orthanc answers C000 to a
wildcard in a date or UID, dcmqrscp to a query below the study without the UIDs above it, dcm4chee
0120 to a retrieve without a study UID. Queries here are plain, so the row's own value is the first
suspect: characters the PACS does not accept, a PatientID where it requires the study UID.""",
        counts_against_node=True,
        refuses_form=True,
        refuses_query=True,
        fails_uid_list=True,
        acceptable=True,
    ),
    Reason(
        "pacs-failure",
        TRANSIENT,
        Scope.REQUEST,
        meaning="The PACS reported a processing failure.",
        advice="Rerun later; if it persists, read the PACS's log.",
        explanation="""
Status 0110, a Cxxx or A702 to a retrieve, or a number that is not in the standard. Orthanc uses
C000 for everything from an unknown study to a receiver that took ten seconds to answer, so
further requests ruled the other causes out: the study is still listed, and other instances arrive.
The PACS cannot send this study just now, or not at all: its log names the file.""",
        counts_against_node=True,
        fails_uid_list=True,
        needs_diagnosis=True,
        may_stop_midway=True,
        acceptable=True,
    ),
    Reason(
        "answer-unusable",
        TRANSIENT,
        Scope.REQUEST,
        meaning="The PACS's answer could not be decoded.",
        advice="Rerun; if it persists, report the PACS's version.",
        explanation="""
The message was no response to the request, or its data set cannot be decoded. PACS that mix answers
of two queries on one association, or put text of one character set under the name of another into
binary fields, do this. Nothing of such an answer is used.""",
        retry_once=True,
        counts_against_node=True,
        fails_uid_list=True,
        unanswered=True,
    ),
    Reason(
        "answers-capped",
        OPERATOR,
        Scope.REQUEST,
        meaning="The PACS cut a list of answers short, and it could not be completed.",
        advice="Have the limit of answers raised on the PACS.",
        explanation="""
The list of a study's series or instances ended with FE00 (Orthanc's `LimitFindInstances`), B001 or
A700 (dcm4chee refuses queries over its maximum): there are more. Some PACS stop with plain success.
That is detected where a query with another number returns instances that the list lacks, where a
series is listed without its instances, or where a query by StudyInstanceUID finds a study that was
not among the answers. A list known to be cut is not used, and nothing of it is retrieved. A list of
studies that is cut is partitioned instead: see `list-unproved`.""",
        refuses_query=True,
        fails_uid_list=True,
    ),
)
