"""Every fault of an object store has one reaction, and none of them makes *archived* a lie.

Each case is a small pull into a scripted S3 that does one thing wrong. The run ends as named;
nothing is called archived that is not in the bucket, whole and with its manifest last; and when
the fault is gone a rerun archives the rest, asking the PACS for nothing twice that is still there.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import botocore.exceptions
import botocore.session
import pytest
from botocore.parsers import ResponseParserError
from botocore.retries import standard

from prefect_dicom.archive.manifest import decode_manifest
from prefect_dicom.archive.s3 import BucketArchive
from prefect_dicom.archive.s3_connection import RetryPolicy
from prefect_dicom.archive.s3_errors import S3_ERRORS, S3RequestError, classify_error
from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.core.model import Disposition, InstanceState, StudyState, Verdict
from prefect_dicom.core.uids import manifest_key, object_key
from prefect_dicom.testing import tiny_instances
from prefect_dicom.testing.instances import StoredInstance
from tests.support.campaign import subset
from tests.support.s3_server import S3Server
from tests.support.sites import Place, credentials, site_around

pytestmark = pytest.mark.campaign("S3")

ATTEMPTS = 4
IMPATIENT = RetryPolicy(attempts=ATTEMPTS, first_pause_seconds=0.001, read_seconds=0.5)
INSTANCES = 3
SMALL = tuple(tiny_instances(2, instances=INSTANCES))
# Two parts of an upload each.
LARGE = tuple(tiny_instances(1, instances=2, side=2400))
PART_BYTES = 5 * 1024**2
ARCHIVED = "archived"

Script = Callable[[S3Server], object]


def key_of(stored: StoredInstance) -> str:
    return object_key(
        stored.study_instance_uid, stored.series_instance_uid, stored.sop_instance_uid
    )


FIRST = key_of(SMALL[0])


@dataclass(frozen=True)
class Case:
    """What the service does, how the run ends, and how a rerun does."""

    name: str
    script: Script
    ends: str = ARCHIVED
    """``archived``, or the reason code: of the error the run stops with, or of a failed study."""
    one_study_fails: bool = False
    says: str = ""
    """Words of the message that tell a person more than the code."""
    heal: Script = lambda s3: None
    """What a person does before the rerun, besides waiting until it has passed."""
    rerun: str = ARCHIVED
    objects: tuple[StoredInstance, ...] = SMALL
    server: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    loses: bool = False
    """What was stored of unfinished studies is gone, and has to be asked of the PACS again."""

    def __str__(self) -> str:
        return self.name


def always(operation: str, status: int, code: str = "", **more) -> Script:
    return lambda s3: s3.fail(operation, status=status, code=code, times=None, **more)


def passing(operation: str, status: int, code: str = "", **more) -> Script:
    more = {"times": ATTEMPTS - 1, **more}
    return lambda s3: s3.fail(operation, status=status, code=code, **more)


def all_of(*scripts: Script) -> Script:
    return lambda s3: [script(s3) for script in scripts]


def expire(s3: S3Server) -> None:
    s3.meanwhile("PutObject", lambda: s3.expire(s3.access_key), skip=2)


def differ_in_time(s3: S3Server) -> None:
    def jump() -> None:
        s3.clock_offset_seconds = 3600

    s3.meanwhile("PutObject", jump, skip=2)


def agree_in_time(s3: S3Server) -> None:
    s3.clock_offset_seconds = 0


def lose_the_bucket(s3: S3Server) -> None:
    """When the first study is in it but for its manifest."""
    s3.meanwhile("PutObject", s3.remove_bucket, skip=INSTANCES)


PASSING = [
    Case(f"{name} for a moment", passing("PutObject", status, code))
    for name, status, code in (
        ("500", 500, "InternalError"),
        ("502 of a proxy", 502, ""),
        ("503 slow down", 503, "SlowDown"),
        ("503 of a proxy", 503, ""),
        ("429", 429, "TooManyRequests"),
    )
]
LASTING = [
    Case(f"{name} for long", always("PutObject", status, code), "archive-unavailable")
    for name, status, code in (
        ("500", 500, "InternalError"),
        ("502 of a proxy", 502, ""),
        ("503 slow down", 503, "SlowDown"),
        ("429", 429, "TooManyRequests"),
    )
]
CONNECTION = [
    Case("reset before it was stored", lambda s3: s3.reset("PutObject", times=2)),
    Case("reset within the body", lambda s3: s3.reset("PutObject", times=2, after_bytes=100)),
    Case("reset after it was stored", lambda s3: s3.reset("PutObject", committed=True)),
    Case(
        "reset after the manifest was stored",
        lambda s3: s3.reset("PutObject", committed=True, skip=INSTANCES),
    ),
    Case("reset for long", lambda s3: s3.reset("PutObject", times=None), "archive-unavailable"),
    Case("silent before it was stored", lambda s3: s3.stall("PutObject")),
    Case("silent after it was stored", lambda s3: s3.stall("PutObject", committed=True)),
    Case("silent for long", lambda s3: s3.stall("PutObject", times=None), "archive-unavailable"),
]
BELIEF = [
    Case(
        "another checksum is told, the bytes are right",
        lambda s3: s3.alter("PutObject", headers={"x-amz-checksum-sha256": "A" * 43 + "="}),
    ),
    Case(
        "another checksum is told, the bytes are wrong",
        lambda s3: s3.damage("PutObject"),
        "archive-conflict",
        one_study_fails=True,
        rerun="archive-conflict",
    ),
    Case(
        "another checksum is told once, and the bytes are wrong",
        lambda s3: s3.damage("PutObject"),
        "archive-conflict",
        one_study_fails=True,
        rerun="archive-conflict",
        server={"ignore_checksums": True},
    ),
    Case("bytes changed on the way", passing("PutObject", 400, "BadDigest", times=1)),
    Case(
        "bytes changed on the way, always",
        always("PutObject", 400, "XAmzContentSHA256Mismatch"),
        "archive-checksum",
    ),
    Case(
        "412, the same is there",
        passing("PutObject", 412, "PreconditionFailed", times=1, committed=True),
    ),
    Case(
        "412, something else is there",
        lambda s3: s3.put(FIRST, b"somebody else's"),
        "archive-conflict",
        one_study_fails=True,
        rerun="archive-conflict",
    ),
    Case("no ETag", lambda s3: s3.alter("PutObject", without=("ETag",), times=None)),
    Case(
        "not shown yet",
        all_of(
            lambda s3: s3.alter("PutObject", without=("ETag",)),
            # One HEAD when the run opens, and one for each study's manifest.
            lambda s3: s3.fail("HeadObject", status=404, code="", times=2, skip=3),
        ),
    ),
    Case(
        "never shown",
        all_of(
            lambda s3: s3.alter("PutObject", without=("ETag",)),
            lambda s3: s3.fail("HeadObject", status=404, code="", times=None, skip=3),
        ),
        "archive-unavailable",
    ),
    Case(
        "no S3 service, but a page",
        lambda s3: s3.reply("PutObject", b"<html><body>Please log in", times=None),
        "archive-unavailable",
    ),
    Case("versions", lambda s3: None, server={"versioned": True}),
]
PERMISSION = [
    Case(
        "credentials expire",
        expire,
        "archive-refused",
        says="ExpiredToken",
        heal=lambda s3: s3.add_user(s3.access_key, s3.secret_key),
    ),
    Case(
        "403",
        lambda s3: s3.fail("PutObject", status=403, code="AccessDenied", times=None, skip=2),
        "archive-refused",
        says="HTTP 403 AccessDenied",
    ),
    Case(
        "the clocks differ",
        differ_in_time,
        "archive-refused",
        says="the clocks of this host and the service differ",
        heal=agree_in_time,
    ),
    Case(
        "the KMS key is disabled",
        always("PutObject", 400, "KMS.DisabledException"),
        "archive-refused",
        says="KMS.DisabledException",
        settings={"encryption": "aws:kms", "kms_key_id": "the-key"},
    ),
    Case(
        "the KMS key is denied",
        always("PutObject", 403, "AccessDenied"),
        "archive-refused",
        settings={"encryption": "aws:kms", "kms_key_id": "the-key"},
    ),
    Case("full", always("PutObject", 403, "QuotaExceeded"), "archive-full"),
    Case(
        "the bucket is gone from the start",
        lambda s3: s3.remove_bucket(),
        "archive-missing",
        heal=lambda s3: s3.make_bucket("archive"),
    ),
    Case(
        "the bucket is gone in the middle",
        lose_the_bucket,
        "archive-missing",
        heal=lambda s3: s3.make_bucket("archive"),
        loses=True,
    ),
]
MULTIPART = [
    Case(name, script, ends, objects=LARGE, settings={"part_bytes": PART_BYTES}, **more)
    for name, script, ends, more in (
        ("a part fails for a moment", passing("UploadPart", 503, "SlowDown"), ARCHIVED, {}),
        ("a part is reset", lambda s3: s3.reset("UploadPart", after_bytes=100), ARCHIVED, {}),
        (
            "a part fails for long",
            always("UploadPart", 503, "SlowDown"),
            "archive-unavailable",
            {},
        ),
        (
            "a part is stored with other bytes",
            lambda s3: s3.alter(
                "UploadPart", headers={"x-amz-checksum-sha256": "A" * 43 + "="}, times=None
            ),
            "archive-checksum",
            {},
        ),
        (
            "a completion says 200 and holds an error",
            passing("CompleteMultipartUpload", 200, "InternalError"),
            ARCHIVED,
            {},
        ),
        (
            "a completion says 200 and holds an error for long",
            always("CompleteMultipartUpload", 200, "InternalError"),
            "archive-unavailable",
            {},
        ),
        (
            "the answer to a completion is lost",
            lambda s3: s3.reset("CompleteMultipartUpload", committed=True),
            ARCHIVED,
            {},
        ),
        (
            "a part and the abort fail",
            all_of(
                always("UploadPart", 403, "AccessDenied"),
                always("AbortMultipartUpload", 403, "AccessDenied"),
            ),
            "archive-refused",
            {},
        ),
    )
]
CASES = PASSING + LASTING + CONNECTION + BELIEF + PERMISSION + MULTIPART
FEW = (
    "503 slow down for long",
    "another checksum is told once, and the bytes are wrong",
    "not shown yet",
    "credentials expire",
    "the bucket is gone in the middle",
    "a part is stored with other bytes",
)


@pytest.mark.parametrize(
    "case", subset(CASES, [case for case in CASES if case.name in FEW]), ids=str
)
def test_a_fault_of_the_archive_stops_fails_or_is_outlived(case, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(BucketArchive.__init__, "__defaults__", (IMPATIENT,))
    with (
        S3Server(**case.server) as s3,
        site_around(
            tmp_path, case.objects, bucket=s3, retrieve="c-get", archive=case.settings
        ) as place,
    ):
        credentials(s3, monkeypatch)
        case.script(s3)
        ends(place, place.pull, case, case.ends)
        holds(place, s3)
        assert case.ends != ARCHIVED or place.asked_for("C-GET") == 1
        lost = stored_of_unfinished_studies(place) if case.loses else 0
        assert bool(lost) is case.loses
        s3.behave()
        case.heal(s3)
        ends(place, place.rerun, case, case.rerun, again=True)
        holds(place, s3)
        sent = Counter(Counter(place.pacs.sent_instances()).values())
        assert sent[2] == lost
        assert sent.total() == len(case.objects)
        if case.rerun == ARCHIVED:
            nothing_is_left_to_do(place, s3)
        for stored in case.objects:
            assert stored.study_instance_uid not in caplog.text


def stored_of_unfinished_studies(place: Place) -> int:
    with place.ledger() as ledger:
        return sum(
            instance.state is InstanceState.STORED
            for study in ledger.studies.of_cohort(1)
            if study.state is not StudyState.ARCHIVED
            for instance in ledger.instances.of_study(study.reference)
        )


def ends(place: Place, run: Callable, case: Case, code: str, *, again: bool = False) -> None:
    """The run ends as named, and every row has the verdict that goes with it."""
    studies = len(place.pacs.holdings.study_instance_uids())
    if code == ARCHIVED:
        assert run().rows == {Verdict.ARCHIVED: studies}
        return
    if case.one_study_fails or again:
        # What is stored of the study stays and counts: its row is partly done.
        assert run().rows == {Verdict.ARCHIVED: studies - 1, Verdict.PARTIAL: 1}
        failed = [s for s in place.studies().values() if s.state is StudyState.FAILED]
        assert [s.reason for s in failed] == [code]
        return
    with pytest.raises(PrefectDicomError) as caught:
        run()
    assert caught.value.code == code
    assert case.says in caught.value.detail
    assert caught.value.reason.advice
    for stored in case.objects:
        assert stored.study_instance_uid not in str(caught.value)
    # Nothing failed for a fault that is not its own: the rest waits for the rerun.
    if place.asked_for():
        rows = place.totals().rows
        assert rows[Verdict.ARCHIVED] + rows[Verdict.PENDING] == rows.total() == studies


def holds(place: Place, s3: S3Server) -> None:
    """What the ledger calls archived is in the bucket: whole, told apart, manifest last."""
    held: dict[str, dict[str, bytes]] = {}
    for stored in place.pacs.holdings:
        held.setdefault(stored.study_instance_uid, {})[key_of(stored)] = stored.encoded()
    writing = ("PutObject", "UploadPart", "CompleteMultipartUpload")
    puts = [seen.key for seen in s3.seen if seen.operation in writing]
    for uid, study in place.studies().items() if place.asked_for() else ():
        if study.state is not StudyState.ARCHIVED:
            continue
        manifest = decode_manifest(s3.body(manifest_key(uid)))
        assert {i.key for i in manifest.instances} == held[uid].keys()
        for instance in manifest.instances:
            stored = s3.objects[instance.key]
            assert stored.sha256 == instance.sha256
            assert stored.size_bytes == instance.size_bytes
            assert stored.version_id == instance.version_id
            assert s3.body(instance.key).endswith(held[uid][instance.key])
        of_study = [key for key in puts if key in held[uid] or key == manifest_key(uid)]
        assert of_study[-1] == manifest_key(uid)
    assert not s3.requests["DeleteObject"]


def nothing_is_left_to_do(place: Place, s3: S3Server) -> None:
    """Once more: nothing is moved, put or deleted, and nothing has stayed behind."""
    before, asked = s3.requests.copy(), place.asked_for("C-GET")
    place.pull()
    assert place.asked_for("C-GET") == asked
    for operation in ("PutObject", "UploadPart", "CreateMultipartUpload", "DeleteObject"):
        assert s3.requests[operation] == before[operation]
    assert place.spooled() == []


# ------------------------------------------------------------------- nothing is without a reaction


def answered(status: int, code: str = "") -> PrefectDicomError:
    """What a caller of the archive gets when the service answers so."""
    error = botocore.exceptions.ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )
    return S3RequestError(classify_error(error)).archive_error()


class Anything(dict):
    """Words for any placeholder of botocore's messages."""

    def __missing__(self, name: str) -> str:
        return "SECRET^NAME"


