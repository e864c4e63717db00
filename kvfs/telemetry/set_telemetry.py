"""What a set of drives adds so that it can be seen: the same as a store, of all its drives."""

from itertools import islice

from kvfs.telemetry.visible_store import OF_THE_STORE, Visible, sequence_facts, telemetry_of


class VisibleSet(Visible):
    """A part of DriveSet."""

    def telemetry(self) -> dict:
        """As Store.telemetry; a drive that is lost has a state and no numbers."""
        with self._lock:
            self._check_open()
            counters = self.counters()
            states = {row["id"]: row for row in counters["drives"]}
            drives = []
            for member in self._members.values():
                row = {"drive": member.location, "state": states[member.drive_id]["state"]}
                if member.lost is None:
                    with member.in_use("its telemetry") as store:
                        row |= store._own_drive_telemetry(store.counters())
                drives.append(row)
            return telemetry_of(
                self.path,
                drives,
                self._requests,
                {name: counters[name] for name in OF_THE_STORE},
                {"models": len(self._models), "sequences": len(self._placed), "tokens": None},
            )

    def drive_map(self) -> list[dict]:
        """As Store.drive_map, of drives that are not lost."""
        with self._lock:
            self._check_open()
            maps = []
            for member in self._live:
                with member.in_use("its map") as store:
                    maps += [{**found, "drive": member.location} for found in store.drive_map()]
            return maps

    def newest_sequences(self, limit: int = 100) -> list[dict]:
        """As Store.newest_sequences."""
        with self._lock:
            self._check_open()
            models = {model.id: model for model in self._models.values()}
            rows = sorted(self.catalogue_rows(), key=lambda row: -row.created_ns)
            return [sequence_facts(row, models[row.model_id]) for row in islice(rows, limit)]
