"""Request strategy: in what form the missing instances are requested next.

A strategy says how many UIDs a request lists, which presentation contexts a C-GET proposes, and
whether whole series or studies are requested. The first one is the quickest that the peer's
capabilities allow; after a round of requests that brought nothing the next one is tried. What a
reason means for the next request is in the table of reasons (:mod:`prefect_dicom.core.reasons`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from prefect_dicom.config.capabilities import NodeCapabilities, Service
from prefect_dicom.config.node import NodeSettings
from prefect_dicom.core.model import (
    Evidence,
    InformationModel,
    InstanceKey,
    RetrieveMethod,
)
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.core.uids import is_uid
from prefect_dicom.network.find.query_capabilities import QueryCapabilities
from prefect_dicom.network.presentation_contexts import (
    COMMON_CLASSES,
    STORAGE_CLASSES,
    Breadth,
    NegotiatedContexts,
    context_groups,
    filled_up,
    with_successors,
)
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import (
    UNABLE_TO_PERFORM_SUBOPERATIONS,
    is_out_of_resources,
    reason_for_status,
)
from prefect_dicom.network.upper_layer.negotiation import STORAGE_CONTEXTS
from prefect_dicom.retrieval.bounds import CLASS_NOT_TOLD, SYNTAX_SEARCH
from prefect_dicom.retrieval.late_arrivals import LateArrivals
from prefect_dicom.retrieval.requests import (
    Missing,
    RetrieveRequest,
    from_both_ends,
    plan_requests,
    plan_whole_requests,
)
from prefect_dicom.retrieval.study_task import StudyTask

Contexts = tuple[tuple[str, str], ...]
"""Presentation contexts of a C-GET: SOP class and transfer syntax; empty for a C-MOVE."""

PlannedRequest = tuple[RetrieveRequest, Contexts]

_SHRINK = 7
"""After a round that brought nothing, the UID lists of a C-MOVE get this much shorter."""
_TRIES_WITHOUT_ROLES = 3
_PROVES_IGNORED_LIST = 2
"""A longer list that brought only what its first UID names was not taken as a list."""
_SEARCHED_UNTOLD = 16
"""Transfer syntaxes that are proposed one after the other where classes are not told."""
_WEB_STUDY_INSTANCES = 100
"""Instances up to which WADO-RS requests a study whole, and above by its series: some servers put
an answer together before they send it."""
_ALL_PROPOSED_FROM = 2
"""Fruitless rounds from which on a C-GET for an unlisted study proposes all transfer syntaxes."""


@dataclass(slots=True)
class PeerCapabilities:
    """What a node was seen to support in retrieve requests; shared by all threads of a run."""

    one_uid_only: bool = False
    """Of a list of UIDs it sends what one of them names, or nothing."""
    refuses_image_level: bool = False
    """It refuses requests for instances, and answers those for whole series."""
    answers_image_level: bool = False
    """It has answered a request for instances with some."""
    method: RetrieveMethod | None = None
    """The service to use where that is not as configured: C-MOVE for a C-GET it does not offer."""
    accepts_c_get: bool = False
    """It has accepted a C-GET: classes that it refuses later are not for want of the service."""
    fruitless_without_roles: int = 0
    """C-GETs for which it negotiated no roles, and sent nothing."""
    queries: QueryCapabilities = field(default_factory=QueryCapabilities)
    """Its support of the queries for a study's content."""
    contexts: NegotiatedContexts = field(default_factory=NegotiatedContexts)
    """What it has made of the presentation contexts of C-GETs."""
    late: LateArrivals = field(default_factory=LateArrivals)
    """How long after the end of a C-MOVE its instances were seen to come."""

    @property
    def may_send_without_roles(self) -> bool:
        """Whether a C-GET is worth sending to a node that ignores roles."""
        return self.fruitless_without_roles < _TRIES_WITHOUT_ROLES

    @classmethod
    def of(cls, known: NodeCapabilities, node: NodeSettings, receives: bool) -> PeerCapabilities:
        """What is known before the first request.

        Parameters
        ----------
        known : NodeCapabilities
            What was learnt of the node before the run.
        node : NodeSettings
            Its configuration.
        receives : bool
            Whether C-MOVE could be used, because the site has a receiver.
        """
        no_get = known.c_get in (Service.REFUSED, Service.NOT_OFFERED)
        by_move = node.retrieve is RetrieveMethod.C_GET and no_get and receives
        return cls(
            one_uid_only=known.uid_lists_in_retrieves is False,
            refuses_image_level=known.image_level_retrieve is False,
            method=RetrieveMethod.C_MOVE if by_move else None,
            queries=QueryCapabilities.doubting(set(known.levels) if known.levels else None),
        )

    def record_answer(self, strategy: RequestStrategy, request: RetrieveRequest) -> None:
        """A request has brought something: its form is supported."""
        self.one_uid_only = self.one_uid_only or strategy.replaces_lists
        if request.level == "IMAGE":
            self.answers_image_level = True
        elif strategy.whole:
            self.refuses_image_level = True

    def record_ignored_list(self) -> None:
        """A list of UIDs has brought only what its first one names."""
        self.one_uid_only = True


