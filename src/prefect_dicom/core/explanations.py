"""What is behind each reason: which PACS says it when, and how to find out what to do.

Meaning, advice and disposition are in :mod:`prefect_dicom.core.reasons`; here is what does not fit
beside a row. Both together are the sections of ``docs/reasons.md``, which is written by
``python -m prefect_dicom.core.explanations``, and what ``prefect-dicom explain`` prints.
"""

from __future__ import annotations

import sys

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import REASONS, reason_for

_RERUN = {
    Disposition.TRANSIENT: "Yes, without anybody doing anything: the run itself tries it again "
    "after a while, and `prefect-dicom rerun` does.",
    Disposition.PERMANENT: "Not by itself: the same would come of it. Once something has changed, "
    "`prefect-dicom rerun COHORT --reason {code}` tries it again.",
    Disposition.OPERATOR: "Yes, once the cause is gone: `prefect-dicom rerun` goes on with "
    "what is left. Nothing that was archived before is asked for again.",
}

_A_NOTE = (
    "Nothing is left to be done: the object is archived, and its line in the study's manifest has "
    "this note."
)
_NOT_OF_A_ROW = "It is no reason of a row: give the command again once the cause is gone."

_OTHERWISE = {
    "all-archived": "There is nothing left to do. A rerun asks the PACS for nothing.",
    "claim-lost": "None is needed.",
    "unsafe-uid": "Yes, with `--reason unsafe-uid`, once the UID has been repaired.",
    "not-requested": "None is needed.",
    **dict.fromkeys(
        (
            "transfer-syntax-unknown",
            "not-inspected",
            "wrong-transfer-syntax",
            "pixel-data-longer",
            "trailing-bytes",
            "partly-inspected",
            "patient-id-missing",
            "patient-id-reencoded",
            "series-count-wrong",
        ),
        _A_NOTE,
    ),
    **dict.fromkeys(
        (
            "configuration-faulty",
            "cohort-faulty",
            "cohort-name-taken",
            "cohort-unknown",
            "ledger-too-new",
            "ledger-unsafe",
            "spool-unsafe",
            "spool-unusable",
        ),
        _NOT_OF_A_ROW,
    ),
}
"""Whether a rerun helps, where the disposition does not say it all."""

_THE_WAY_BACK = """
A C-MOVE has two halves: our request to the PACS, and the association that the PACS opens to our
receiver. The first half works, or there would be no such answer. Of the second check, in this
order:

1. our AE title in the PACS's table of known nodes, in exact case;
2. the address beside it: the one at which the PACS sees this host (NAT, containers, several
   networks), and the port of `receiver.port`;
3. that the receiver listens there: `receiver.bind` must not be `127.0.0.1` for a PACS elsewhere;
4. the firewalls from the PACS to here, this host's own among them;
5. the permission to send to us: a checkbox of the node, a licence, "export allowed";
6. that the PACS speaks plain DICOM to us, not TLS.

`prefect-dicom doctor` retrieves one instance this way and prints the line to add. Where no inbound
port is to be had, `retrieve: c-get` needs none, if the PACS offers it."""