def errors_of_botocore() -> list[type[Exception]]:
    """Every class of error that botocore has, but for those that hold an answer."""
    found = inspect.getmembers(botocore.exceptions, inspect.isclass)
    return [
        kind
        for _, kind in found
        if kind.__module__ == "botocore.exceptions"
        and issubclass(kind, Exception)
        and not issubclass(kind, Warning | botocore.exceptions.ClientError)
    ]


def test_every_error_of_botocore_means_one_thing():
    known = errors_of_botocore() + [ResponseParserError]
    assert len(known) > 80
    for kind in known:
        error = kind.__new__(kind)
        Exception.__init__(error, "SECRET^NAME")
        found = classify_error(error)
        raised = S3RequestError(found).archive_error()
        assert raised.reason.advice
        assert "SECRET" not in str(raised)
        assert "{" not in str(raised)
        # Whatever lasts is for a person, or a bug; what may pass is tried again.
        assert found.retryable == (found.code == "archive-unavailable")
        if kind is not botocore.exceptions.BotoCoreError:
            assert any(base.__name__ in S3_ERRORS for base in kind.__mro__), kind
    assert S3_ERRORS.keys() <= {kind.__name__ for kind in known}


def test_every_status_means_one_thing():
    expected = {
        301: "archive-refused",
        302: "archive-refused",
        304: "archive-conflict",
        307: "archive-refused",
        308: "archive-refused",
        401: "archive-refused",
        403: "archive-refused",
        404: "archive-object-missing",
        407: "archive-refused",
        408: "archive-unavailable",
        412: "archive-conflict",
        429: "archive-unavailable",
        501: "archive-refused",
        507: "archive-full",
    }
    for status in range(300, 600):
        error = answered(status)
        otherwise = "archive-unavailable" if status >= 500 else "unexpected"
        assert error.code == expected.get(status, otherwise)
        assert str(status) in error.detail


