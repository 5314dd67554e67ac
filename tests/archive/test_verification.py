"""An archive is compared with the manifests the ledger remembers: each level finds its faults.

``exists`` sees what is gone, ``size`` what is shorter, ``checksum`` what the store itself would
admit, ``read`` everything. The PACS is never asked.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from prefect_dicom.archive.manifest import same_manifest
from prefect_dicom.archive.verification import verify_cohort
from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.core.model import Level
from prefect_dicom.core.uids import manifest_key, object_key
from prefect_dicom.testing.tiny import tiny_instances
from tests.support.s3_server import S3Server
from tests.support.sites import Place, credentials, site_around

MISSING, CHANGED = "archive-object-missing", "archive-checksum"


class Folder:
    """What somebody does to a directory archive behind our back."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def keys(self) -> list[str]:
        return sorted(str(path.relative_to(self._root)) for path in self._root.rglob("*.dcm"))

    def delete(self, key: str) -> None:
        (self._root / key).unlink()

    def replace(self, key: str, data: bytes) -> None:
        path = self._root / key
        path.chmod(0o600)
        path.write_bytes(data)

    def read(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def add(self, key: str) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not ours")


class Bucket:
    """The same to a bucket."""

    def __init__(self, server: S3Server) -> None:
        self._server = server

    def keys(self) -> list[str]:
        return sorted(key for key in self._server.objects if key.endswith(".dcm"))

    def delete(self, key: str) -> None:
        del self._server.objects[key]

    def replace(self, key: str, data: bytes) -> None:
        # Bits that rot on the store's disks: what it keeps beside the object stays as it was.
        held = self._server.objects[key]
        self._server.objects[key] = dataclasses.replace(
            held, data=data, path=None, size_bytes=len(data)
        )

    def read(self, key: str) -> bytes:
        return self._server.body(key)

    def add(self, key: str) -> None:
        self._server.objects[key] = next(iter(self._server.objects.values()))


@pytest.fixture(params=["directory", "bucket"])
def archived(request, tmp_path, monkeypatch):
    """A site with two archived studies of two instances, and a way into its archive."""
    objects = tiny_instances(2, instances=2)
    if request.param == "directory":
        with site_around(tmp_path, objects, retrieve="c-get") as place:
            place.pull()
            yield place, Folder(tmp_path / "archive")
        return
    with S3Server() as server:
        credentials(server, monkeypatch)
        with site_around(tmp_path, objects, retrieve="c-get", bucket=server) as place:
            place.pull()
            yield place, Bucket(server)


def found(place: Place) -> dict[str, Counter[str]]:
    """The faults each level finds, over all studies."""
    return {
        str(level): sum((s.faults for s in verify_cohort(place.site, "1", level)), Counter())
        for level in Level
    }


def nothing() -> dict[str, Counter[str]]:
    return {str(level): Counter() for level in Level}


def test_an_untouched_archive_has_no_faults_at_any_level_and_the_pacs_is_not_asked(archived):
    place, _ = archived
    asked = place.asked_for()
    assert found(place) == nothing()
    studies = list(verify_cohort(place.site, "1", Level.READ))
    assert [(study.reference, study.instances) for study in studies] == [(1, 2), (2, 2)]
    assert place.asked_for() == asked


def test_a_deleted_object_is_missing_at_every_level(archived):
    place, archive = archived
    archive.delete(archive.keys()[0])
    assert found(place) == {str(level): Counter({MISSING: 1}) for level in Level}


def test_a_truncated_object_is_found_from_its_size_on(archived):
    place, archive = archived
    key = archive.keys()[0]
    archive.replace(key, archive.read(key)[:-100])
    assert found(place) == {
        **{str(level): Counter({CHANGED: 1}) for level in Level},
        "exists": Counter(),
    }


def test_a_flipped_byte_is_found_by_reading_and_a_checksum_is_as_good_as_who_keeps_it(archived):
    place, archive = archived
    key = archive.keys()[0]
    data = bytearray(archive.read(key))
    data[-1] ^= 1
    archive.replace(key, bytes(data))
    levels = found(place)
    assert levels["exists"] == levels["size"] == Counter()
    assert levels["read"] == Counter({CHANGED: 1})
    # A directory keeps no hash, so it is read; the bucket still tells what it has on record.
    believed = Counter() if isinstance(archive, Bucket) else Counter({CHANGED: 1})
    assert levels["checksum"] == believed


def test_a_store_that_tells_another_checksum_is_found_without_reading(tmp_path, monkeypatch):
    with S3Server() as server:
        credentials(server, monkeypatch)
        objects = tiny_instances(1, instances=2)
        with site_around(tmp_path, objects, retrieve="c-get", bucket=server) as place:
            place.pull()
            first, second = Bucket(server).keys()
            other = server.objects[second]
            server.objects[first] = dataclasses.replace(
                server.objects[first], checksum=other.checksum, metadata=other.metadata
            )
            reads = server.requests["GetObject"]
            (study,) = verify_cohort(place.site, "1", Level.CHECKSUM)
            assert study.faults == Counter({CHANGED: 1})
            # One: the manifest. No object was downloaded.
            assert server.requests["GetObject"] == reads + 1


def test_a_stream_that_breaks_is_read_again_and_is_no_verdict(tmp_path, monkeypatch):
    with S3Server() as server:
        credentials(server, monkeypatch)
        objects = tiny_instances(1, instances=2)
        with site_around(tmp_path, objects, retrieve="c-get", bucket=server) as place:
            place.pull()
            server.truncate("GetObject", times=2)
            (study,) = verify_cohort(place.site, "1", Level.READ)
            assert study.faults == Counter()
            server.truncate("GetObject", times=3)
            with pytest.raises(PrefectDicomError) as caught:
                list(verify_cohort(place.site, "1", Level.READ))
            assert caught.value.code == "archive-unavailable"


def test_an_object_that_goes_while_it_is_looked_at_is_missing(tmp_path, monkeypatch):
    with S3Server() as server:
        credentials(server, monkeypatch)
        objects = tiny_instances(1, instances=2)
        with site_around(tmp_path, objects, retrieve="c-get", bucket=server) as place:
            place.pull()
            server.fail("GetObject", status=404, code="NoSuchKey")
            (study,) = verify_cohort(place.site, "1", Level.READ)
            assert study.faults == Counter({MISSING: 1})


@pytest.mark.parametrize("other", ["directory", "link"])
def test_what_is_no_file_is_no_object_in_a_directory(tmp_path, other):
    with site_around(tmp_path, tiny_instances(1, instances=2), retrieve="c-get") as place:
        place.pull()
        path = sorted((tmp_path / "archive").rglob("*.dcm"))[0]
        if other == "link":
            path.rename(tmp_path / "elsewhere.dcm")
            path.symlink_to(tmp_path / "elsewhere.dcm")
        else:
            path.unlink()
            path.mkdir()
        assert found(place) == {str(level): Counter({MISSING: 1}) for level in Level}


def test_without_a_cohort_every_archived_study_of_the_ledger_is_looked_at(archived):
    place, archive = archived
    archive.delete(archive.keys()[0])
    studies = list(verify_cohort(place.site, None, Level.EXISTS))
    assert [study.instances for study in studies] == [2, 2]
    assert sum((study.faults for study in studies), Counter()) == Counter({MISSING: 1})


def test_a_replaced_manifest_is_found_at_every_level(archived):
    place, archive = archived
    key = manifest_key(place.pacs.holdings.study_instance_uids()[0])
    honest = archive.read(key)
    document = json.loads(honest)
    document["instances"] = document["instances"][:1]
    forged = json.dumps(document).encode()
    assert not same_manifest(forged, honest)
    archive.replace(key, forged)
    assert found(place) == {str(level): Counter({CHANGED: 1}) for level in Level}

    archive.replace(key, b"no manifest at all")
    assert found(place) == {str(level): Counter({CHANGED: 1}) for level in Level}

    archive.delete(key)
    assert found(place) == {str(level): Counter({MISSING: 1}) for level in Level}


def test_an_object_swapped_for_another_of_the_same_size_is_found(archived):
    place, archive = archived
    first, second = archive.keys()[:2]
    one, other = archive.read(first), archive.read(second)
    assert len(one) == len(other)
    archive.replace(first, other)
    archive.replace(second, one)
    assert found(place)["read"] == Counter({CHANGED: 2})


def test_what_lies_in_the_archive_beside_the_studies_is_no_fault(archived):
    place, archive = archived
    archive.add("NOTES.txt")
    archive.add(object_key("1.2.3", "1.2.3.4", "1.2.3.4.5"))
    assert found(place) == nothing()


def test_an_archive_that_cannot_be_asked_is_an_error_and_no_verdict(archived):
    place, archive = archived
    place.change(archive={"bucket": "other-bucket"} if isinstance(archive, Bucket) else {})
    if isinstance(archive, Folder):
        (place.folder / "archive").rename(place.folder / "elsewhere")
    with pytest.raises(PrefectDicomError) as caught:
        list(verify_cohort(place.site, "1", Level.EXISTS))
    assert caught.value.code == "archive-missing"


def test_a_study_that_is_not_archived_is_not_judged(tmp_path):
    with site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place:
        with place.opened() as pull:
            for first, last in pull.discovery.pages():
                pull.discovery.discover(first, last)
        assert list(verify_cohort(place.site, "1", Level.READ)) == []