@dataclass(frozen=True, slots=True)
class RequestStrategy:
    """The form of the requests of one round.

    Parameters
    ----------
    uids : int
        The most UIDs in a list.
    breadth : Breadth
        Which transfer syntaxes a C-GET proposes together.
    whole : str, optional
        SERIES or STUDY, where whole series or studies are requested though some of their
        instances are here.
    replaces_lists : bool
        Whether it takes the place of lists of UIDs, which were refused.
    by_instance : bool
        Whether each instance is named, though whole studies or series are missing.
    """

    uids: int
    breadth: Breadth
    whole: str | None = None
    replaces_lists: bool = False
    by_instance: bool = False


def strategies(
    capabilities: PeerCapabilities, method: RetrieveMethod, uids_per_request: int
) -> Iterator[RequestStrategy]:
    """The strategies from the quickest on; the next one is for after a round without success."""
    whole = "SERIES" if capabilities.refuses_image_level else None
    most = 1 if capabilities.one_uid_only else uids_per_request
    few = most // _SHRINK
    yield RequestStrategy(most, Breadth.COMMON, whole)
    if method is RetrieveMethod.WADO_RS:
        # Each UID is a request of its own there: which ones fail, their own requests show.
        yield RequestStrategy(most, Breadth.COMMON, by_instance=True)
        return
    if method is RetrieveMethod.C_GET:
        yield RequestStrategy(most, Breadth.ALL, whole)
        if few > 1:
            yield RequestStrategy(few, Breadth.ALL, whole)
        yield RequestStrategy(most, Breadth.SINGLE, whole)
    elif few > 1:
        yield RequestStrategy(few, Breadth.COMMON, whole)
    if most > 1:
        yield RequestStrategy(1, Breadth.ALL, whole)
    if whole:
        yield RequestStrategy(1, Breadth.ALL, "STUDY")


def strategies_after_refusal(
    strategy: RequestStrategy, request: RetrieveRequest, capabilities: PeerCapabilities
) -> list[RequestStrategy]:
    """The strategies that remain where a request was refused for its form; often none."""
    if strategy.uids > 1:
        return [
            RequestStrategy(1, breadth, strategy.whole, replaces_lists=True)
            for breadth in (Breadth.COMMON, Breadth.ALL)
        ]
    if request.level == "IMAGE" and not capabilities.answers_image_level:
        return [RequestStrategy(1, Breadth.ALL, level) for level in ("SERIES", "STUDY")]
    return []


def ignores_list(targets: Sequence[set[InstanceKey]], missing: Collection[InstanceKey]) -> bool:
    """Whether a list of UIDs brought only what its first one names.

    Parameters
    ----------
    targets : sequence of set of InstanceKey
        What each UID should have brought.
    missing : collection of InstanceKey
        What is missing after the request.
    """
    brought = [not target.issubset(missing) for target in targets]
    return len(targets) > _PROVES_IGNORED_LIST and brought[0] and not any(brought[1:])


# --- ends of requests


def service_of(method: RetrieveMethod) -> str:
    """The DIMSE service of a retrieve method."""
    return "C-MOVE" if method is RetrieveMethod.C_MOVE else "C-GET"


def code_of_end(outcome: RetrieveResult, method: RetrieveMethod, *, delivers: bool) -> str:
    """The reason code of a request that brought nothing.

    A PACS that says which instances it could not send says more than its status. But for A702 to
    a C-MOVE, before anything has come: a receiver that it cannot reach makes it say the same.

    Parameters
    ----------
    delivers : bool
        Whether instances have come from the node in this run.
    """
    if outcome.turned_away is not None:
        return outcome.turned_away
    if outcome.lost is not None:
        return outcome.lost
    if outcome.status is None:
        return "association-lost"
    code = reason_for_status(service_of(method), outcome.status)
    if outcome.failed and not outcome.sent:
        way_is_open = delivers or method is not RetrieveMethod.C_MOVE
        if code is None or (way_is_open and outcome.status == UNABLE_TO_PERFORM_SUBOPERATIONS):
            return "instances-missing"
    return code or "nothing-arrived"