EXPLANATIONS: dict[str, str] = {
    # --- rows
    "all-archived": """
Every instance on the PACS's list, read before and after the retrieval, is in the archive, and a
manifest names them all with their hashes.""",
    "some-archived": """
The row found several studies, or one of which a part is archived. What is archived stays; only
what is missing is asked for again. `prefect-dicom status COHORT` counts the reasons,
`results.csv` has the studies of each line.""",
    "no-match": """
The query was answered in full and without a match. Orthanc and dcmqrscp compare PatientID and
AccessionNumber in exact case and with all zeros: `000123` is not `123`. Spreadsheets drop leading
zeros silently; format the column as text before you save. Some archives store an accession number
with blanks or a prefix of the issuing system. Try one row with `prefect-dicom doctor --accession`
or `--patient`.""",
    "excluded-by-filter": """
The PACS was asked by the identifiers alone and its answers were filtered here, because archives
match dates and modalities differently or ignore them: dcmqrscp takes no notice of a modality, some
shift the date of a study near midnight. Nothing is wrong unless you wanted these studies.""",
    "several-patients": """
One accession number, or one study UID, stands for studies of different patients. That happens with
accession numbers of several hospitals in one archive, after a merge that went half way, and with
test patients. None is chosen by guess: a wrong patient in a cohort is worse than a missing one.
The candidates are in `candidates.csv` in the reports folder, a line for each: write `x` into the
column Take of those you want, and pull the file as a cohort of its own.""",
    "name-disagrees": """
A mistyped accession number is often the number of a stranger's study. Where the cohort file has a
column PatientName or PatientBirthDate, every study that the identifiers find is compared with them,
and one that differs keeps the whole row from being taken. Names are compared without regard to
case, accents and titles, group by group (Latin, ideographic, phonetic); `Müller, Jörg` with a comma
and `Mueller^Joerg` are not the same and are called "written otherwise". A PACS that drops the
letters it cannot send (Orthanc answers in Latin-1 whatever the objects hold) or does not tell the
birth date leaves nothing to compare: such rows end here too. `candidates.csv` says for each study
what differs.""",
    "key-ignored": """
An archive that does not support a key leaves it out of the matching and answers with whatever is
there. dcmqrscp does so with every key it does not know. All answers are compared here with what
was asked for, and none of them was it.""",
    "identifier-missing": """
Return keys are optional for many archives: the answer then lacks the PatientID or the accession
number that the row names, and that it belongs to the row would be a guess. Study UIDs are in every
answer.""",
    "list-unproved": """
The list of answers ended at a number, whether the PACS said so (FE00, B001, A700) or not, and was
asked for in parts: by halves of the dates down to single days, by modality, by the last or first
characters of accession number or PatientID. A part that is cut short too, and that the PACS divides
by none of these, is named in the column `gaps` of `results.csv`: days, with a modality where only
that one is cut, or "studies without a date", which no range of dates finds. "Studies without a UID
of their own" are of several patients under one StudyInstanceUID, or have one that cannot be asked
for. What was found is true and pulled; the row is not whole without a look at the gaps. Orthanc's
limit is `LimitFindResults`.""",
    "filter-undecided": """
An attribute that a PACS does not support is absent from its answers, and some leave out ages,
sexes or numbers of instances though they have them. An empty date, sex, age or number is not known
either, and so is one that cannot be read; a description that is there and empty is a text without
words. A study whose PatientID or accession number differs from an excluded one in case, blanks or
leading zeros alone belongs here too: it may be the same. What was decided is pulled.""",
    "window-empty": """
A cohort without a list is asked for month by month, and each month is a row. This one ended before
its filters were needed: the PACS, asked for the days, answered with no study at all.""",
    "beyond-the-maximum": """
All rows of a cohort are asked first. Of each PatientID, as the PACS tells it, the latest or
earliest studies are taken then, by StudyDate and, of one day, by UID. Studies without a date are
the last to be taken. Those without a PatientID are not counted together.""",
    "selected-otherwise": """
Which series are wanted is written into the manifest of a study (`selection`) and into the ledger
when the study is listed. The keys of objects are made of UIDs alone, so that a second selection of
the same study would lie in the same place, and its manifest would be another.""",
    "unsafe-uid": """
A request with an empty UID, or with `*`, `?` or a backslash in it, selects other studies than the
one meant: dcmqrscp answers an empty StudyInstanceUID with its whole archive. Such a UID comes from
a defective modality or import; it is never sent.""",
    "unsafe-patient-id": """
In the Patient Root model a retrieve names its patient too. A PatientID of `***`, which real
archives hold, selects every patient: dcmqrscp sends them all. The Study Root model names a study
by its UID alone; nearly every PACS offers it.""",
    # --- studies
    "instance-list-empty": """
The study was found, and asked for its series and instances it lists none. Either it was emptied
after it was found, or the archive has only its record: studies that were moved to another archive,
or whose images have been deleted, look like this.""",
    "study-gone": """
The study was on the list, a retrieve brought nothing, and the PACS, asked again, does not list it
any more. Orthanc answers the retrieve with C000, dcmqrscp reports success with nothing sent; both
are told apart from a broken way back by this second query. Deleted, merged into another study
under a new UID, or moved to another archive by its lifetime rules. If it was merged, a new pull of
the same patient or accession number finds its new UID.""",
    "study-offline": """
The PACS marks the study's images as OFFLINE or UNAVAILABLE (0008,0056): on a tape or a disc that
somebody has to put in, or lost. NEARLINE ones are asked for; the PACS fetches them while
`timeouts.first_byte_seconds` lasts.""",
    "instances-missing": """
What arrived is compared with the PACS's list, and what is missing was asked for again, in smaller
pieces and then one by one. What still does not come, the PACS usually cannot send: a file that is
damaged or missing on its disk, a transfer syntax it would have to convert and cannot (Orthanc and
dcmqrscp do not convert compressed images), a SOP class it will not send. Its status may say
success all the same. What has come is archived already and is not asked for again.""",
    "copy-incomplete": """
Of a cohort with several nodes. The node that has most of the study could not deliver it, and the
one asked instead has no copy of all of it: an instance is missing from its list, or it counts less
than the other does. A part of a study is not archived as the whole. The column `nodes` of
`results.csv` says why the fuller node failed. Where that one has deleted the study (`study-gone`),
what another has is taken.""",
    "completeness-unknown": """
The PACS answers no query at IMAGE level and tells no counts of series. All there is then to judge
by are the counters of the retrieve's final response: success, as many completed as different
objects have arrived, none failed, none with a warning. It was asked more than once, on new
associations, and they never agreed, or there were no counters. Objects of classes that a C-GET did
not propose are counted as failed: with C-MOVE the same PACS may do better.""",
    "evidence-too-weak": """
A study is proven whole by the PACS's list of its instances; where queries at IMAGE level are not
answered, by the number of instances in each series; where these are not told either, by what the
PACS says to have sent. The last is the word of the very transfer it is to prove, and is not taken
unless the site says so: `validation.evidence: suboperation-counts`. Of a study of which only some
series are wanted it says nothing at all. Nothing was asked for, unless counts turned out wrong on
the way: then what arrived is kept.""",
    "series-count-wrong": """
Counts that an archive keeps beside its images are wrong at times: images that were added later,
deleted, or stored twice. One that is too small shows by what arrives. It was read again, stayed as
it was, and proves nothing: the study was judged as one without counts, and its manifest says
so.""",
    "study-changed": """
The list read after the retrieval differs from the one before it, several times. Images are still
arriving at the PACS, or somebody is correcting the study there. A manifest is only written for a
list that holds still.""",
    "nothing-arrived": """
The C-MOVE or C-GET ended with success, all counters right, and no instance came. dcmqrscp says so
for a UID it does not know; others count an object as sent when it is in their own queue. A PACS
with several sender nodes may have sent to another destination of the same AE title. The study is
still listed, or the reason would be `study-gone`.
"""
    + _THE_WAY_BACK,
    "instances-rejected": """
Objects that were faulty when they arrived were asked for once more and came the same: so they lie
on the PACS. `validation.faulty: leave-out` says not to archive them; the manifest lists each with
its reason, and everything else of the study is archived.""",
    "claim-lost": """
A study belongs to one run at a time. Another run took this one over, because this run was held to
be dead: its database connection or its lock was gone. Nothing it writes about the study counts
from then on, so the two cannot disagree.""",
    "interrupted": """
Ctrl-C, a signal, a cancelled flow or a restarted worker, or a run that was stopped before it came
to these rows: then its message says why. What had arrived lies in the spool, what was archived is
archived.""",
    "window-closed": """
The site file's `courtesy` says when a node may be asked, and the run came to the end of a window,
or began outside of all. Nothing has failed: what had arrived lies in the spool, what was archived
is archived, and the claims are given back. `prefect-dicom status` tells when the next window
opens; `at_the_edge: wait` lets the run wait for it instead of ending.""",
    # --- instances
    "instance-unreadable": """
The first elements of the data set could not be walked: not DICOM, encrypted, or damaged from its
beginning. It was asked for twice. `validation.faulty` decides whether it is archived with this
note or left out.""",
    "instance-truncated": """
A length in the object points behind its end. Networks that lose bytes are rare, as TCP would
notice; files cut by a full disk on a modality or during a migration between archives are not. The
second copy was cut in the same place.""",
    "pixel-data-length": """
Rows, Columns, frames and bits ask for more bytes than the pixel data has. Viewers show such an
image with a black rest, or not at all. Typical of exports that were interrupted and of headers
that somebody edited.""",
    "uid-mismatch": """
The C-STORE request named another SOP instance or class than its data set holds, so it cannot be
said what it is. Archives that rewrite UIDs while they send (anonymising gateways, merges) do this
when they rewrite one of the two only.""",
    "transfer-syntax-unknown": """
Private transfer syntaxes are legal between partners who know them; this one is in no table here.
The bytes are archived as they came, with their hash.""",
    "not-inspected": """
A deflated data set would have to be inflated to be looked into, and a small one can inflate to
any size. It is archived unopened.""",
    "wrong-transfer-syntax": """
The data set was announced in one encoding and is in another, for example implicit VR within an
explicit VR context. Some archives store the announced syntax and the original bytes. Most tools
refuse such a file; pydicom reads many of them with `force=True`.""",
    "pixel-data-longer": """
More pixel bytes than the header asks for: padding of some modalities, or a trailing frame.""",
    "trailing-bytes": """
Archives and media writers fill files up to a block size with zeros. No element is affected.""",
    "partly-inspected": """
Sequences deep or long beyond what real objects have. They are not followed without end, because a
hostile object could be made of nothing else.""",
    "patient-id-missing": """
Study, series and SOP instance UID are those that were asked for; only the PatientID is absent or
empty in the object, while the PACS has one in its own database. Typical of raw data and of
structured reports.""",
    "patient-id-reencoded": """
The PACS answers queries in another character set than its objects are in. Orthanc answers in
ISO_IR 100 unless told otherwise, and drops letters that do not fit.""",
    "wrong-patient": """
The object has the study's UID and another PatientID. Two patients share one StudyInstanceUID on
the PACS (a C-MOVE then brings both; Orthanc does not heed the PatientID of a Patient Root
request), or the PACS's database was corrected and its files were not. Nobody but the PACS's staff
can say which is right. `prefect-dicom quarantine show` says what arrived.""",
    "conflicting-content": """
A SOP Instance UID may stand for one object only. Two with different bytes came: an image that was
corrected and sent again, one that exists in two encodings, or two series with the same UIDs
(Orthanc keeps both). Neither is archived until somebody has decided.""",
    "not-requested": """
The receiver takes what it is sent, so that a PACS never stops a transfer over one stray object,
and keeps apart what belongs to no study that this site has asked for: modalities that know the
same AE title, a PACS that sends priors along, or objects of a study whose run has ended.""",
    "spool-damaged": """
Between its arrival and its upload a file in the spool has changed: a failing disk, a file system
that was full or not cleanly unmounted, or somebody editing files there. Object and archive are
safe: the upload is refused unless the hash from arrival holds.""",
    "no-longer-listed": """
The PACS listed the instance, it arrived, and the next list does not have it: deleted, or moved to
another series, in the meantime.""",
    # --- the PACS node
    "pacs-address": """
The name of `host` has no address here. Compare `getent hosts NAME` on this machine; in a
container, names of the hospital's network need its DNS server. An IP address works too.""",
    "pacs-refused": """
Something answered for the address and said that nobody listens on the port: the PACS service is
down, the port is wrong (104, 11112 and 4242 are common), or a firewall rejects instead of
dropping. The node is left alone for growing times, and then until a rerun.""",
    "pacs-unreachable": """
Packets to the address got no answer at all: a firewall that drops them, a wrong address, a host
that is off, a missing route or VPN. Ask for the rule *from this host to host and port of the
node*. The detail in brackets has the operating system's own word for it.""",
    "pacs-reset": """
The connection was opened and closed again before a word of DICOM was said. On the first contact
this is nearly always a port that expects TLS, an address filter (tcp wrappers, "allowed hosts"),
or another service; the node is then left alone at once. After it has worked in the same run it
rather is a PACS that restarts or has no room for more connections, and it is waited for.""",
    "pacs-silent": """
Orthanc accepts any number of associations and serves four at a time; the others stand and wait.
Single-threaded archives do the same with two. A proxy without its backend accepts and stays
silent for ever. Lower `limits.associations`, or raise `timeouts.acse_seconds`.""",
    "pacs-slow": """
A node is compared with itself: three of its last ten requests, for different studies, took at
least three seconds and four times the usual until the first answer or the first object. It is then
asked for half as much at a time, and for one more after each five minutes without. By day that is
what a PACS does whose clinicians work; nothing is failed for it.""",
    "association-lost": """
The connection ended, with an A-ABORT or without, while an answer was due. The same request was
repeated once at once on a new association, and what had arrived counts. If one study does this
every time, the PACS's process crashes over it (its log says so); if any does after the same number
of minutes, a firewall forgets idle connections.""",
    "association-stalled": """
Neither an instance nor an answer came for `timeouts.stall_seconds` (before the first one:
`timeouts.first_byte_seconds`). Archives that fetch from tape or a cloud tier can take half an hour
to begin. The request was cancelled, and what came is kept.""",
    "called-ae-title-unknown": """
Rejection (1,1,7). dcmqrscp and most commercial archives compare the called AE title, in exact
case; Orthanc takes any unless `DicomCheckCalledAet` is set.""",
    "calling-ae-title-unknown": """
Rejection (1,1,3): `calling_ae_title` of the node is not in the PACS's table. Many check the address
together with the title, and reject a known title from another address with the same numbers.
Orthanc does not reject: it aborts the first request, see `not-permitted`. `prefect-dicom doctor`
prints the line to add.""",
    "association-rejected": """
Rejected without a reason of use; the three numbers (result, source, reason; PS3.8 9.3.4) are in the
message. Seen with titles that the PACS does not know, nodes that are disabled, licences that ran
out, and for a moment while a PACS starts or reads its tables again: so it is tried twice more, and
then the node is left alone.""",
    "protocol-not-supported": """
The answer is about the language itself, not about us: application context, protocol version or a
parameter of the association request (PS3.8 9.3.2). Another program than a PACS listens there, a
DICOM gateway of another service, or a very old device.""",
    "pacs-busy": """
Rejection (1 or 2,3,1) or (1 or 2,3,2), or status 0213, A7xx, A701: at its limit. dcmqrscp with 16
associations allowed rejects the seventeenth with (2,3,2). The node is waited for and then asked for
one thing less at a time for the rest of the run. If it happens at every run, lower
`limits.associations`, or share the PACS with a `pacs-NODE` limit of Prefect.""",
    "not-permitted": """
Status 0124, or an A-ABORT right after the first request. Orthanc accepts the association of
anybody and answers C-ECHO, and aborts the query of a title that is not in `DicomModalities` or
lacks `AllowFind`, `AllowMove` or `AllowGet`. Others have separate permissions for query, for
retrieve and for each destination. Because this concerns every study, the node is left alone at the
first of them; only a C-GET that is refused so is replaced by C-MOVE, where the site has a
receiver.""",
    "service-not-offered": """
The presentation context was refused, or the request with 0118, 0122 or 0211. Some archives offer
one of Study Root and Patient Root, C-MOVE without C-GET, or neither to nodes of this kind. The
conformance statement of the product says which, and so does `prefect-dicom doctor --learn`. Where
the site has a receiver, C-MOVE takes the place of a C-GET that is not offered.""",
    "move-destination-unknown": """
Status A801. dcmqrscp says so; Orthanc answers C000 to the same mistake, which then ends as
`node-sends-nothing`, and old versions of it abort. The title in question is `receiver.ae_title`,
which may differ from the node's `calling_ae_title`: both must be known to the PACS.
"""
    + _THE_WAY_BACK,
    "move-destination-failed": """
Status A702 with nothing arrived. dcmqrscp says so when our receiver refuses the connection, rejects
the association, or takes none of the contexts. If others of the run's studies arrive, the way is
open and it is these studies that the PACS cannot send: objects it cannot read, or would have to
convert.
"""
    + _THE_WAY_BACK,
    "node-sends-nothing": """
Three studies in a row (ten, where others had come before) were listed by the PACS, are still there
on a second look, and not even a single instance of them came. Orthanc answers C000 for all of it:
a destination it does not know, one it cannot reach, one that does not answer. The studies that were
tried keep their reasons, the others stay pending.

If it really is these studies that cannot be sent, `prefect-dicom pull` with the same cohort file
goes on behind them: it takes up what is pending and leaves what failed. With `retrieve: c-get`
there is no way back to check: try `c-move`, and look into the PACS's log.
"""
    + _THE_WAY_BACK,
    "requests-keep-failing": """
Ten queries in a row were refused, could not be decoded, or lost their association. One such query
is its row's own affair; ten are a PACS whose database is down, that is being upgraded, or that
does not take the kind of query at all. The rows that were asked keep their reasons, the others
stay pending.""",
    "sop-classes-refused": """
In a C-GET the objects come back over our own association, for which the PACS has to accept us as
the receiving side of each storage class (role selection, PS3.7 D.3.3.4). This one offers C-GET and
accepted none of the classes that these instances are of. If nothing has come by C-GET before, it is
replaced by C-MOVE for the rest of the run, where the site has a receiver.""",
    "request-refused": """
Statuses of this kind name the request: A900 (does not match the SOP class), Cxxx to a query (unable
to process), 0106, 0117, 0120, 0121 (a value is bad or missing). Orthanc answers C000 to a wildcard
in a date or UID, dcmqrscp to a query below the study without the UIDs above it, dcm4chee 0120 to a
retrieve without a study UID. Queries here are plain, so the row's own value is the first suspect:
characters the PACS does not take, a PatientID where it wants the study UID.""",
    "pacs-failure": """
Status 0110, a Cxxx or A702 to a retrieve, or a number that is not in the standard. Orthanc uses
C000 for everything from an unknown study to a receiver that took ten seconds to answer, so what it
meant was found out: the study is still listed, and other instances come. What remains is a study
that the PACS cannot send just now, or not at all: its log names the file.""",
    "answer-unusable": """
What came was no response to the request, or no data set that decodes. Archives that mix answers of
two queries on one association, or put text of one character set under the name of another into
binary fields, do this. Nothing of such an answer is used.""",
    "answers-capped": """
The list of a study's series or instances ended with FE00 (Orthanc's `LimitFindInstances`), B001 or
A700 (dcm4chee refuses queries over its maximum): there are more. Some archives stop with plain
success. That shows where a number that is not in the list brings what the list has not, where a
series is listed without its instances, or where a study that is named by its UID is there and was
not among the answers. A list known to be cut is not taken for a whole one; nothing of it is
retrieved. A list of studies that is cut is asked for in parts instead: see `list-unproved`.""",
    # --- our side
    "configuration-faulty": """
Nothing was sent. All faults of the file are listed at once, each with its key, what was found, and
what is expected. `configs/full.yaml` names every key.""",
    "cohort-faulty": """
Nothing was sent. All faulty lines are listed at once, by line and column. Wildcards in identifiers
are refused, because they select other patients too.""",
    "receiver-taken": """
The port or the AE title of the receiver is held: by a receiver of another spool, by another storage
SCP (Orthanc and dcmqrscp listen on 4242 and 11112 in their examples), or by runs with other
settings of the same spool. `ss -ltnp` names the program; `prefect-dicom receiver status` says for
whom ours runs.""",
    "receiver-unreachable": """
The receiver is a process of its own, started by the first run that needs it. It did not start, or
ended while it was asked. `receiver.log` in the spool directory has its last words; common ones
are a full disk and a killed process (out of memory).""",
    "spool-full": """
`spool.reserve_bytes` of free space are never used, so that the disk does not fill to its end. What
had arrived was uploaded first to make room; it was not enough for the next object. Arriving objects
are refused with A700, which the PACS reports as its failure.""",
    "spool-unusable": """
The directory cannot be created, or lies on a file system that is read-only or lacks what is
needed: locks, `fsync` and renaming within it.""",
    "spool-unsafe": """
What arrives are patients' images: the directory must belong to this user alone. A symbolic link in
its place could lead somewhere else tomorrow.""",
    "archive-conflict": """
An object or a manifest of this study is in the archive with other bytes than those that arrived.
An earlier pull saw other content: the PACS has corrected the study since, or another PACS holds
another version under the same UIDs. The archive is never overwritten: decide which version the
research is to use, and pull the other under another prefix.""",
    "archive-refused": """
401, 403, or a setting the service does not take. The detail has the service's own code:
`AccessDenied` (bucket policy lacks GetObject, PutObject or ListBucket for the prefix),
`SignatureDoesNotMatch` (secret or region), `RequestTimeTooSkewed` (the clock of this host),
`ExpiredToken`, `KMS.…` (the key of `archive.kms_key_id`). A certificate that does not verify ends
here too.""",
    "archive-missing": """
`NoSuchBucket`, or no such directory. Neither is created by a run, because a mistyped name would
become an archive.""",
    "archive-unavailable": """
No answer, 503 SlowDown, 500, or a connection that breaks, after every request was repeated several
times with growing pauses. What has arrived waits in the spool. If it lasts, lower
`archive.connections`.""",
    "archive-checksum": """
The store compared the bytes with their SHA-256 and refused them, or what it gave back does not have
it. Once it is the network (proxies, network cards that compute checksums); again and again it is
a disk or memory, here or there.""",
    "archive-full": """
`QuotaExceeded`, 507, or `ENOSPC` and `EDQUOT` of a directory. What has arrived waits in the
spool.""",
    "manifest-unreadable": """
The manifest under the study's key is no manifest: damaged, or written by a later version in a
format that this one does not know. Nothing is written over it. With versioning on, restore the
version before.""",
    "archive-object-missing": """
The manifest proves that the object was there with its hash; now it is not. Lifecycle rules that
expire objects, clean-up scripts and people are the usual causes; the bucket's access log or its
versions say which. `prefect-dicom verify` finds all of them.""",
    "ledger-busy": """
SQLite lets one program write at a time (`SQLITE_BUSY`, `SQLITE_LOCKED`): another one has held the
file for a minute and a half, most often a browser for databases with an open transaction, or a
backup program. Of PostgreSQL it is a server that restarts, a connection that broke, or a deadlock
(`57P01`, `08006`, `40P01`).""",
    "ledger-damaged": """
`SQLITE_CORRUPT` or `SQLITE_NOTADB`: a disk that fails, a file copied while it was written, or one
on NFS or SMB, where SQLite's locks do not hold. Nothing is in the ledger alone that the archive's
manifests do not have, but for the cohorts themselves: pull their files again.""",
    "ledger-unavailable": """
The detail has SQLite's or PostgreSQL's own name for the error: `SQLITE_READONLY`, `SQLITE_FULL`,
`SQLITE_CANTOPEN`; `28P01` (password), `3D000` (no such database), `42501` (permission). A SQLite
ledger must lie on a local disk, not on NFS or SMB. One that is lost can be made anew with
`prefect-dicom rebuild-ledger`.""",
    "ledger-too-new": """
A newer version has migrated the ledger's tables. An older one would not understand what it wrote,
so it does not write at all.""",
    "ledger-unsafe": """
The file holds PatientIDs and accession numbers. It is created with mode 0600; something has widened
it, most often copying or a `chmod -R`.""",
    "cohort-name-taken": """
Names of cohorts are unique in a ledger. The same file for the same node is the same cohort,
whatever it is called, and needs no new name.""",
    "cohort-unknown": """
`prefect-dicom status` lists the cohorts of the ledger that the site file names. A relative path of
`ledger` is seen from the site file's folder; the environment variable `PREFECT_DICOM_LEDGER_URL`
takes its place.""",
    "unexpected": """
An error without a code of its own. Its type is in the message and the places it came through are in
the local log, both without values: they may be patients'. What was archived is not touched by it.
If it repeats, please report it with these lines.""",
}


def section(code: str) -> str:
    """Everything there is to say about a reason, as a section of Markdown."""
    reason = reason_for(code)
    rerun = _OTHERWISE.get(code) or _RERUN[reason.disposition].format(code=code)
    return (
        f"## {code}\n\n**What happened.** {reason.meaning}\n\n{EXPLANATIONS[code].strip()}\n\n"
        f"**What to do.** {reason.advice}\n\n**Does a rerun help?** {rerun}\n"
    )


def page() -> str:
    """All reasons, in the order of their table: the text of ``docs/reasons.md``."""
    return (
        "# Reasons\n\n"
        "Every row, study and instance that is not archived has a reason code, and so has every "
        "run\nthat ends early. Here is what is behind each of them. `prefect-dicom explain CODE` "
        "prints the same.\nThis page is written by `python -m prefect_dicom.core.explanations`.\n\n"
        + "\n".join(section(code) for code in REASONS)
    )


if __name__ == "__main__":
    sys.stdout.write(page())
