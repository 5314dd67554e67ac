"""What an object store and the way to it do to an upload, and what the archive makes of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from prefect_dicom.archive.s3 import BucketArchive
from prefect_dicom.archive.s3_connection import RetryPolicy
from prefect_dicom.config.archive import S3Archive
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import ArchiveConflict, ArchiveError, Interrupted
from prefect_dicom.core.model import Disposition
from prefect_dicom.core.uids import object_key
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.campaign("S3")

PART_BYTES = 5 * 1024**2
KEY = object_key("1.2.3", "1.2.3.4", "1.2.3.4.5")
SMALL = b"one part" * 1000
LARGE = os.urandom(2 * PART_BYTES + 1)
ATTEMPTS = 4
IMPATIENT = RetryPolicy(attempts=ATTEMPTS, first_pause_seconds=0.001, read_seconds=0.5)


def settings_for(s3: S3Server, **changes) -> S3Archive:
    return S3Archive(
        **{
            "bucket": s3.bucket,
            "endpoint": s3.endpoint,
            "access_key_id": s3.access_key,
            "secret_access_key": s3.secret_key,
            "part_bytes": PART_BYTES,
            **changes,
        }
    )


@pytest.fixture
def s3():
    with S3Server() as server:
        yield server


@pytest.fixture
def archive(s3):
    with BucketArchive(settings_for(s3), IMPATIENT) as opened:
        yield opened


@pytest.fixture
def put(archive, tmp_path):
    """Put these bytes as a file that arrived with their hash."""

    def put(data: bytes, key: str = KEY):
        path: Path = tmp_path / "arrived.dcm"
        path.write_bytes(data)
        return archive.put_file(key, path, hashlib.sha256(data).hexdigest(), len(data))

    return put


def code_of(attempt) -> str:
    with pytest.raises(ArchiveError) as caught:
        attempt()
    assert "1.2.3" not in str(caught.value)
    return caught.value.code


# ------------------------------------------------------------------ passing trouble


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (500, "InternalError"),
        (502, ""),
        (503, "SlowDown"),
        (503, ""),
        (504, ""),
        (429, "TooManyRequests"),
        (400, "RequestTimeout"),
        (409, "ConditionalRequestConflict"),
    ],
)
def test_an_answer_that_asks_for_patience_gets_it(s3, put, status, code):
    s3.fail("PutObject", times=2, status=status, code=code)
    stored = put(SMALL)
    assert s3.body(KEY) == SMALL
    assert s3.requests["PutObject"] == 3
    assert not stored.already_there


def test_patience_ends_after_a_number_of_attempts_and_a_rerun_may_help(s3, put):
    s3.fail("PutObject", times=None)
    with pytest.raises(ArchiveError) as caught:
        put(SMALL)
    assert caught.value.code == "archive-unavailable"
    assert caught.value.disposition is Disposition.TRANSIENT
    assert s3.requests["PutObject"] == ATTEMPTS


def test_a_run_that_is_to_stop_does_not_wait_for_another_attempt(s3, archive, put):
    class Pauses(Clock):
        def wait(self, event, seconds):
            archive.stopping = lambda: True
            return False

    archive.clock = Pauses()
    s3.fail("PutObject", times=None)
    with pytest.raises(Interrupted):
        put(SMALL)
    assert s3.requests["PutObject"] == 1


def test_an_object_whose_upload_was_reset_before_it_was_stored_is_sent_again(s3, put):
    s3.reset("PutObject")
    assert not put(SMALL).already_there
    assert s3.body(KEY) == SMALL


def test_an_object_that_was_stored_while_the_answer_was_lost_counts_as_stored(s3, put):
    s3.reset("PutObject", committed=True)
    stored = put(SMALL)
    assert s3.requests["PutObject"] == 2
    assert stored.sha256 == s3.objects[KEY].sha256
    assert not stored.already_there


def test_an_object_that_was_stored_while_the_answer_was_an_error_counts_as_stored(s3, put):
    s3.fail("PutObject", status=500, code="InternalError", committed=True)
    assert not put(SMALL).already_there
    assert s3.body(KEY) == SMALL


@pytest.mark.parametrize("committed", [False, True])
def test_a_service_that_falls_silent_is_left_and_asked_again(s3, put, committed):
    s3.stall("PutObject", committed=committed)
    put(SMALL)
    assert s3.body(KEY) == SMALL
    assert s3.requests["PutObject"] == 2


def test_a_service_that_is_away_is_unavailable(s3, archive, put):
    put(SMALL)
    s3.__exit__(None, None, None)
    assert code_of(lambda: put(SMALL, KEY + "x")) == "archive-unavailable"
    assert code_of(lambda: archive.head(KEY)) == "archive-unavailable"
    assert code_of(lambda: list(archive.keys())) == "archive-unavailable"
    s3.__enter__()


@pytest.mark.parametrize("operation", ["HeadObject", "GetObject", "ListObjectsV2"])
def test_reading_and_listing_are_as_patient_as_writing(s3, archive, put, operation):
    put(SMALL)
    s3.fail(operation, times=2)
    s3.reset(operation)
    assert archive.head(KEY).size_bytes == len(SMALL)
    assert b"".join(archive.read(KEY)) == SMALL
    assert list(archive.keys()) == [(KEY, len(SMALL))]
    assert s3.requests[operation] == 4


def test_an_object_that_breaks_off_while_it_is_read_is_not_taken_for_whole(s3, archive, put):
    put(SMALL)
    s3.truncate("GetObject")
    assert code_of(lambda: b"".join(archive.read(KEY))) == "archive-unavailable"
    assert b"".join(archive.read(KEY)) == SMALL


def test_more_keys_than_one_page_holds_are_all_listed(s3, archive):
    archive.put_bytes("studies/1/0.dcm", b"x")
    one = s3.objects.pop("studies/1/0.dcm")
    s3.objects.update({f"studies/1/{number:04}.dcm": one for number in range(2500)})
    assert list(dict(archive.keys())) == sorted(s3.archived)
    assert s3.requests["ListObjectsV2"] == 3


# ----------------------------------------------------------- credentials and settings


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (403, "RequestTimeTooSkewed"),
        (400, "KMS.DisabledException"),
        (400, "KMS.NotFoundException"),
        (400, "InvalidStorageClass"),
        (301, "PermanentRedirect"),
        (501, "NotImplemented"),
    ],
)
def test_a_refusal_is_not_repeated_and_waits_for_a_person(s3, put, status, code):
    s3.fail("PutObject", status=status, code=code, times=None)
    with pytest.raises(ArchiveError) as caught:
        put(SMALL)
    assert caught.value.code == "archive-refused"
    assert caught.value.disposition is Disposition.OPERATOR
    assert code in str(caught.value)
    assert s3.requests["PutObject"] == 1


def test_a_full_archive_waits_for_a_person(s3, put):
    s3.fail("PutObject", status=403, code="QuotaExceeded")
    assert code_of(lambda: put(SMALL)) == "archive-full"


def test_an_answer_that_nobody_knows_is_called_unexpected_and_not_quoted(s3, put):
    s3.fail("PutObject", status=418, code="the study 1.2.3 of SECRET^NAME")
    with pytest.raises(ArchiveError) as caught:
        put(SMALL)
    assert caught.value.code == "unexpected"
    assert "SECRET" not in str(caught.value)


def test_a_wrong_secret_key_is_refused_by_all_operations(s3, put):
    with BucketArchive(settings_for(s3, secret_access_key="wrong"), IMPATIENT) as stranger:
        assert code_of(lambda: stranger.put_bytes(KEY, SMALL)) == "archive-refused"
        assert code_of(lambda: stranger.head(KEY)) == "archive-refused"
        assert code_of(lambda: list(stranger.keys())) == "archive-refused"


def test_no_credentials_at_all_are_reported(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    settings = settings_for(s3, access_key_id=None, secret_access_key=None)
    with BucketArchive(settings, IMPATIENT) as nobody:
        assert code_of(lambda: nobody.put_bytes(KEY, SMALL)) == "archive-refused"
    with BucketArchive(settings.model_copy(update={"profile": "absent"}), IMPATIENT) as nobody:
        assert code_of(lambda: nobody.put_bytes(KEY, SMALL)) == "archive-refused"


def test_credentials_that_expire_in_the_middle_are_looked_for_again(s3, monkeypatch, tmp_path):
    file = tmp_path / "credentials"

    def provide(access_key: str, secret_key: str, token: str) -> None:
        file.write_text(
            f"[site]\naws_access_key_id={access_key}\naws_secret_access_key={secret_key}\n"
            f"aws_session_token={token}\n"
        )

    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    settings = settings_for(s3, access_key_id=None, secret_access_key=None, profile="site")
    s3.add_user("MORNING", "secret of the morning", "token 1")
    s3.add_user("EVENING", "secret of the evening", "token 2")
    provide("MORNING", "secret of the morning", "token 1")
    with BucketArchive(settings, IMPATIENT) as archive:
        archive.put_bytes(KEY + "1", SMALL)
        s3.expire("MORNING")
        assert code_of(lambda: archive.put_bytes(KEY + "2", SMALL)) == "archive-refused"
        provide("EVENING", "secret of the evening", "token 2")
        archive.put_bytes(KEY + "2", SMALL)
        assert archive.head(KEY + "2").size_bytes == len(SMALL)


def test_a_bucket_that_is_gone_is_missing_and_not_made(s3, put):
    s3.remove_bucket()
    assert code_of(lambda: put(SMALL)) == "archive-missing"


def test_encryption_and_storage_class_are_asked_for_with_every_object(s3, tmp_path):
    settings = settings_for(
        s3, encryption="aws:kms", kms_key_id="the-key", storage_class="STANDARD_IA"
    )
    wanted = {
        "x-amz-server-side-encryption": "aws:kms",
        "x-amz-server-side-encryption-aws-kms-key-id": "the-key",
        "x-amz-storage-class": "STANDARD_IA",
        "content-type": "application/dicom",
        "x-amz-meta-sha256": "",
    }
    with BucketArchive(settings, IMPATIENT) as archive:
        for data in (SMALL, LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            path = tmp_path / sha256
            path.write_bytes(data)
            key = object_key("1", "2", str(len(data)))
            archive.put_file(key, path, sha256, len(data))
            assert s3.objects[key].metadata == {**wanted, "x-amz-meta-sha256": sha256}


# ------------------------------------------------------------- answers not to believe


def test_a_service_that_computed_another_checksum_is_not_believed(s3, put):
    s3.alter("PutObject", headers={"x-amz-checksum-sha256": "A" * 43 + "="})
    assert code_of(lambda: put(SMALL)) == "archive-checksum"


def test_bytes_that_were_changed_on_the_way_are_not_the_disks_fault(s3, put):
    s3.fail("PutObject", status=400, code="XAmzContentSHA256Mismatch")
    assert code_of(lambda: put(SMALL)) == "archive-checksum"
    s3.fail("PutObject", status=400, code="BadDigest")
    assert code_of(lambda: put(SMALL)) == "archive-checksum"


def test_an_answer_without_etag_is_believed_after_a_look(s3, put):
    s3.alter("PutObject", without=("ETag",))
    put(SMALL)
    assert s3.requests["HeadObject"] == 1


def test_an_answer_of_something_that_is_no_object_store_is_not_believed(s3, put):
    s3.fail("PutObject", status=200, code="", times=None)
    assert code_of(lambda: put(SMALL)) == "archive-unavailable"
    assert KEY not in s3.objects


def test_an_object_that_is_there_and_not_yet_shown_is_waited_for(s3, put):
    put(SMALL)
    s3.fail("HeadObject", status=404, code="", times=2)
    assert put(SMALL).already_there


def test_without_any_recorded_hash_the_bytes_themselves_are_compared(put):
    with (
        S3Server(ignore_checksums=True) as forgetful,
        BucketArchive(settings_for(forgetful), IMPATIENT) as archive,
    ):
        archive.put_bytes(KEY, SMALL)
        forgetful.objects[KEY].metadata.clear()
        assert archive.head(KEY).sha256 is None
        assert archive.put_bytes(KEY, SMALL).already_there
        assert forgetful.requests["GetObject"] == 1
        with pytest.raises(ArchiveConflict):
            archive.put_bytes(KEY, SMALL[::-1])


def test_a_hash_that_is_only_recorded_is_no_proof_of_the_bytes():
    with S3Server() as strict, BucketArchive(settings_for(strict), IMPATIENT) as archive:
        archive.put_bytes(KEY, SMALL)
        assert archive.head(KEY).sha256_by_store
        assert archive.put_bytes(KEY, SMALL).already_there
        assert strict.requests["GetObject"] == 0
    with (
        S3Server(ignore_checksums=True) as lax,
        BucketArchive(settings_for(lax), IMPATIENT) as archive,
    ):
        archive.put_bytes(KEY, SMALL)
        facts = archive.head(KEY)
        assert facts.sha256 == hashlib.sha256(SMALL).hexdigest()
        assert not facts.sha256_by_store
        assert archive.put_bytes(KEY, SMALL).already_there
        assert lax.requests["GetObject"] == 1
        lax.put(KEY, SMALL[::-1], lax.objects[KEY].metadata)
        assert archive.head(KEY).sha256 == facts.sha256
        with pytest.raises(ArchiveConflict):
            archive.put_bytes(KEY, SMALL)


def test_a_bucket_with_versions_names_the_version_that_holds_the_bytes():
    with (
        S3Server(versioned=True) as s3,
        BucketArchive(settings_for(s3), IMPATIENT) as archive,
    ):
        first = archive.put_bytes(KEY, SMALL)
        assert first.version_id == s3.objects[KEY].version_id
        assert archive.put_bytes(KEY, SMALL).version_id == first.version_id
        assert archive.head(KEY).version_id == first.version_id


# ------------------------------------------------------------------ multipart uploads


def test_a_part_that_fails_for_a_moment_is_sent_again_alone(s3, put):
    s3.fail("UploadPart", skip=1, times=1)
    s3.reset("UploadPart", skip=2, times=1)
    put(LARGE)
    assert s3.body(KEY) == LARGE
    assert s3.requests["UploadPart"] == 5
    assert s3.requests["CreateMultipartUpload"] == 1


@pytest.mark.parametrize(
    ("operation", "status", "code", "reported"),
    [
        ("UploadPart", 403, "AccessDenied", "archive-refused"),
        ("UploadPart", 503, "SlowDown", "archive-unavailable"),
        ("UploadPart", 400, "XAmzContentSHA256Mismatch", "archive-checksum"),
        ("CompleteMultipartUpload", 403, "AccessDenied", "archive-refused"),
        ("CompleteMultipartUpload", 200, "InternalError", "archive-unavailable"),
    ],
)
def test_an_upload_that_cannot_be_finished_is_aborted(s3, put, operation, status, code, reported):
    s3.fail(operation, status=status, code=code, times=None)
    assert code_of(lambda: put(LARGE)) == reported
    assert s3.archived == {}
    assert s3.uploads == {}


def test_a_part_without_etag_is_not_believed(s3, put):
    s3.alter("UploadPart", without=("ETag",))
    assert code_of(lambda: put(LARGE)) == "archive-unavailable"
    assert s3.uploads == {}


def test_an_upload_that_cannot_even_be_aborted_ends_with_its_own_error(s3, put, caplog):
    s3.fail("UploadPart", status=403, code="AccessDenied", times=None)
    s3.fail("AbortMultipartUpload", status=403, code="AccessDenied")
    assert code_of(lambda: put(LARGE)) == "archive-refused"
    assert "lifecycle rule" in caplog.text
    assert "1.2.3" not in caplog.text


def test_a_completion_that_says_200_and_holds_an_error_is_asked_for_again(s3, put):
    s3.fail("CompleteMultipartUpload", status=200, code="InternalError")
    put(LARGE)
    assert s3.body(KEY) == LARGE
    assert s3.requests["CompleteMultipartUpload"] == 2


@pytest.mark.parametrize("conditional", [True, False])
def test_a_completion_whose_answer_was_lost_counts_by_what_is_there(conditional, tmp_path):
    with (
        S3Server(ignore_completion_condition=not conditional) as s3,
        BucketArchive(settings_for(s3), IMPATIENT) as archive,
    ):
        s3.reset("CompleteMultipartUpload", committed=True)
        path = tmp_path / "arrived.dcm"
        path.write_bytes(LARGE)
        sha256 = hashlib.sha256(LARGE).hexdigest()
        assert not archive.put_file(KEY, path, sha256, len(LARGE)).already_there
        assert s3.body(KEY) == LARGE
        assert s3.uploads == {}


def test_an_upload_in_parts_over_another_object_is_a_conflict_even_without_conditions(tmp_path):
    with (
        S3Server(ignore_completion_condition=True) as s3,
        BucketArchive(settings_for(s3), IMPATIENT) as archive,
    ):
        archive.put_bytes(KEY, SMALL)
        path = tmp_path / "arrived.dcm"
        path.write_bytes(LARGE)
        with pytest.raises(ArchiveConflict):
            archive.put_file(KEY, path, hashlib.sha256(LARGE).hexdigest(), len(LARGE))
        assert s3.body(KEY) == SMALL
        assert s3.requests["CreateMultipartUpload"] == 0


def test_an_object_that_appears_while_its_parts_are_sent_is_not_replaced(s3, archive, tmp_path):
    path = tmp_path / "arrived.dcm"
    path.write_bytes(LARGE)
    with BucketArchive(settings_for(s3, part_bytes=64 * 1024**2), IMPATIENT) as other:
        # Not shown to the look before the upload, so that only its completion can tell.
        other.put_bytes(KEY, SMALL)
        s3.fail("HeadObject", status=404, code="")
        with pytest.raises(ArchiveConflict):
            archive.put_file(KEY, path, hashlib.sha256(LARGE).hexdigest(), len(LARGE))
    assert s3.body(KEY) == SMALL
    assert s3.uploads == {}


# --------------------------------------------------------------------- the check-up


@pytest.mark.parametrize(
    ("service", "faulty", "required"),
    [
        ({"ignore_conditions": True}, "nothing is overwritten (If-None-Match)", True),
        ({"ignore_payload_hash": True}, "other bytes than signed are refused", True),
        ({"ignore_part_hash": True}, "other bytes than signed are refused in parts", True),
        ({"ignore_checksums": True}, "other bytes than in ChecksumSHA256 are refused", False),
        ({"ignore_checksums": True}, "HEAD returns the service's own checksum", False),
        (
            {"ignore_completion_condition": True},
            "nothing is overwritten by a multipart upload",
            False,
        ),
        ({"public": True}, "strangers cannot read objects", True),
    ],
)
def test_a_check_up_says_which_proof_a_service_cannot_give(service, faulty, required):
    with S3Server(**service) as s3, BucketArchive(settings_for(s3), IMPATIENT) as archive:
        checks = {check.name: check for check in archive.check()}
        assert not checks[faulty].ok
        assert checks[faulty].required is required
        assert checks[faulty].advice
        assert s3.objects == {}
        assert s3.uploads == {}


def test_a_check_up_of_a_strict_service_finds_nothing_wanting(archive):
    assert [check for check in archive.check() if not check.ok] == []


def test_a_check_up_that_may_not_delete_names_what_it_leaves(s3, archive):
    s3.fail("DeleteObject", status=403, code="AccessDenied", times=None)
    *others, last = archive.check()
    assert all(check.ok for check in others)
    assert not last.required
    assert ", ".join(sorted(s3.objects)) == last.advice.rpartition(": ")[2]


def test_a_check_up_ends_where_nothing_can_be_written(s3, archive):
    s3.fail("PutProbe", status=403, code="AccessDenied", times=None)
    assert [check.ok for check in archive.check()] == [True, False]
    s3.remove_bucket()
    (missing,) = archive.check()
    assert not missing.ok
    assert missing.advice.startswith("archive-missing")
