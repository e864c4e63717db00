"""Prefix reuse in the simulated set of drives: publish, find and restore, while parts move to other drives."""

from kvfs.drive_set.drive_set import DriveSet

from .oracle import Lost
from .prefix_workload import ALMOST_FULL_BYTES, PrefixWorkload
from .set_simulator import SetSimulation, SetWorkload


class SetPrefixWorkload(PrefixWorkload, SetWorkload):
    """Both."""


class SetPrefixSimulation(SetSimulation):
    """A SetSimulation whose workload publishes and restores."""

    new_workload = SetPrefixWorkload

    def settle(self) -> None:
        super().settle()
        check_prefixes(self.store)


def check_prefixes(store: DriveSet) -> None:
    """Raises Lost unless each drive's entries fit, and what all drives of a sequence publish is found."""
    catalogues = [member.store._catalogue for member in store._live]
    for catalogue in catalogues:
        problems = catalogue.prefixes.problems()
        if problems:
            raise Lost("; ".join(problems))
    if any(catalogue.batch.free_bytes < ALMOST_FULL_BYTES for catalogue in catalogues):
        return
    for sequence in store.sequences():
        found = [part.store._catalogue.prefixes.publication(part._row.id) for part in sequence._parts]
        tenants = {publication and publication[0] for publication in found}
        if len(tenants) > 1 or None in tenants:
            continue  # not published, or by some of the parts when the power failed
        (tenant,) = tenants
        tokens = sequence.tokens[: min(part._row.num_spilled for part in sequence._parts)]
        found = store.find_prefix(sequence.model, tokens, tenant).num_tokens
        if found != len(tokens) // sequence.model.group_tokens * sequence.model.group_tokens:
            raise Lost(f"of {len(tokens)} tokens of {sequence.name!r}, which is published, {found} are found")
