"""Reasons of nodes that speak DICOMweb: answers, forms of requests, credentials."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons.reason import Reason, Scope

TRANSIENT, PERMANENT, OPERATOR = Disposition


WEB = (
    Reason(
        "wado-sends-nothing",
        OPERATOR,
        Scope.NODE,
        meaning=(
            "The DICOMweb server lists one study after the other and sends none of their "
            "instances by WADO-RS."
        ),
        advice=(
            "Read the server's log for the requests that ended so; check `retrieve_path` of the "
            "node, and that the account may retrieve."
        ),
        explanation="""
Three studies in a row (ten, where others had come before) were listed by the server, are still
listed on a second look, and not even a single instance of them came. Searches and retrievals may
have separate paths and permissions: an account that may search need not be allowed to retrieve. The
studies that were tried keep their reasons, the others stay pending; `prefect-dicom pull` with the
same cohort file continues with those.""",
    ),
    Reason(
        "response-cut-short",
        TRANSIENT,
        Scope.REQUEST,
        meaning="The answer of the DICOMweb server ended before its closing delimiter.",
        advice=(
            "Rerun; if it repeats, the server's log of this minute names what it could not read "
            "or convert."
        ),
        explanation="""
A multipart answer is whole when its closing delimiter has come, whatever its status and its length.
Orthanc sends status 200, some instances, and then closes the connection where it cannot decode the
next one; a proxy on the way cuts answers that are too long or too slow for it. Instances that were
whole are kept, the others are requested again, at last one by one, so that only those stay missing
that the server cannot send.""",
        unanswered=True,
        cuts_transfer=True,
        acceptable=True,
    ),
    Reason(
        "transfer-syntax-not-offered",
        PERMANENT,
        Scope.REQUEST,
        meaning="The DICOMweb server does not send instances in the encoding they are stored in.",
        advice=(
            "Have the server's administrator allow `transfer-syntax=*`, or retrieve from this "
            "archive by C-GET or C-MOVE."
        ),
        explanation="""
Status 406: the server takes neither of the forms in which instances are requested as they are
stored, nor `application/dicom; transfer-syntax=*` for one instance. Any other request would have
the server convert them, and what arrives would not be what the archive holds; that is never
requested.""",
        refuses_form=True,
        acceptable=True,
    ),
    Reason(
        "credentials-missing",
        OPERATOR,
        Scope.NODE,
        meaning="A password, secret or token for the DICOMweb server is not there.",
        advice=(
            "Set the environment variable that `authentication` names where the run starts, or "
            "let the file be readable for its user."
        ),
        explanation="""
The site file names where a secret comes from and never holds it: `variable` is an environment
variable of the process that runs (a Prefect worker has an environment of its own), `file` a file
with a bearer token, and SigV4 takes its keys from the usual chain of AWS: environment, profile,
role of the instance. The message says which of them was looked for.""",
    ),
    Reason(
        "token-not-issued",
        OPERATOR,
        Scope.NODE,
        meaning="The issuer of tokens did not give one for the DICOMweb server.",
        advice=(
            "Check `endpoint`, `client` and `scope` of `authentication`, the secret in its "
            "variable, and whether the issuer can be reached from this host."
        ),
        explanation="""
The request for a token (OAuth 2.0 client credentials, RFC 6749 4.4) failed; the message has the
status. 400 and 401 are a wrong client ID, secret or scope, no connection is a firewall or a proxy:
the issuer often stands elsewhere than the server.""",
    ),
)