def test_whatever_botocore_itself_would_repeat_is_repeated():
    codes = {
        *standard.TransientRetryableChecker._TRANSIENT_ERROR_CODES,
        *standard.ThrottledRetryableChecker._THROTTLED_ERROR_CODES,
    }
    assert {"SlowDown", "RequestTimeout"} < codes
    for code in codes:
        for status in (400, 403, 429, 503):
            error = answered(status, code)
            assert error.code == "archive-unavailable", code
            assert error.disposition is Disposition.TRANSIENT
    for status in standard.TransientRetryableChecker._TRANSIENT_STATUS_CODES:
        assert answered(status).code == "archive-unavailable"


def test_every_error_that_s3_declares_means_one_thing():
    model = botocore.session.Session().get_service_model("s3")
    expected = {
        "AccessDenied": "archive-refused",
        "EncryptionTypeMismatch": "archive-refused",
        "InvalidObjectState": "archive-refused",
        "InvalidPrefix": "archive-refused",
        "InvalidRequest": "archive-refused",
        "InvalidWriteOffset": "archive-refused",
        "NoSuchBucket": "archive-missing",
        "NoSuchKey": "archive-object-missing",
        "NoSuchUpload": "archive-object-missing",
    }
    # What belongs to requests that an archive never makes.
    elsewhere = (
        "Annotation",
        "BucketAlready",
        "Idempotency",
        "ActiveTier",
        "TooManyParts",
        "UnsupportedMediaType",
    )
    for shape in model.error_shapes:
        if any(word in shape.name for word in elsewhere):
            continue
        status = shape.metadata.get("error", {}).get("httpStatusCode")
        status = status or {"AccessDenied": 403}.get(
            shape.name, 404 if "NoSuch" in shape.name else 400
        )
        assert answered(status, shape.name).code == expected[shape.name]
