"""The columns of the table of reasons: texts for people, and reactions of the program."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from prefect_dicom.core.model import Disposition, Verdict

PAGE = "docs/reasons.md"
"""Page with a section for each reason; ``prefect-dicom explain`` prints it."""


class Scope(StrEnum):
    """How far a reason reaches: what else fails with it."""

    REQUEST = "request"
    """One request, and the row or study it was made for. The node's other requests go on."""
    STUDY = "study"
    """One row, study or instance, whatever the requests made for it ended with."""
    NODE = "node"
    """All requests to one PACS node."""
    SITE = "site"
    """All nodes: the site's configuration, receiver, spool, archive or ledger."""


class Consequence(StrEnum):
    """What follows from a finding on an instance, gravest first."""

    QUARANTINE = "quarantine"
    """It is not what was requested: never archived under this study."""
    ASK_AGAIN = "ask-again"
    """Faulty in transfer or at its source: requested once more, then the site's policy."""
    WARN = "warn"
    """Archived as received, with the finding in the study's manifest."""


_RERUN = {
    Disposition.TRANSIENT: "Yes, and nobody has to act: the run itself retries after a while, "
    "and so does `prefect-dicom rerun`.",
    Disposition.PERMANENT: "Not by itself: the result would be the same. Once something has "
    "changed, `prefect-dicom rerun COHORT --reason {code}` retries.",
    Disposition.OPERATOR: "Yes, once the cause is removed: `prefect-dicom rerun` continues "
    "with what is left. Archived instances are not requested again.",
}


def pointer(code: str) -> str:
    """How to read more about a reason: by a command, which whoever has the message has too."""
    return f"`prefect-dicom explain {code}`"


@dataclass(frozen=True, slots=True)
class Reason:
    """One entry of the table. A column that is left out has the value of most reasons."""

    code: str
    """Words joined by hyphens. It is stable: people filter and count by it."""
    disposition: Disposition
    """Whether trying again can help, and who has to act."""
    scope: Scope
    """What else fails with it."""

    # --- texts for people
    meaning: str
    """What happened, in one sentence."""
    advice: str
    """What a person should do, in a sentence or two."""
    explanation: str
    """Causes by PACS, and how to find them. Markdown."""
    rerun: str = ""
    """Whether a rerun helps, where the disposition does not answer that."""

    # --- rows
    row_verdict: Verdict = Verdict.FAILED
    """The verdict of a row that ends with this reason."""
    specificity: int = 0
    """Priority among the reasons of several nodes for a row without studies: the highest is the
    row's; those with 0 are not compared."""
    settles_row: bool = False
    """No other node is queried for the row: none could resolve it."""
    inconclusive: bool = False
    """The node's answers neither find the row's studies nor show that there are none."""
    beside_studies: bool = False
    """A row may have it in addition to found studies, which are pulled."""

    # --- instances
    consequence: Consequence | None = None
    """What follows where validation finds it on an instance; None: it is no finding."""

    # --- studies
    failover: bool = True
    """Whether another node may still deliver a study that failed with this reason."""
    stands_though_complete: bool = False
    """A study keeps it even if no instance is missing; other reasons only explain missing ones."""
    says_more_than_request: bool = False
    """It explains missing instances better than the status of the request that omitted them."""

    acceptable: bool = False
    """A person can accept studies that failed with it, as they are."""

    # --- requests
    retry_once: bool = False
    """Retry once, at once: the network may have been the cause."""
    counts_against_node: bool = False
    """Several queries in a row that end with it disable the node (``requests-keep-failing``)."""
    refuses_query: bool = False
    """The node refuses this query; it may answer another one."""
    refuses_form: bool = False
    """The node refuses the form of a request; the same request in another form may be answered."""
    fails_uid_list: bool = False
    """A query by a list of UIDs that ends with it is replaced by one query for each UID."""
    unanswered: bool = False
    """The request ended without a usable answer, because of the request or of the node."""
    refuses_service: bool = False
    """The node accepts associations and does not provide this service to us."""
    cuts_transfer: bool = False
    """A retrieve was interrupted; repeating it does not count as an attempt of the study."""
    needs_diagnosis: bool = False
    """A retrieve without instances has several possible causes; further queries find which."""
    may_stop_midway: bool = False
    """A retrieve that ends with it may have stopped at its first instance; others may exist."""

    # --- nodes
    disables_node_after: int = 1
    """Failures in a row that disable a node, unless the disposition is transient: a node that
    fails for a transient reason has as many as there are waits."""
    transient_before_success: bool = True
    """False: transient only where the node has worked in this run; otherwise a person must act."""

    explains_silence: int = 0
    """How well a connection that was turned away explains that nothing arrived: the highest is
    reported. With 0 it does not."""
    shows_certificate: bool = False
    """The doctor shows the certificate that was not accepted, for people to compare."""

    # --- archive
    refuses_wrong_hash: bool = False
    """An object store may report bytes with a wrong hash by this reason."""

    @property
    def what_to_do(self) -> str:
        """The advice as shown to people, with a pointer to the explanation."""
        return f"{self.advice} More: {pointer(self.code)}"

    @property
    def ends_discovery(self) -> bool:
        """Whether a row with this reason is not queried again by itself.

        Of the reasons for a person to act, those that make a row ambiguous concern the row and
        not the PACS.
        """
        return self.disposition is Disposition.PERMANENT or self.row_verdict is Verdict.AMBIGUOUS

    def section(self) -> str:
        """The reason's section of the page, as Markdown."""
        rerun = self.rerun or _RERUN[self.disposition].format(code=self.code)
        return (
            f"## {self.code}\n\n**What happened.** {self.meaning}\n\n{self.explanation.strip()}\n\n"
            f"**What to do.** {self.advice}\n\n**Does a rerun help?** {rerun}\n"
        )
