"""Reasons of TLS: certificates, profiles, and ports that speak it or do not."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons.reason import Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition


TLS = (
    Reason(
        "tls-not-spoken",
        TRANSIENT,
        Scope.NODE,
        meaning="The PACS ended the connection in the TLS handshake, or answered without TLS.",
        advice="Check `port` of the node: it is most likely a port of plain DICOM (104, 11112).",
        explanation="""
We began with TLS, and the port closed the connection or answered with something that is no TLS.
DCMTK and Orthanc do so at a port of plain DICOM. TLS has a port of its own, 2762 where the PACS
follows the registry; ask for it, or set `tls: false` for the node. On the first contact the node
is disabled at once. After a success in the same run it rather is a PACS, or a gateway before it,
that restarts, and the node is waiting.""",
        retry_once=True,
        transient_before_success=False,
    ),
    Reason(
        "tls-required",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS's port speaks TLS only, and the node is configured for plain DICOM.",
        advice="Set `tls: true` for the node, with certificates in the site's `tls`; or correct "
        "its `port`.",
        explanation="""
A TLS alert came as the answer to our association request. Many PACS close the connection without
one: that is `pacs-reset`. The page on TLS says what to ask the PACS administrator for.""",
    ),
    Reason(
        "tls-server-not-trusted",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS's certificate is not trusted here.",
        advice="Put the certificate of the CA that issued it into the file of `trust`; "
        "`prefect-dicom doctor` prints who that is.",
        explanation="""
The chain of certificates that the PACS showed does not lead to a certificate in `trust`, it has
been revoked, or its key is too short to be safe (RSA below 2048 bits). The message says which. A
PACS with a self-signed certificate is trusted by that certificate itself in `trust`. If an
intermediate CA is missing, the PACS has to send it with its own certificate, or it is put into
`trust`. Compare the fingerprint with the PACS's administrator, by telephone: another machine may
have answered. There is no key that turns this check off.""",
        shows_certificate=True,
    ),
    Reason(
        "tls-name-mismatch",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS's certificate is trusted, but is for another name than `host`.",
        advice="Set `tls_name` of the node to a name in the certificate, if that is the PACS's.",
        explanation="""
The certificate was issued to other names (SubjectAltName, else Common Name) than `host` of the
node. Where `host` is an IP address, or an alias, `tls_name` says which name to expect. A
certificate of the same CA for another machine is no proof that the PACS answered, so that any name
is not accepted. `prefect-dicom doctor` prints the names.""",
        shows_certificate=True,
    ),
    Reason(
        "tls-expired",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS's certificate has expired or is not valid yet.",
        advice="Have the PACS's certificate renewed, and compare this host's clock.",
        explanation="""
The time of this host lies outside of the validity of the PACS's certificate, or of a CA's in its
chain. `timedatectl` shows whether the clock is right. The PACS's administrator renews the
certificate; nothing has to be changed here when the CA stays the same.""",
        shows_certificate=True,
    ),
    Reason(
        "tls-client-certificate-refused",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS refused our certificate, or demands one that we do not show.",
        advice="Have the CA of our certificate added to those that the PACS trusts; where none is "
        "shown, set `certificate` and `key` of `tls`.",
        explanation="""
The PACS ended TLS with an alert about our certificate: none shown, an unknown CA, expired, or not
permitted; the message says which. With TLS 1.3 the handshake succeeds here, and the refusal is
read after it: tools that only shake hands report success. `prefect-dicom doctor` prints our
certificate, its names and its expiry. A certificate that is limited to servers (Extended Key
Usage) is refused too: it needs `clientAuth`.""",
    ),
    Reason(
        "tls-profile-not-supported",
        OPERATOR,
        Scope.NODE,
        meaning="The PACS and we have no TLS version or cipher suite in common.",
        advice="Have a profile of BCP 195 enabled on the PACS (PS3.15 B.12, B.9 or B.10): TLS 1.2 "
        "with ECDHE and AES-GCM at least.",
        explanation="""
