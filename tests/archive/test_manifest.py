"""Manifests: one form, read back whole or refused, compared without their time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_dicom.archive.manifest import decode_manifest, encode_manifest, same_manifest
from prefect_dicom.core.errors import ArchiveError
from prefect_dicom.core.model import Evidence, ManifestInstance, StudyManifest, WithheldInstance

ONE = ManifestInstance("1.2.3", "1.2.3.1", "1.2.840", "1.2.4", "studies/a.dcm", 10, "ab" * 32)
TWO = replace(ONE, sop_instance_uid="1.2.3.2", key="studies/b.dcm", version_id="v1")
WITHHELD = WithheldInstance("1.2.3", "1.2.3.3", "pixel-data-length")
MANIFEST = StudyManifest(
    study_instance_uid="1.2",
    node="main",
    evidence=Evidence.INSTANCE_LIST,
    listed_at="2026-11-21T10:00:00+00:00",
    instances=(ONE, replace(TWO, warnings=("not-inspected",))),
    withheld=(WITHHELD,),
    warnings=("study-changed",),
)

# Lone surrogates stand for bytes of a UID that are no text.
texts = st.text(alphabet=st.characters(codec=None))
instances = st.builds(
    ManifestInstance,
    *[texts] * 5,
    st.integers(min_value=0, max_value=2**63),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.none() | texts,
    st.lists(texts, max_size=2).map(tuple),
)
manifests = st.builds(
    StudyManifest,
    texts,
    texts,
    st.sampled_from(Evidence),
    texts,
    st.lists(instances, max_size=4).map(tuple),
    st.lists(st.builds(WithheldInstance, texts, texts, texts), max_size=2).map(tuple),
    st.lists(texts, max_size=3).map(tuple),
)


@given(manifests)
def test_a_manifest_survives_being_written_and_read(manifest):
    data = encode_manifest(manifest)
    read = decode_manifest(data)
    assert set(read.instances) == set(manifest.instances)
    assert set(read.withheld) == set(manifest.withheld)
    assert sorted(read.warnings) == sorted(manifest.warnings)
    assert replace(read, instances=(), withheld=(), warnings=()) == replace(
        manifest, instances=(), withheld=(), warnings=()
    )
    assert encode_manifest(read) == data


def test_the_order_in_which_instances_arrived_does_not_matter():
    other = replace(MANIFEST, instances=MANIFEST.instances[::-1])
    assert encode_manifest(other) == encode_manifest(MANIFEST)


def test_the_form_is_named_and_readable_by_anybody():
    body = json.loads(encode_manifest(MANIFEST))
    assert body["format"] == "prefect-dicom/study-manifest"
    assert body["version"] == 1
    assert body["evidence"] == "instance-list"
    assert body["instances"][0]["sha256"] == "ab" * 32


def test_two_manifests_are_the_same_whenever_they_were_listed():
    later = replace(MANIFEST, listed_at="2027-01-01T00:00:00+00:00")
    assert encode_manifest(later) != encode_manifest(MANIFEST)
    assert same_manifest(encode_manifest(later), encode_manifest(MANIFEST))


@pytest.mark.parametrize(
    "change",
    [
        {"study_instance_uid": "1.3"},
        {"node": "other"},
        {"evidence": Evidence.SERIES_COUNTS},
        {"instances": (ONE,)},
        {"instances": (ONE, replace(TWO, sha256="cd" * 32))},
        {"withheld": ()},
        {"warnings": ()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_two_manifests_that_say_something_else_are_not_the_same(change):
    other = replace(MANIFEST, **change)
    assert not same_manifest(encode_manifest(other), encode_manifest(MANIFEST))


def with_changes(**changes) -> bytes:
    return json.dumps(json.loads(encode_manifest(MANIFEST)) | changes).encode()


FIRST = json.loads(encode_manifest(MANIFEST))["instances"][0]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        encode_manifest(MANIFEST)[:-20],
        with_changes(format="something else"),
        with_changes(version=2),
        with_changes(evidence="hearsay"),
        with_changes(node=None),
        with_changes(instances=None),
        with_changes(instances=[{}]),
        with_changes(instances=["1.2.3"]),
        with_changes(warnings="text"),
        with_changes(instances=[{**FIRST, "size_bytes": True}]),
        with_changes(instances=[{**FIRST, "size_bytes": -1}]),
        with_changes(instances=[{**FIRST, "sha256": "AB"}]),
    ],
    ids=lambda garbage: str(len(garbage)),
)
def test_what_is_no_manifest_is_refused_and_never_the_same(garbage):
    with pytest.raises(ArchiveError) as caught:
        decode_manifest(garbage)
    assert caught.value.code == "manifest-unreadable"
    assert not same_manifest(garbage, encode_manifest(MANIFEST))
    assert not same_manifest(garbage, garbage)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_refused(data):
    with pytest.raises(ArchiveError):
        decode_manifest(data)