def is_refused_for_form(outcome: RetrieveResult, method: RetrieveMethod) -> bool:
    """Whether a request was refused for its form."""
    if outcome.status is None or outcome.lost is not None:
        return False
    return reason_for_status(service_of(method), outcome.status) == "request-refused"


def is_final(failure: str | None) -> bool:
    """Whether a study's failure stands though no instance is missing."""
    return failure is not None and reason_for(failure).stands_though_complete


def is_specific(failure: str | None) -> bool:
    """Whether a study's failure explains what is missing better than the end of a request does."""
    return failure is not None and reason_for(failure).says_more_than_request


def refuses_c_get(code: str) -> bool:
    """Whether a C-GET ended so that another C-GET would end the same way."""
    return code == "sop-classes-refused" or reason_for(code).refuses_service


def is_worth_repeating(outcome: RetrieveResult | None) -> bool:
    """Whether a request broke off, or ended in a way that says nothing about the PACS."""
    if outcome is None:
        return True
    return outcome.lost is not None and reason_for(outcome.lost).cuts_transfer


def code_of_strain(outcome: RetrieveResult, brought: int) -> str | None:
    """The reason code where a request ended as if the node had too much to do; else None."""
    if outcome.turned_away is not None:
        return None
    if outcome.status is not None and is_out_of_resources(outcome.status):
        return "pacs-busy"
    if outcome.lost == "pacs-busy":
        return "pacs-busy"
    if brought or (outcome.lost or "association-stalled") != "association-stalled":
        return None
    if outcome.lost is not None:
        return outcome.lost
    return "nothing-arrived" if outcome.reports_success else None


# --- the requests of a round


def plan_round(
    tasks: Sequence[StudyTask],
    strategy: RequestStrategy,
    node: NodeSettings,
    method: RetrieveMethod,
    offered: NegotiatedContexts,
) -> Iterator[PlannedRequest]:
    """Plan the requests of one round for listed instances.

    Each is planned when it is its turn: what an earlier one has brought is not in a later one.
    """
    if strategy.whole:
        # The whole of a study is not requested where series of it are not wanted.
        some = [t for t in tasks if strategy.whole == "SERIES" or not t.unwanted_series]
        for missing, contexts in missing_by_proposal(some, strategy, method, offered):
            for request in plan_whole_requests(missing, strategy.whole):
                yield request, contexts
        return
    # A series that is not wanted is listed, so that the study is not requested as a whole.
    listed = {
        task.reference: [
            *task.instances.listed,
            *(InstanceKey(series, "") for series in task.unwanted_series),
            *(InstanceKey(series, "") for series in _named_by_instance(task, strategy)),
        ]
        for task in tasks
    }
    whole_study = _WEB_STUDY_INSTANCES if method is RetrieveMethod.WADO_RS else None
    patient_root = node.query_model is InformationModel.PATIENT_ROOT
    for missing, contexts in missing_by_proposal(tasks, strategy, method, offered):
        if strategy.uids == 1:
            missing = {study: from_both_ends(keys) for study, keys in missing.items()}
        # In the Patient Root a request names one patient, and so one study at a time.
        groups = [{r: keys} for r, keys in missing.items()] if patient_root else [missing]
        for group in groups:
            for request in plan_requests(
                group,
                listed,
                request_instances=node.limits.request_instances,
                uids_per_request=strategy.uids,
                study_instances=whole_study,
            ):
                yield request, contexts


def _named_by_instance(task: StudyTask, strategy: RequestStrategy) -> set[str]:
    """The series that are requested by their instances though all of these are missing."""
    if not strategy.by_instance:
        return set()
    return {key.series_instance_uid for key in task.instances.listed}


