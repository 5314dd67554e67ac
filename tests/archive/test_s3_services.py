"""Services that speak S3 by half: what they refuse, ignore or want, and what becomes of a pull.

What the promise rests on is refused by name, and before anything is put: a service that does not
keep to If-None-Match. What is not needed is left out: checksum headers, wherever they are. The
doctor says the same of a service as a run does.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prefect_dicom.archive.s3 import BucketArchive
from prefect_dicom.archive.s3_connection import RetryPolicy
from prefect_dicom.config.archive import S3Archive
from prefect_dicom.core.errors import ArchiveConflict, ArchiveError, PrefectDicomError
from prefect_dicom.core.model import Disposition, Verdict
from prefect_dicom.core.uids import manifest_key, object_key
from prefect_dicom.operations.doctor import examine
from prefect_dicom.testing import tiny_instances
from tests.support.campaign import subset
from tests.support.s3_server import S3Server
from tests.support.sites import Place, credentials, site_around

pytestmark = pytest.mark.campaign("S3")

PART_BYTES = 5 * 1024**2
KEY = object_key("1.2.3", "1.2.3.4", "1.2.3.4.5")
SMALL = b"one part" * 1000
LARGE = os.urandom(2 * PART_BYTES + 1)
IMPATIENT = RetryPolicy(attempts=4, first_pause_seconds=0.001, read_seconds=5)
OBJECTS = tuple(tiny_instances(1, instances=2))

Script = Callable[[S3Server], object]


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


def archive_in(s3: S3Server, **changes) -> BucketArchive:
    settings = {
        "bucket": s3.bucket,
        "endpoint": s3.endpoint,
        "access_key_id": s3.access_key,
        "secret_access_key": s3.secret_key,
        "part_bytes": PART_BYTES,
        **changes,
    }
    return BucketArchive(S3Archive(**settings), IMPATIENT)


def put(archive: BucketArchive, data: bytes, folder) -> bool:
    """Put bytes as a file that arrived with their hash; whether they were there."""
    path = folder / "arrived.dcm"
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    return archive.put_file(KEY, path, sha256, len(data)).already_there


def pulled(tmp_path, monkeypatch, s3: S3Server, **parts):
    """A site whose archive is the service, for a pull by C-GET."""
    credentials(s3, monkeypatch)
    monkeypatch.setattr(BucketArchive.__init__, "__defaults__", (IMPATIENT,))
    return site_around(tmp_path, OBJECTS, bucket=s3, retrieve="c-get", **parts)


def examined(place: Place) -> dict[str, tuple[bool, str]]:
    """What the doctor finds of the archive, by check: whether it is no fault, and the advice."""
    return {f.check: (f.ok, f.advice) for f in examine(place.site) if f.part == "archive"}


# ------------------------------------------------------------- conditions that are not kept

CONDITION = "nothing is overwritten (If-None-Match)"


@dataclass(frozen=True)
class Overwriting:
    name: str
    server: dict = field(default_factory=dict)
    script: Script = lambda s3: None
    says: str = "replaced the first"

    def __str__(self) -> str:
        return self.name


def without_conditions(status: int, code: str) -> Script:
    return lambda s3: s3.refuse("if-none-match", status=status, code=code)


OVERWRITING = [
    Overwriting("ignored", {"ignore_conditions": True}),
    Overwriting("ignored, with versions", {"ignore_conditions": True, "versioned": True}),
    *(
        Overwriting(
            f"{status} {code}", script=without_conditions(status, code), says="no If-None-Match"
        )
        for status, code in (
            (501, "NotImplemented"),
            (501, ""),
            (400, "InvalidArgument"),
            (400, "NotImplemented"),
            (405, "MethodNotAllowed"),
        )
    ),
]


@pytest.mark.parametrize("case", subset(OVERWRITING, OVERWRITING[:1] + OVERWRITING[2:4]), ids=str)
def test_a_run_over_a_store_that_would_overwrite_ends_before_anything_is_asked_for(
    case, tmp_path, monkeypatch
):
    with S3Server(**case.server) as s3, pulled(tmp_path, monkeypatch, s3) as place:
        case.script(s3)
        theirs = object_key(
            OBJECTS[0].study_instance_uid,
            OBJECTS[0].series_instance_uid,
            OBJECTS[0].sop_instance_uid,
        )
        manifest = manifest_key(OBJECTS[0].study_instance_uid)
        s3.put(theirs, b"other bytes")
        s3.put(manifest, b"the first manifest")
        with pytest.raises(ArchiveError) as caught:
            place.pull()
        assert caught.value.code == "archive-overwrites"
        assert caught.value.disposition is Disposition.OPERATOR
        assert case.says in caught.value.detail
        assert place.asked_for() == 0
        assert s3.body(theirs) == b"other bytes"
        assert s3.body(manifest) == b"the first manifest"
        found = examined(place)
        assert [check for check, (ok, _) in found.items() if not ok] == [CONDITION]
        assert case.says in found[CONDITION][1] and "archive-overwrites" in found[CONDITION][1]
        assert s3.archived.keys() == {theirs, manifest}


def test_a_store_that_loses_its_condition_between_two_pulls_is_noticed(tmp_path, monkeypatch, s3):
    with pulled(tmp_path, monkeypatch, s3) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        held = {key: s3.body(key) for key in s3.archived}
        s3.ignore_conditions = True
        (tmp_path / "ledger.sqlite").unlink()
        place.change(ledger={"path": "another.sqlite"})
        place.pacs.holdings.add(list(tiny_instances(1, instances=3))[-1])
        with pytest.raises(ArchiveError) as caught:
            place.pull()
        assert caught.value.code == "archive-overwrites"
        assert {key: s3.body(key) for key in s3.archived} == held


def test_every_put_is_kept_from_a_store_that_overwrites(tmp_path):
    with S3Server(ignore_conditions=True) as s3, archive_in(s3) as archive:
        for data in (SMALL, LARGE):
            with pytest.raises(ArchiveError) as caught:
                put(archive, data, tmp_path)
            assert caught.value.code == "archive-overwrites"
        assert s3.archived == {} and s3.uploads == {}


def test_the_condition_is_tried_once_for_a_run_and_not_where_nothing_is_left_to_do(
    tmp_path, monkeypatch, s3
):
    with pulled(tmp_path, monkeypatch, s3) as place:
        place.pull()
        assert s3.requests["PutProbe"] == 2
        place.pull()
        assert s3.requests["PutProbe"] == 2
        (tmp_path / "ledger.sqlite").unlink()
        place.change(ledger={"path": "another.sqlite"})
        place.pull()
        assert s3.requests["PutProbe"] == 3
        assert s3.requests["DeleteObject"] == 0


# ------------------------------------------------------------------- it is there, in other words


@pytest.mark.parametrize("status", [304, 412])
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["one part", "parts"])
def test_an_object_that_is_there_is_compared_however_the_store_says_so(status, data, tmp_path):
    with S3Server(exists_status=status) as s3, archive_in(s3) as archive:
        # The answer to the first put is lost: its repeat meets its own object.
        s3.reset("PutObject", committed=True)
        s3.reset("CompleteMultipartUpload", committed=True)
        assert not put(archive, data, tmp_path)
        assert s3.body(KEY) == data
        with archive_in(s3) as again:
            assert put(again, data, tmp_path)
        with archive_in(s3) as other, pytest.raises(ArchiveConflict):
            put(other, data[::-1], tmp_path)
        assert s3.body(KEY) == data


@pytest.mark.parametrize("code", ["FileAlreadyExists", "ObjectAlreadyExists"])
def test_an_object_that_is_there_is_compared_where_the_store_has_a_name_for_it(s3, tmp_path, code):
    with archive_in(s3) as archive:
        put(archive, SMALL, tmp_path)
        s3.fail("PutObject", status=409, code=code, times=None)
        assert put(archive, SMALL, tmp_path)


def test_a_pull_over_a_store_that_answers_304_moves_nothing_twice(tmp_path, monkeypatch):
    with S3Server(exists_status=304) as s3, pulled(tmp_path, monkeypatch, s3) as place:
        s3.reset("PutObject", committed=True)
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert examined(place)[CONDITION] == (True, "")
        stored, sent = dict(s3.archived), len(place.pacs.sent_instances())
        (tmp_path / "ledger.sqlite").unlink()
        place.change(ledger={"path": "another.sqlite"})
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert s3.archived == stored
        assert len(place.pacs.sent_instances()) == sent


# ------------------------------------------------------------------------- headers of checksums


@dataclass(frozen=True)
class Header:
    """A header or an element of one operation that a service refuses, or wants."""

    name: str
    operation: str
    status: int = 400
    code: str = "InvalidArgument"
    wanted: bool = False

    def __str__(self) -> str:
        return f"{self.operation} {self.name} {self.status} {self.code}"

    def script(self, s3: S3Server) -> None:
        rule = s3.demand if self.wanted else s3.refuse
        rule(self.name, self.operation, status=self.status, code=self.code)


CHECKSUMS = [
    ("x-amz-checksum-sha256", "PutProbe"),
    ("x-amz-checksum-sha256", "*"),
    ("x-amz-checksum-algorithm", "CreateMultipartUpload"),
    ("x-amz-checksum-sha256", "UploadPart"),
    ("ChecksumSHA256", "CompleteMultipartUpload"),
    ("if-none-match", "CompleteMultipartUpload"),
    ("x-amz-checksum-mode", "HeadObject"),
]
REFUSALS = [(400, "InvalidArgument"), (400, ""), (501, "NotImplemented"), (400, "InvalidRequest")]
HEADERS = [
    *(Header(name, operation, *how) for name, operation in CHECKSUMS for how in REFUSALS),
    Header("x-amz-checksum-mode", "HeadObject", 403, "AccessDenied"),
    Header("x-amz-checksum-sha256", "PutProbe", 403, "SignatureDoesNotMatch"),
    Header("x-amz-checksum-sha256", "UploadPart", 403, "SignatureDoesNotMatch"),
    *(
        Header("content-md5", operation, status, code, wanted=True)
        for operation in ("*P", "UploadPart")
        for status, code in ((400, "InvalidRequest"), (400, "MissingContentMD5"), (411, ""))
    ),
]

# Each header and operation once, and each way to refuse.
FEW_HEADERS = [
    *(Header(name, operation, *REFUSALS[n % 4]) for n, (name, operation) in enumerate(CHECKSUMS)),
    HEADERS[-1],
    next(header for header in HEADERS if header.operation == "*P"),
    next(header for header in HEADERS if header.status == 403),
]


def scripted(header: Header, s3: S3Server) -> None:
    if header.operation == "*P":
        for operation in ("PutProbe", "PutObject"):
            s3.demand(header.name, operation, status=header.status, code=header.code)
    elif header.operation == "PutProbe":
        for operation in ("PutProbe", "PutObject"):
            s3.refuse(header.name, operation, status=header.status, code=header.code)
    else:
        header.script(s3)


@pytest.mark.parametrize("header", subset(HEADERS, FEW_HEADERS), ids=str)
def test_a_header_that_is_not_needed_is_left_out_and_one_that_is_wanted_is_sent(
    header, s3, tmp_path, caplog
):
    scripted(header, s3)
    with archive_in(s3) as archive:
        for data, key in ((SMALL, KEY), (LARGE, KEY + "x"), (SMALL, KEY + "y"), (LARGE, KEY + "z")):
            path = tmp_path / "arrived.dcm"
            path.write_bytes(data)
            sha256 = hashlib.sha256(data).hexdigest()
            assert not archive.put_file(key, path, sha256, len(data)).already_there
            assert archive.put_file(key, path, sha256, len(data)).already_there
            assert s3.body(key) == data
            assert archive.head(key).sha256 in (None, sha256)
        # The bytes of every put were signed with their hash.
        signed = [r for r in s3.seen if r.operation in ("PutObject", "PutProbe", "UploadPart")]
        assert all(len(r.headers["x-amz-content-sha256"]) == 64 for r in signed)
        # What the service takes is found out once.
        counts = Counter(request.operation for request in s3.seen)
        assert counts["PutObject"] <= 4 and counts["UploadPart"] <= 6 + 3
        assert counts["CreateMultipartUpload"] <= 2 + 1
        assert counts["CompleteMultipartUpload"] <= 2 + 3
        checks = {check.name: check for check in archive.check()}
        assert all(check.ok for check in checks.values() if check.required)
        different = checks["requests are taken as AWS takes them"]
        assert not different.ok
        name = "Content-MD5" if header.wanted else header.name
        assert name.lower() in different.advice.lower()
    assert "signed hash" in caplog.text
    assert "1.2.3" not in caplog.text


def test_a_service_that_wants_content_md5_of_a_completion_gets_it_at_once(s3, tmp_path):
    s3.demand("content-md5", "CompleteMultipartUpload", status=400, code="InvalidRequest")
    with archive_in(s3) as archive:
        assert not put(archive, LARGE, tmp_path)
        assert s3.body(KEY) == LARGE
        assert all(check.ok for check in archive.check() if check.required)
    completions = [r for r in s3.seen if r.operation == "CompleteMultipartUpload"]
    assert all("content-md5" in request.headers for request in completions)


def test_a_service_that_does_not_know_expect_is_asked_without_it(s3, tmp_path):
    s3.refuse("expect", status=417, code="")
    s3.reset("PutObject", times=2)
    with archive_in(s3) as archive:
        assert not put(archive, SMALL, tmp_path)
        assert s3.body(KEY) == SMALL
    assert "expect" in s3.seen[-2].headers and "expect" not in s3.seen[-1].headers


def test_a_pull_over_a_store_that_refuses_every_checksum_header_is_archived(
    tmp_path, monkeypatch, s3
):
    for name, _ in CHECKSUMS:
        if name != "if-none-match":
            s3.refuse(name)
    with pulled(tmp_path, monkeypatch, s3) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert all(ok for ok, _ in examined(place).values())
        place.is_whole()


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "InvalidStorageClass"), (400, "KMS.DisabledException"), (403, "AccessDenied")],
)
def test_a_refusal_that_no_header_of_a_checksum_explains_is_not_sent_in_other_forms(
    s3, tmp_path, status, code
):
    with archive_in(s3) as archive:
        s3.fail("PutProbe", status=status, code=code, times=None)
        with pytest.raises(ArchiveError) as caught:
            put(archive, SMALL, tmp_path)
        assert caught.value.code == "archive-refused" and code in caught.value.detail
        assert s3.requests["PutProbe"] == 1


def test_a_refusal_in_every_form_is_told_as_that_of_the_first(s3, tmp_path):
    with archive_in(s3) as archive:
        s3.fail("PutProbe", status=400, code="InvalidRequest", times=None)
        with pytest.raises(ArchiveError) as caught:
            put(archive, SMALL, tmp_path)
        assert caught.value.detail == (
            "HTTP 400 InvalidRequest, also without x-amz-checksum-sha256 and with Content-MD5"
        )
        assert s3.requests["PutObject"] == 0


# ---------------------------------------------------------------------- the doctor and multipart


def checks_of(s3: S3Server) -> dict[str, tuple[bool, str]]:
    with archive_in(s3) as archive:
        return {check.name: (check.ok, check.advice) for check in archive.check()}


def test_a_creation_that_is_refused_with_an_algorithm_is_noted(s3):
    s3.refuse("x-amz-checksum-algorithm", status=501, code="NotImplemented")
    ok, advice = checks_of(s3)["requests are taken as AWS takes them"]
    assert not ok and "CreateMultipartUpload refuses x-amz-checksum-algorithm" in advice


def test_a_store_that_wants_the_algorithm_and_checks_nothing_in_parts_fails():
    with S3Server(ignore_part_hash=True, strict_multipart=True) as s3:
        s3.demand("x-amz-checksum-algorithm", "CreateMultipartUpload", code="InvalidRequest")
        ok, advice = checks_of(s3)["other bytes than signed are refused in parts"]
        assert not ok and "does not compare" in advice


def test_of_a_store_as_aws_nothing_is_noted(tmp_path):
    with S3Server(strict_multipart=True) as s3:
        assert [name for name, (ok, _) in checks_of(s3).items() if not ok] == []
        with archive_in(s3) as archive:
            assert not put(archive, LARGE, tmp_path)


# ----------------------------------------------------------------------------------- addressing


def reach_by_name(monkeypatch, name: str) -> None:
    """Let a name of a virtual host lead to this machine."""
    resolve = socket.getaddrinfo

    def to_loopback(host, *arguments, **more):
        return resolve("127.0.0.1" if host == name else host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", to_loopback)


def test_a_bucket_in_the_host_name_is_a_setting_and_a_message_names_it(tmp_path, monkeypatch):
    with S3Server(virtual_hosts_only=True) as s3, pulled(tmp_path, monkeypatch, s3) as place:
        reach_by_name(monkeypatch, "archive.localhost")
        with pytest.raises(PrefectDicomError) as caught:
            place.pull()
        assert "archive.addressing: virtual" in caught.value.detail
        assert place.asked_for() == 0
        (failed,) = [advice for ok, advice in examined(place).values() if not ok]
        assert "archive.addressing: virtual" in failed
        place.change(
            archive={
                "endpoint": s3.endpoint.replace("127.0.0.1", "localhost"),
                "addressing": "virtual",
            }
        )
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert all(ok for ok, _ in examined(place).values())


def test_a_host_name_that_does_not_resolve_names_the_setting(s3):
    elsewhere = archive_in(s3, endpoint="http://store.invalid", addressing="virtual")
    with elsewhere as archive, pytest.raises(ArchiveError) as caught:
        archive.check_usable()
    assert "archive.addressing" in caught.value.detail


@pytest.mark.parametrize("code", ["PathStyleForbidden", "InvalidPathAccess", "VirtualHostRequired"])
def test_other_names_for_it_name_the_setting_too(s3, tmp_path, code):
    s3.fail("*", status=403, code=code, times=None)
    with archive_in(s3) as archive, pytest.raises(ArchiveError) as caught:
        put(archive, SMALL, tmp_path)
    assert "archive.addressing: virtual" in caught.value.detail


# -------------------------------------------------------------------------------------- listings


@pytest.mark.parametrize(
    "server",
    [
        {"listing_tokens": False},
        {"listing_tokens": False, "ignore_start_after": True},
        {"listing_tokens": False, "listing_flags": False},
        {"listing_flags": False},
        {"listing_tokens": False, "listing_flags": False, "ignore_start_after": True},
    ],
    ids=lambda server: " ".join(server),
)
@pytest.mark.parametrize("count", [999, 1000, 1200, 3000])
def test_a_listing_that_is_cut_short_is_gone_on_with_until_all_keys_are_seen(server, count):
    with S3Server(**server) as s3, archive_in(s3) as archive:
        s3.put("studies/1/0.dcm", SMALL)
        one = s3.objects.pop("studies/1/0.dcm")
        s3.objects.update({f"studies/1/{number:04}.dcm": one for number in range(count)})
        assert list(dict(archive.keys("studies/"))) == sorted(s3.objects)
        assert list(archive.keys("series/")) == []


def test_a_listing_that_does_not_go_on_is_a_fault_with_a_name():
    with (
        S3Server(listing_tokens=False, ignore_start_after=True) as s3,
        archive_in(s3) as archive,
    ):
        s3.put("studies/1/0.dcm", SMALL)
        one = s3.objects.pop("studies/1/0.dcm")
        s3.objects.update({f"studies/1/{number:04}.dcm": one for number in range(1200)})
        s3.fail("ListObjects", status=501, code="NotImplemented", times=None)
        with pytest.raises(ArchiveError) as caught:
            list(archive.keys("studies/"))
        assert caught.value.code in ("archive-listing-faulty", "archive-refused")


def test_a_token_that_leads_to_itself_is_not_followed_for_ever(s3):
    page = (
        b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        b"<IsTruncated>true</IsTruncated><NextContinuationToken>again</NextContinuationToken>"
        b"<Contents><Key>studies/1/0.dcm</Key><Size>1</Size></Contents></ListBucketResult>"
    )
    s3.reply("ListObjectsV2", page, times=None)
    s3.reply("ListObjects", page, times=None)
    with archive_in(s3) as archive, pytest.raises(ArchiveError) as caught:
        list(archive.keys("studies/"))
    assert caught.value.code == "archive-listing-faulty"


def test_an_entry_without_a_key_is_no_traceback(s3):
    page = (
        b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        b"<IsTruncated>false</IsTruncated><Contents><Size>1</Size></Contents></ListBucketResult>"
    )
    s3.reply("ListObjectsV2", page, times=None)
    with archive_in(s3) as archive, pytest.raises(ArchiveError):
        list(archive.keys("studies/"))


# --------------------------------------------------------------------------------------- proxies


class Refuses(BaseHTTPRequestHandler):
    """A proxy that wants a password, or has another reason."""

    status = 407

    def refuse(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = do_CONNECT = refuse

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def proxy(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Refusing", (Refuses,), {})) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


def test_a_store_on_this_host_is_never_asked_through_a_proxy(tmp_path, monkeypatch, s3, proxy):
    with pulled(tmp_path, monkeypatch, s3) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert all(ok for ok, _ in examined(place).values())
    assert proxy.asked == []


@pytest.mark.parametrize("endpoint", ["http://s3.example.org", "https://s3.example.org:9000"])
def test_a_store_elsewhere_is_asked_through_the_proxy_of_the_environment(s3, proxy, endpoint):
    with archive_in(s3, endpoint=endpoint) as archive:
        for attempt in (
            archive.check_usable,
            lambda: list(archive.keys()),
            lambda: archive.head(KEY),
            lambda: b"".join(archive.read(KEY)),
        ):
            before = len(proxy.asked)
            with pytest.raises(ArchiveError) as caught:
                attempt()
            assert len(proxy.asked) > before
            assert caught.value.code == "archive-refused"
            assert "407" in caught.value.detail and "proxy" in caught.value.detail
            assert "NO_PROXY" in caught.value.reason.explanation


@pytest.mark.parametrize(
    ("status", "code"), [(403, "archive-refused"), (502, "archive-unavailable")]
)
def test_another_refusal_of_the_proxy_is_told_as_the_proxys(s3, proxy, status, code):
    proxy.RequestHandlerClass.status = status
    elsewhere = archive_in(s3, endpoint="https://s3.example.org")
    with elsewhere as archive, pytest.raises(ArchiveError) as caught:
        archive.check_usable()
    assert caught.value.code == code
    assert "proxy" in caught.value.detail and str(status) in caught.value.detail


def test_a_proxy_that_is_down_is_named(s3, proxy):
    proxy.shutdown()
    proxy.server_close()
    elsewhere = archive_in(s3, endpoint="https://s3.example.org")
    with elsewhere as archive, pytest.raises(ArchiveError) as caught:
        archive.check_usable()
    assert caught.value.code == "archive-unavailable"
    assert "proxy" in caught.value.detail


def test_the_doctor_names_the_proxy(tmp_path, monkeypatch, s3, proxy):
    with pulled(tmp_path, monkeypatch, s3) as place:
        place.change(archive={"endpoint": "https://s3.example.org"})
        (advice,) = [advice for ok, advice in examined(place).values() if not ok]
        assert "407" in advice and "proxy of HTTP_PROXY or HTTPS_PROXY" in advice


def test_the_doctor_finds_no_fault_with_ceph(rados_gateway):
    with archive_in(rados_gateway, prefix="services") as archive:
        checks = archive.check()
        assert [check.name for check in checks if check.required and not check.ok] == []
        assert list(archive.keys("probes/")) == []
    with archive_in(rados_gateway, prefix="services") as archive:
        archive.check_usable()
        assert [key for key, _ in archive.keys("probes/")] == ["probes/if-none-match"]