We offer TLS 1.2 and 1.3 with the suites of PS3.15 B.12 or B.13. A PACS with the retired profiles
(AES: TLS 1.0 with CBC; Basic) has none of them; in DCMTK these are `+pa` and `+pb`. No setting
here allows older versions: they can be broken. A PACS that has nothing newer belongs behind a TLS
proxy beside it.""",
    ),
    Reason(
        "tls-handshake-failed",
        OPERATOR,
        Scope.NODE,
        meaning="The TLS handshake with the PACS failed for another cause.",
        advice="Read the PACS's log of this minute; the message has OpenSSL's name for it.",
        explanation="""
The PACS speaks TLS, and the handshake ended with an error that says neither that our certificate
was refused nor that there is no common profile: a fault inside of the PACS or of a proxy, or a
connection that broke. It is tried twice more, and then the node is disabled.""",
        disables_node_after=3,
    ),
    Reason(
        "tls-files-unusable",
        OPERATOR,
        Scope.SITE,
        meaning="Our certificate, its key or the certificates we trust cannot be used.",
        advice="`prefect-dicom doctor` names each file and its fault.",
        explanation="""
The files of `tls` were checked before the run began, and could not be used when a connection was
to be opened: they were deleted, replaced by others, or their permissions changed. A renewal that
writes certificate and key one after the other is no fault: the last ones that could be used stay
in use until both are there.""",
    ),
    Reason(
        "sender-certificate-refused",
        OPERATOR,
        Scope.NODE,
        meaning="Nothing arrived, and meanwhile our receiver refused a sender's certificate.",
        advice="The message, or the notes of `prefect-dicom status`, say what is wrong with it: "
        "put its CA into `trust`, add it to `receiver.allowed_certificates`, or have it renewed.",
        explanation="""
The PACS connected to our receiver over TLS, and showed no certificate, one that is not trusted,
has expired or has been revoked, or one that `receiver.allowed_certificates` does not name, or not
for the AE title that it called itself. Many PACS show no certificate until one is configured for
sending too. One that is limited to servers (Extended Key Usage) is refused: it needs
`clientAuth`.""",
        needs_diagnosis=True,
        explains_silence=7,
    ),
    Reason(
        "receiver-certificate-refused",
        OPERATOR,
        Scope.NODE,
        meaning="Nothing arrived, and meanwhile a sender refused the certificate of our receiver.",
        advice="Have the CA of our receiver's certificate added to those that the PACS trusts.",
        explanation="""
The PACS connected to our receiver over TLS, and ended the handshake with an alert about our
certificate: unknown CA, expired, or not acceptable. `prefect-dicom doctor` prints the certificate.
Some PACS want the name under which they know us among its names.""",
        needs_diagnosis=True,
        explains_silence=6,
    ),
    Reason(
        "sender-without-tls",
        OPERATOR,
        Scope.NODE,
        meaning="Nothing arrived, and meanwhile plain DICOM came to our receiver, which has TLS.",
        advice="Have TLS switched on for our entry in the PACS's table of known nodes.",
        explanation="""
The connection began with an association request in plain DICOM; the receiver of a site with
`receiver.tls` takes TLS only, from the first byte on. In Orthanc it is `"UseDicomTls": true` in
the entry of our receiver. The connection was reset before anything of it was used.""",
        needs_diagnosis=True,
        explains_silence=5,
    ),
    Reason(
        "sender-with-tls",
        OPERATOR,
        Scope.NODE,
        meaning="Nothing arrived, and meanwhile TLS came to our receiver, which has plain DICOM.",
        advice="Set `receiver.tls`, or have TLS switched off for our entry in the PACS's table of "
        "known nodes.",
        explanation="""
The connection began with a TLS handshake. A PACS that is set to secure connections for all of its
nodes uses TLS to us too. Queries from here to it may be plain all the same: the two directions are
configured separately.""",
        needs_diagnosis=True,
        explains_silence=4,
    ),
    Reason(
        "sender-tls-failed",
        OPERATOR,
        Scope.NODE,
        meaning="Nothing arrived, and meanwhile the TLS handshake of a sender with our receiver "
        "failed.",
        advice="Have TLS 1.2 with ECDHE and AES-GCM, or TLS 1.3, enabled on the PACS for sending; "
        "the message has the cause.",
        explanation="""
Mostly the PACS and our receiver have no TLS version or cipher suite in common: it uses a retired
profile (TLS 1.0 with CBC; `+pa` in DCMTK) for what it sends. Its profile for sending may be
another one than for receiving.""",
        needs_diagnosis=True,
        explains_silence=3,
    ),
)
