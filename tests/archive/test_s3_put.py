"""The SHA-256 taken as the bytes arrived is what is signed, so the store itself refuses others.

Shown on our small S3 and on a real Ceph gateway, over HTTP and HTTPS.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import ssl
import uuid

import boto3
import botocore.session
import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from prefect_dicom.archive.s3 import BucketArchive
from prefect_dicom.archive.s3_put import SignedPut
from prefect_dicom.archive.source import BytesSource
from prefect_dicom.config.archive import S3Archive
from prefect_dicom.core.uids import object_key
from tests.support.radosgw import client_of
from tests.support.s3_server import S3Server

PART_BYTES = 5 * 1024**2
KEY = object_key("1.2.3", "1.2.3.4", "1.2.3.4.5")


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def archive_at(service) -> BucketArchive:
    return BucketArchive(
        S3Archive(
            bucket=service.bucket,
            endpoint=service.endpoint,
            access_key_id=service.access_key,
            secret_access_key=service.secret_key,
            part_bytes=PART_BYTES,
        )
    )


def signed_put(service, prefix: str = "", **changes) -> SignedPut:
    core = botocore.session.Session()
    core.set_credentials(service.access_key, service.secret_key)
    session = boto3.Session(botocore_session=core)
    return SignedPut(
        client_of(service),
        session.get_credentials(),
        service.bucket,
        prefix,
        **{"ca_bundle": None, "timeouts": (5, 5), "connections": 1, **changes},
    )


@pytest.fixture(params=["s3", "s3 that ignores checksum headers", "radosgw"])
def service(request):
    if request.param == "radosgw":
        yield request.getfixturevalue("rados_gateway")
    else:
        with S3Server(ignore_checksums="ignores" in request.param) as s3:
            yield s3


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of its own authority for localhost, and the server's side of TLS."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    chain, secret = folder / "cert.pem", folder / "key.pem"
    chain.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, secret)
    return chain, context


def test_a_store_refuses_other_bytes_than_those_that_were_signed(service):
    prefix = uuid.uuid4().hex + "/"
    put = signed_put(service, prefix)
    arrived, changed = b"the bytes that arrived", b"the bytes that changed"
    with pytest.raises(ClientError) as caught:
        put.send(KEY, BytesSource(changed), {}, sha256=sha256_of(arrived))
    assert caught.value.response["Error"]["Code"] == "XAmzContentSHA256Mismatch"
    assert not client_of(service).list_objects_v2(Bucket=service.bucket, Prefix=prefix)["KeyCount"]
    put.send(KEY, BytesSource(arrived), {}, sha256=sha256_of(arrived))
    held = client_of(service).get_object(Bucket=service.bucket, Key=prefix + KEY)
    assert held["Body"].read() == arrived


def test_a_store_refuses_other_bytes_in_a_part(service):
    prefix = uuid.uuid4().hex + "/"
    client = client_of(service)
    upload = client.create_multipart_upload(Bucket=service.bucket, Key=prefix + KEY)["UploadId"]
    with pytest.raises(ClientError) as caught:
        signed_put(service, prefix).send(
            KEY,
            BytesSource(b"changed"),
            {},
            sha256=sha256_of(b"arrived"),
            query={"partNumber": "1", "uploadId": upload},
        )
    assert caught.value.response["Error"]["Code"] == "XAmzContentSHA256Mismatch"
    client.abort_multipart_upload(Bucket=service.bucket, Key=prefix + KEY, UploadId=upload)


def test_the_header_carries_the_hash_of_the_object_and_of_every_part(tmp_path):
    data = os.urandom(2 * PART_BYTES + 1)
    pieces = [data[i : i + PART_BYTES] for i in range(0, len(data), PART_BYTES)]
    path = tmp_path / "arrived.dcm"
    with S3Server() as s3, archive_at(s3) as archive:
        path.write_bytes(pieces[0])
        archive.put_file(KEY, path, sha256_of(pieces[0]), PART_BYTES)
        path.write_bytes(data)
        archive.put_file(KEY + "x", path, sha256_of(data), len(data))
        signed = {
            operation: [
                request.headers["x-amz-content-sha256"]
                for request in s3.seen
                if request.operation == operation
            ]
            for operation in ("PutObject", "UploadPart")
        }
        assert signed["PutObject"] == [sha256_of(pieces[0])]
        assert signed["UploadPart"] == [sha256_of(piece) for piece in pieces]
        assert s3.objects[KEY + "x"].sha256 == sha256_of(data)


def test_over_https_too_where_boto3_alone_would_leave_the_payload_unsigned(
    certificate, monkeypatch, tmp_path
):
    chain, context = certificate
    monkeypatch.setenv("AWS_CA_BUNDLE", str(chain))
    path = tmp_path / "arrived.dcm"
    path.write_bytes(b"arrived")
    with S3Server(tls=context) as s3, archive_at(s3) as archive:
        archive.put_file(KEY, path, sha256_of(b"arrived"), 7)
        assert s3.seen[-1].headers["x-amz-content-sha256"] == sha256_of(b"arrived")
        with path.open("rb") as file, pytest.raises(ClientError):
            client_of(s3).put_object(Bucket=s3.bucket, Key="by-boto3", Body=file)
        assert s3.seen[-1].key == "by-boto3"
        assert "UNSIGNED-PAYLOAD" in s3.seen[-1].headers["x-amz-content-sha256"]


def test_a_certificate_that_nobody_vouches_for_ends_the_upload(certificate):
    from prefect_dicom.core.errors import ArchiveError

    with (
        S3Server(tls=certificate[1]) as s3,
        archive_at(s3) as archive,
        pytest.raises(ArchiveError) as caught,
    ):
        archive.put_bytes(KEY, b"secret")
    assert caught.value.code == "archive-refused"
    assert s3.seen == []


@pytest.mark.parametrize(
    ("endpoint", "region", "bucket", "where", "signed_for"),
    [
        (None, "eu-central-1", "my-bucket", "https://my-bucket.s3.eu-central-1.amazonaws.com/", ""),
        (None, "eu-central-1", "my.bucket", "https://s3.eu-central-1.amazonaws.com/my.bucket/", ""),
        (None, "cn-north-1", "my-bucket", "https://my-bucket.s3.cn-north-1.amazonaws.com.cn/", ""),
        ("https://s3.example.org:9000", None, "my-bucket", "", "us-east-1"),
        ("https://s3.example.org/below", "garage", "my-bucket", "", "garage"),
    ],
)
def test_objects_are_addressed_as_the_service_wants_it(endpoint, region, bucket, where, signed_for):
    settings = S3Archive(
        bucket=bucket,
        region=region,
        endpoint=endpoint,
        prefix="a cohort/of ü",
        access_key_id="key",
        secret_access_key="secret",
    )
    put = BucketArchive(settings)._s3.clients().put
    begin = where or f"{endpoint}/{bucket}/"
    assert put.base_url == f"{begin}a%20cohort/of%20%C3%BC/"
    assert put.region == (signed_for or region)


@pytest.mark.parametrize(
    ("addressing", "endpoint", "where"),
    [
        ("virtual", "https://s3.example.org:9000", "https://my-bucket.s3.example.org:9000/"),
        ("path", "https://s3.example.org:9000", "https://s3.example.org:9000/my-bucket/"),
        (None, "https://s3.example.org:9000", "https://s3.example.org:9000/my-bucket/"),
        ("path", None, "https://s3.eu-central-1.amazonaws.com/my-bucket/"),
        ("virtual", None, "https://my-bucket.s3.eu-central-1.amazonaws.com/"),
    ],
)
def test_the_setting_says_where_the_bucket_stands(addressing, endpoint, where):
    settings = S3Archive(
        bucket="my-bucket",
        region="eu-central-1",
        endpoint=endpoint,
        addressing=addressing,
        access_key_id="key",
        secret_access_key="secret",
    )
    assert BucketArchive(settings)._s3.clients().put.base_url == where


def test_nothing_is_sent_without_credentials():
    with S3Server() as s3, pytest.raises(NoCredentialsError):
        SignedPut(
            client_of(s3), None, s3.bucket, "", ca_bundle=None, timeouts=(5, 5), connections=1
        )
