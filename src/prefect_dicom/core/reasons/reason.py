"""The columns of the table of reasons: what is said to people, and what the program does."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from prefect_dicom.core.model import Disposition, Verdict

PAGE = "docs/reasons.md"
"""Where every reason has a section of its own; ``prefect-dicom explain`` prints it."""


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
    """It is not what was asked for: never archived under this study."""
    ASK_AGAIN = "ask-again"
    """Faulty in transfer or at its source: asked for once more, then the site's policy."""
    WARN = "warn"
    """Archived as it came, with the finding in the study's manifest."""


_RERUN = {
    Disposition.TRANSIENT: "Yes, without anybody doing anything: the run itself tries it again "
    "after a while, and `prefect-dicom rerun` does.",
    Disposition.PERMANENT: "Not by itself: the same would come of it. Once something has changed, "
    "`prefect-dicom rerun COHORT --reason {code}` tries it again.",
    Disposition.OPERATOR: "Yes, once the cause is gone: `prefect-dicom rerun` goes on with "
    "what is left. Nothing that was archived before is asked for again.",
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
    """What is behind it: which PACS says it when, and how to find the cause. Markdown."""
    rerun: str = ""
    """Whether a rerun helps, where the disposition does not answer that."""

    # --- rows
    row_verdict: Verdict = Verdict.FAILED
    """The verdict of a row that ends with this reason."""
    specificity: int = 0
    """Of the reasons that several nodes gave for a row without studies, the highest is the row's;
    those with 0 are not compared."""
    settles_row: bool = False
    """No other node is asked for the row: none could answer the question that it raises."""
    inconclusive: bool = False
    """The node's answers neither find the row's studies nor show that there are none."""
    beside_studies: bool = False
    """A row may have it beside the studies that it found, which are pulled."""

    # --- instances
    consequence: Consequence | None = None
    """What follows where validation finds it on an instance; None: it is no finding."""

    # --- studies
    failover: bool = True
    """Whether another node may still deliver a study that failed for it."""
    stands_though_complete: bool = False
    """A study keeps it though no instance is missing; other reasons only say why one is."""
    says_more_than_request: bool = False
    """It explains missing instances better than the end of the request that left them out."""

    # --- requests
    retry_once: bool = False
    """The request is repeated at once, one time: the network may have been the cause."""
    counts_against_node: bool = False
    """Queries in a row that end so disable the node (``requests-keep-failing``)."""
    refuses_query: bool = False
    """The node does not answer the query as it is put; it may answer another one."""
    fails_uid_list: bool = False
    """A query by a list of UIDs that ends so is replaced by one query for each UID."""
    unanswered: bool = False
    """The request ended without a usable answer, because of the request or of the node."""
    refuses_service: bool = False
    """The node speaks DICOM and does not provide this service to us."""
    cuts_transfer: bool = False
    """A retrieve broke off under way; repeating it is not held against the study."""
    needs_diagnosis: bool = False
    """A retrieve that brought nothing ends so for several causes; further queries tell which."""
    may_stop_midway: bool = False
    """A retrieve that ends so may have stopped at its first instance, others being available."""

    # --- nodes
    disables_node_after: int = 1
    """Failures in a row that disable a node, unless the disposition is transient: a node that
    fails for a transient reason has as many as there are waits."""
    transient_before_success: bool = True
    """False: transient of a node that has worked in this run, otherwise a case for a person."""

    # --- archive
    refuses_wrong_hash: bool = False
    """An object store may say so of bytes that do not have the hash they were sent with."""

    @property
    def what_to_do(self) -> str:
        """The advice as it is shown to people: with where to read more."""
        return f"{self.advice} More: {pointer(self.code)}"

    @property
    def ends_discovery(self) -> bool:
        """Whether a row that ended so is not queried again by itself.

        Of the reasons for a person to act, those that make a row ambiguous concern the row and
        not the PACS.
        """
        return self.disposition is Disposition.PERMANENT or self.row_verdict is Verdict.AMBIGUOUS

    def section(self) -> str:
        """Everything there is to say about the reason, as a section of Markdown."""
        rerun = self.rerun or _RERUN[self.disposition].format(code=self.code)
        return (
            f"## {self.code}\n\n**What happened.** {self.meaning}\n\n{self.explanation.strip()}\n\n"
            f"**What to do.** {self.advice}\n\n**Does a rerun help?** {rerun}\n"
        )
