"""Reasons of our own side: configuration, receiver, spool, archive and ledger."""

from __future__ import annotations

from functools import partial

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons.reason import Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition

_NOT_OF_A_ROW = "It is no reason of a row: repeat the command once the cause is removed."

# No other node helps where our own side fails.
_ours = partial(Reason, failover=False)

SITE = (
    _ours(
        "configuration-faulty",
        OPERATOR,
        Scope.SITE,
        meaning="The site's configuration cannot be used.",
        advice="Correct the keys named in the message.",
        explanation="""
Nothing was sent. All faults of the file are listed at once, each with its key, what was found, and
what is expected. `configs/full.yaml` names every key.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "cohort-faulty",
        OPERATOR,
        Scope.SITE,
        meaning="The cohort file cannot be used.",
        advice="Correct the lines named in the message.",
        explanation="""
Nothing was sent. All faulty lines are listed at once, by line and column. Wildcards in identifiers
are refused, because they select other patients too.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "prefect-unavailable",
        OPERATOR,
        Scope.SITE,
        meaning="Prefect's server does not answer, or cannot be started.",
        advice="Start the server that PREFECT_API_URL names, or unset it for an embedded one.",
        explanation="""
Every pull is a Prefect flow. Its server is the one that `PREFECT_API_URL` or Prefect's profile
names (`prefect config view` shows which), else the one that `prefect-dicom up` runs for the site. A
command without either needs none, or embeds one: a process of this run alone. The server is asked
before any PACS is.

- *A server elsewhere* does not answer if it is down, if the address lacks `/api`, or if a proxy
  stands in between: `HTTPS_PROXY` and `HTTP_PROXY` hold for it, unless `NO_PROXY` names its host.
  Hosts on loopback are never asked through a proxy.
- *Without a server, and with an embedded one*, Prefect needs a home that can be written:
  `PREFECT_HOME`, else `~/.prefect`, else `prefect-home/` beside the ledger. `recorder.log` or
  `embedded-server.log` there has its last lines. Common causes are a home on a network file system
  without locks, and the database of a newer Prefect: let `PREFECT_HOME` name another folder.

`prefect-dicom doctor` tries the same.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "receiver-taken",
        OPERATOR,
        Scope.SITE,
        meaning="Another program or run uses the receiver's port or AE title.",
        advice="Stop the other program, or give this site another port and AE title.",
        explanation="""
The port or the AE title of the receiver is in use: by a receiver of another spool, by another
storage SCP (Orthanc and dcmqrscp listen on 4242 and 11112 in their examples), or by runs with other
settings of the same spool. `ss -ltnp` names the program; `prefect-dicom receiver status` lists the
runs that use ours.""",
    ),
    _ours(
        "receiver-unreachable",
        TRANSIENT,
        Scope.SITE,
        meaning="The managed receiver could not be started or reached.",
        advice="Read its log in the spool directory.",
        explanation="""
The receiver is a process of its own, started by the first run that needs it. It did not start, or
ended during a call. `receiver.log` in the spool directory has its last lines; common causes are a
full disk and a killed process (out of memory).""",
    ),
    _ours(
        "spool-full",
        OPERATOR,
        Scope.SITE,
        meaning="The disk reserve of the spool is reached.",
        advice="Free space on the spool's disk, or point `spool.path` to a larger one.",
        explanation="""
`spool.reserve_bytes` of free space are never used, so that the disk does not fill up. The
received instances were uploaded first to make room; it was not enough for the next one. Arriving
instances are refused with A700, which the PACS reports as its failure.""",
    ),
    _ours(
        "spool-unusable",
        OPERATOR,
        Scope.SITE,
        meaning="The spool directory cannot be created or written.",
        advice="Check `spool.path`: a directory of its own that this user may write.",
        explanation="""
The directory cannot be created, or is on a file system that is read-only, or lacks locks,
`fsync` or renaming.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "spool-unsafe",
        OPERATOR,
        Scope.SITE,
        meaning="The spool directory is open to other users, or is a symbolic link.",
        advice="Give it mode 0700 and a real path.",
        explanation="""
Received instances hold patient data: the directory must belong to this user alone. The target of a
symbolic link could be changed.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "archive-conflict",
        OPERATOR,
        Scope.STUDY,
        meaning="The archive holds other bytes under the key of an instance.",
        advice="Compare the archived object with the one on the PACS; nothing was overwritten.",
        explanation="""
An object or a manifest of this study is in the archive with other bytes than those that arrived. An
earlier pull received other content: the PACS has corrected the study since, or another PACS holds
another version under the same UIDs. The archive is never overwritten: decide which version the
research is to use, and pull the other under another prefix.""",
    ),
    _ours(
        "archive-refused",
        OPERATOR,
        Scope.SITE,
        meaning="The archive refused the request: credentials, permission or settings.",
        advice="Check credentials, bucket policy and encryption settings; `prefect-dicom doctor`.",
        explanation="""
401, 403, or a setting the service does not accept. The detail has the service's own code:
`AccessDenied` (bucket policy lacks GetObject, PutObject or ListBucket for the prefix),
`SignatureDoesNotMatch` (secret or region), `RequestTimeTooSkewed` (the clock of this host),
`ExpiredToken`, `KMS.…` (the key of `archive.kms_key_id`), `SecondLevelDomainForbidden` (set
`archive.addressing: virtual`). A certificate that does not verify ends here too, and so does a
proxy that wants a password (407): put the host of the service into `NO_PROXY`, or user and password
into `HTTPS_PROXY`. A service on this host itself is never asked through a proxy.""",
        refuses_wrong_hash=True,
    ),
    _ours(
        "archive-overwrites",
        OPERATOR,
        Scope.SITE,
        meaning="The archive's service does not keep to If-None-Match: it would overwrite objects.",
        advice=(
            "Use a service, or a version of it, that keeps to `If-None-Match: *`, or a directory; "
            "`prefect-dicom doctor` shows whether it does."
        ),
        explanation="""
Before a run puts anything, it puts the small object `probes/if-none-match` on condition that there
is none. A service that keeps to the condition holds it once and refuses it from then on (412, or
304). This one has replaced it, or does not know the header (501). What is archived could be
replaced there by another run, another ledger or a study that has grown, so nothing is put at all.
Ceph, MinIO, SeaweedFS and AWS keep to the condition in their current versions. Bucket policies and
object lock do not help: they refuse the second put in another way, or keep both versions.""",
    ),
    _ours(
        "archive-listing-faulty",
        OPERATOR,
        Scope.SITE,
        meaning="The archive's service does not list all of its objects.",
        advice="Use another version of the service, or copy the bucket to one that lists it whole.",
        explanation="""
A listing of more than a page (most often 1,000 keys) says that there is more, and gives no token
to go on with. What comes after its last key was asked for in two other ways (`StartAfter`, and
`Marker` of the first version of the listing), and was not listed either. `prefect-dicom verify` and
`prefect-dicom rebuild-ledger` would take what is not listed for missing, so they stop.""",
    ),
    _ours(
        "archive-missing",
        OPERATOR,
        Scope.SITE,
        meaning="The bucket or directory of the archive does not exist.",
        advice="Create it, or correct `archive`.",
        explanation="""
`NoSuchBucket`, or no such directory. Neither is created by a run, because a mistyped name would
become an archive.""",
    ),
    _ours(
        "archive-unavailable",
        TRANSIENT,
        Scope.SITE,
        meaning="The archive did not answer, or answered that it is overloaded.",
        advice="Rerun later.",
        explanation="""
No answer, 503 SlowDown, 500, or a broken connection, after several retries with growing pauses
(exponential backoff). Received instances wait in the spool. If it persists, lower
`archive.connections`.""",
    ),
    _ours(
        "archive-checksum",
        TRANSIENT,
        Scope.SITE,
        meaning="The bytes at the archive are not those that arrived.",
        advice="They are sent again; check network and disk if this repeats.",
        explanation="""
The store compared the bytes with their SHA-256 and refused them, or the bytes read back do not have
it. A single case points to the network (proxies, network cards that compute checksums); repeated
ones to a disk or memory, here or at the store.""",
        refuses_wrong_hash=True,
    ),
    _ours(
        "archive-full",
        OPERATOR,
        Scope.SITE,
        meaning="The disk or the quota of the archive is full.",
        advice="Free or add space at the archive, then rerun.",
        explanation="""
`QuotaExceeded`, 507, or `ENOSPC` and `EDQUOT` of a directory. Received instances wait in the
spool.""",
    ),
    _ours(
        "manifest-unreadable",
        OPERATOR,
        Scope.STUDY,
        meaning="A study's manifest in the archive cannot be read.",
        advice=(
            "Restore it from a version; if this software is older than the manifest, upgrade it."
        ),
        explanation="""
The object under the study's manifest key is no valid manifest: damaged, or written by a later
version in a format that this one cannot read. Nothing is written over it. With versioning on,
restore the version before.""",
    ),
    _ours(
        "archive-object-missing",
        OPERATOR,
        Scope.STUDY,
        meaning="An object named by a manifest is not in the archive.",
        advice=(
            "Somebody removed it; restore it from a version or pull the study into a new prefix."
        ),
        explanation="""
The manifest proves that the object was there with its hash; now it is not. Lifecycle rules that
expire objects, clean-up scripts and people are the usual causes; the bucket's access log or its
versions say which. `prefect-dicom verify` finds all of them.""",
    ),
    _ours(
        "ledger-unavailable",
        OPERATOR,
        Scope.SITE,
        meaning="The ledger cannot be opened, read or written.",
        advice="Check the path or URL of `ledger`, its permissions and its disk.",
        explanation="""
The detail has SQLite's or PostgreSQL's own name for the error: `SQLITE_READONLY`, `SQLITE_FULL`,
`SQLITE_CANTOPEN`; `28P01` (password), `3D000` (no such database), `42501` (permission).
`SQLITE_PROTOCOL` ("locking protocol") and `SQLITE_IOERR_LOCK` are those of a network file system: a
SQLite ledger must lie on a local disk, not on NFS or SMB, and several hosts share one in
PostgreSQL. `prefect-dicom rebuild-ledger`
restores a lost one.""",
    ),
    _ours(
        "ledger-busy",
        TRANSIENT,
        Scope.SITE,
        meaning="Another program kept the ledger locked, or the connection to its server broke.",
        advice="Rerun; close what else has the ledger open, such as a database browser.",
        explanation="""
SQLite lets one program write at a time (`SQLITE_BUSY`, `SQLITE_LOCKED`): another one has locked the
file for a minute and a half, most often a browser for databases with an open transaction, or a
backup program. With PostgreSQL it is a server restart, a broken connection, or a deadlock
(`57P01`, `08006`, `40P01`).""",
    ),
    _ours(
        "ledger-damaged",
        OPERATOR,
        Scope.SITE,
        meaning="The ledger's database is damaged.",
        advice=(
            "Put a copy in its place, without the -wal and -shm files beside it, or make a new "
            "one with `prefect-dicom rebuild-ledger`; what is archived is found again."
        ),
        explanation="""
`SQLITE_CORRUPT` or `SQLITE_NOTADB`: a disk that fails, a file copied while it was written, or one
on NFS or SMB, where SQLite's locks do not hold. The archive's manifests have everything that
is in the ledger, except the cohorts themselves: pull their files again.""",
    ),
    _ours(
        "ledger-too-new",
        OPERATOR,
        Scope.SITE,
        meaning="The ledger was written by a newer version of this software.",
        advice="Upgrade prefect-dicom.",
        explanation="""
A newer version has migrated the ledger's tables. An older one cannot read them, so it writes
nothing.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "ledger-too-old",
        OPERATOR,
        Scope.SITE,
        meaning="The ledger was made before the first release of this software.",
        advice="Give `ledger` a new path or URL, run `prefect-dicom rebuild-ledger`, and pull the "
        "cohorts again.",
        explanation="""
Before the first release the names of the ledger's tables changed, and such a ledger cannot be
migrated. Nothing is written to it. `prefect-dicom rebuild-ledger` fills a new ledger from the
archive's manifests, and a pull of the same cohort files then requests only what is missing.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "ledger-unsafe",
        OPERATOR,
        Scope.SITE,
        meaning="The ledger's file is open to other users.",
        advice="Give it mode 0600: it holds patient identifiers.",
        explanation="""
The file holds PatientIDs and accession numbers. It is created with mode 0600; something has changed
it, most often copying or a `chmod -R`.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "cohort-name-taken",
        OPERATOR,
        Scope.SITE,
        meaning="Another cohort has this name already.",
        advice="Choose another name.",
        explanation="""
Names of cohorts are unique in a ledger. The same file for the same node is the same cohort,
whatever it is called, and needs no new name.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "cohort-unknown",
        OPERATOR,
        Scope.SITE,
        meaning="The ledger has no cohort of this name or number.",
        advice="Check the name, and whether this is the right ledger.",
        explanation="""
`prefect-dicom status` lists the cohorts of the ledger that the site file names. A relative path of
`ledger` is relative to the site file's folder; the environment variable `PREFECT_DICOM_LEDGER_URL`
takes its place.""",
        rerun=_NOT_OF_A_ROW,
    ),
    _ours(
        "unexpected",
        TRANSIENT,
        Scope.SITE,
        meaning="An error without a reason code of its own occurred.",
        advice="Rerun; report it with the traceback from the local log.",
        explanation="""
The type of the error is in the message and its traceback is in the local log, both without values,
which may be patients'. Archived studies are not affected. If it repeats, please report it with
these lines.""",
    ),
)