def missing_by_proposal(
    tasks: Sequence[StudyTask],
    strategy: RequestStrategy,
    method: RetrieveMethod,
    offered: NegotiatedContexts,
) -> Iterator[tuple[Missing, Contexts]]:
    """The missing instances, for a C-GET in groups whose SOP classes fit into one proposal.

    What the node has refused before is not proposed again.
    """
    if method is not RetrieveMethod.C_GET:
        yield {task.reference: task.to_request() for task in tasks}, ()
        return
    classes = Counter(
        sop_class
        for task in tasks
        for key in task.to_request()
        if (sop_class := task.instances.class_to_propose(key))
    )
    ordered = [sop_class for sop_class, _ in classes.most_common()]
    searched = strategy.breadth is Breadth.SINGLE
    planned = (
        (missing, contexts)
        for group, contexts in _proposals(ordered, strategy.breadth, offered)
        if (missing := _missing_of(tasks, group))
    )
    yield from islice(planned, SYNTAX_SEARCH.most if searched else None)
    # Some PACS do not return the classes of their instances: all are tried in turn.
    proposals = _proposals(_classes_to_try(strategy), strategy.breadth, offered)
    most = _SEARCHED_UNTOLD if searched else CLASS_NOT_TOLD.most
    for _, contexts in islice(proposals, most):
        missing = _missing_of(tasks, {""})
        if not missing:
            return
        yield missing, contexts


def _proposals(
    sop_classes: Sequence[str], breadth: Breadth, offered: NegotiatedContexts
) -> Iterator[tuple[frozenset[str], Contexts]]:
    """Groups of SOP classes with the contexts that are worth proposing for them."""
    proposed = with_successors(sop_classes) if breadth is Breadth.COMMON else sop_classes
    for group, contexts in context_groups(proposed, breadth):
        worth = offered.worth_proposing(contexts, breadth)
        if worth and breadth is Breadth.ALL:
            worth = offered.worth_proposing(filled_up(worth), breadth)
        if worth:
            yield group, worth


def _classes_to_try(strategy: RequestStrategy) -> Sequence[str]:
    """The classes that are proposed for instances whose own is not told.

    All of the standard in the usual encodings, the usual ones in all encodings, and as many as an
    association takes in one encoding after the other; what is behind these is not worth hundreds
    of requests.
    """
    if strategy.breadth is Breadth.SINGLE:
        return STORAGE_CLASSES[:STORAGE_CONTEXTS]
    if strategy.uids == 1:
        return ()
    return STORAGE_CLASSES if strategy.breadth is Breadth.COMMON else COMMON_CLASSES


def _missing_of(tasks: Sequence[StudyTask], sop_classes: Collection[str]) -> Missing:
    missing: Missing = {}
    for task in tasks:
        keys = [k for k in task.to_request() if task.instances.class_to_propose(k) in sop_classes]
        if keys:
            missing[task.reference] = keys
    return missing


def plan_unlisted_round(
    task: StudyTask,
    node: NodeSettings,
    method: RetrieveMethod,
    fruitless: int,
    offered: NegotiatedContexts,
) -> Iterator[PlannedRequest]:
    """Plan the requests of one round for a study of which no instances are listed.

    Parameters
    ----------
    fruitless : int
        How many rounds before have brought nothing.
    """
    whole = _asks_for_whole(task, node.limits.request_instances, fruitless)
    for contexts in _contexts_of_unlisted(task, method, fruitless, offered):
        if whole:
            yield RetrieveRequest("STUDY", (task.reference,), expected=None), contexts
            continue
        lost = {k.series_instance_uid for k in task.missing()}
        for uid in dict.fromkeys([*task.short_series(), *lost]):
            request = RetrieveRequest("SERIES", (task.reference,), (uid,), expected=None)
            yield request, contexts


def _asks_for_whole(task: StudyTask, most_instances: int, fruitless: int) -> bool:
    if task.unwanted_series:
        return False
    if task.content.evidence is not Evidence.SERIES_COUNTS:
        return True
    # Some PACS do not support retrieves at SERIES level: they alternate with STUDY level.
    starts_whole = task.is_untouched and task.content.counted_instances <= most_instances
    return starts_whole != (fruitless % 2 == 1)


def _contexts_of_unlisted(
    task: StudyTask, method: RetrieveMethod, fruitless: int, offered: NegotiatedContexts
) -> Iterator[Contexts]:
    """What a C-GET proposes in turn: the classes that were received, and then all others.

    Where that has been in vain, the usual ones once more, and then in all transfer syntaxes.
    """
    if method is not RetrieveMethod.C_GET:
        yield ()
        return
    known = Counter(instance.sop_class_uid for instance in task.instances.listed.values())
    classes = [uid for uid, _ in known.most_common() if is_uid(uid)]
    breadth = Breadth.ALL if fruitless >= _ALL_PROPOSED_FROM else Breadth.COMMON
    others = COMMON_CLASSES if fruitless else STORAGE_CLASSES
    for _, contexts in _proposals([*classes, *others], breadth, offered):
        if not task.is_incomplete:
            return
        yield contexts
