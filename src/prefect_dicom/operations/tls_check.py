"""TLS as the doctor sees it: our certificates, the peer's chain, and what expires soon."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

from prefect_dicom.config.certificates import Certificate, read_certificates
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.site import Site
from prefect_dicom.config.tls import Tls
from prefect_dicom.config.tls_files import tls_faults
from prefect_dicom.core.errors import PacsError
from prefect_dicom.network.association import connect
from prefect_dicom.network.storage_scp import ReceiverLease
from prefect_dicom.network.tls import peer_of, shown_chain
from prefect_dicom.operations.findings import Finding, failed_finding

_SOON_DAYS = 30
_RENEW_OURS = (
    "Have it renewed in time, and put certificate and key in the place of the old ones: runs and "
    "receiver take them without a restart."
)
_RENEW_THEIRS = "Tell the PACS administrator: it is refused here from that day on."


def check_files(site: Site) -> Iterator[Finding]:
    """Check the files of all TLS settings, and print our certificates."""
    for key, tls in site.tls_settings().items():
        if faults := tls_faults(tls, key):
            advice = "\n".join(faults)
            yield Finding(key, "its files can be used", False, f"{len(faults)} faults", advice)
            continue
        words = f"profile {tls.profile}, trust in {tls.trust}"
        yield Finding(key, "its files can be used", True, words)
        if tls.certificate is not None:
            own = read_certificates(tls.certificate)[0]
            yield _expiry(key, "our certificate", own, _RENEW_OURS)


def check_node(name: str, node: PacsNode) -> Generator[Finding, None, bool]:
    """Shake hands with a node that has TLS, and print whom we talk to.

    Returns
    -------
    bool
        Whether there is any use in sending a request.
    """
    if not isinstance(node.tls, Tls):
        return True
    try:
        with contextlib.closing(connect(node)) as connection:
            peer = peer_of(connection)
    except PacsError as error:
        yield failed_finding(name, "TLS", error)
        if error.reason.shows_certificate:
            for number, one in enumerate(shown_chain(node)):
                words = f"{one.words}; issuer {one.issuer}; SHA256:{one.fingerprint}"
                check = "it is shown, and not accepted" if number == 0 else "issued by"
                yield Finding(name, check, True, words)
        return False
    if peer is not None:
        yield Finding(name, "TLS", True, f"{peer.version}, {peer.suite}")
        for number, one in enumerate(peer.chain):
            check = "its certificate" if number == 0 else "issued by"
            yield _expiry(name, check, one, _RENEW_THEIRS)
    return True


def check_senders(name: str, lease: ReceiverLease | None) -> Iterator[Finding]:
    """Print with which certificates instances were sent to the receiver."""
    senders: list[dict[str, Any]] = lease.status()["tls_senders"] if lease is not None else []
    for sender in senders:
        words = f"{sender['version']}, {sender['suite']}"
        if sender["chain"]:
            words += f", {sender['chain'][0]}"
        else:
            words += ", without a certificate"
        days = sender["days_left"]
        soon = days is not None and days < _SOON_DAYS
        check = f"TLS of {sender['calling_ae_title']} at {sender['address']} to the receiver"
        yield Finding(name, check, True, words, _RENEW_THEIRS if soon else "")


def _expiry(part: str, check: str, certificate: Certificate, advice: str) -> Finding:
    soon = certificate.days_left() < _SOON_DAYS
    return Finding(part, check, True, certificate.words, advice if soon else "")
