"""Documents that are given to this node: checked, planned, accepted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mvm.domain.desired import DesiredState, changed_parts, check_for_node, parse
from mvm.domain.document import decode_json
from mvm.domain.ids import NodeId
from mvm.domain.job import Job, JobVerb
from mvm.domain.planner import check_possible
from mvm.domain.plans import Plan
from mvm.ports.store import NodeStore
from mvm.services.audit import Audit
from mvm.services.jobs import Jobs
from mvm.services.reconcile import Reconcile


class DesiredStates:
    """A document is checked whole before anything of it is done; then it is stored, and then a job is asked for."""

    def __init__(self, store: NodeStore, jobs: Jobs, reconcile: Reconcile, audit: Audit, node_id: NodeId) -> None:
        self._store = store
        self._jobs = jobs
        self._reconcile = reconcile
        self._audit = audit
        self._node_id = node_id

    def plan(self, content: bytes, *, prune: bool) -> Plan:
        """What would be done now; raises all that `apply` raises of the document."""
        return self._checked(decode_json(content), prune)[1]

    def apply(self, content: bytes, *, prune: bool, expect: str | None, actor: str) -> tuple[Plan, Job]:
        """Accept a document as this node's desired state; returns what is to be done and the job that begins it.

        `prune`: also destroy what it does not list. `expect` is the fingerprint of the plan that is meant. Raises
        ``desired.*`` for a document that cannot be, is not for this node, is outdated, or no longer has that plan.
        """
        value = decode_json(content)
        state, plan = self._checked(value, prune)
        if expect is not None:
            plan.check_current(expect)
        with self._store.transaction():
            stored = self._store.desired()
            known = parse(stored) if stored is not None else None
            check_for_node(state, self._node_id, known)
            generation = state.generation if known is None or state.generation is not None else known.generation
            self._store.put_desired({**value, **({} if generation is None else {"generation": generation})})
            for tenant, before, after in changed_parts(stored or {}, value):
                self._audit.called(tenant, "desired.apply", actor, before, after)
        self._audit.soon()
        # It is accepted, and a sweep may be first to do it. Only what sweeps do not do is asked for again.
        params = {"prune": prune, **({"expect": expect} if expect is not None and prune else {})}
        job = self._jobs.submit(JobVerb.NODE_RECONCILE, self._node_id, self._node_id, params=params, actor=actor)
        return plan, job

    def _known(self) -> DesiredState | None:
        stored = self._store.desired()
        return parse(stored) if stored is not None else None

    def _checked(self, value: Any, prune: bool) -> tuple[DesiredState, Plan]:
        state = parse(value)
        check_for_node(state, self._node_id, self._known())
        observed = self._reconcile.observe(state)
        check_possible(state, observed)
        asked = replace(state, prune_unknown_tenants=True, prune_unknown_pools=True) if prune else state
        return state, Plan.make(_without_generation(asked), observed)


def _without_generation(state: DesiredState) -> DesiredState:
    """The fingerprint is of what is asked for, not of how often."""
    return replace(state, generation=None)
