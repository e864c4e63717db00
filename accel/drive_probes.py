"""What is timed in the drive, beside its media (ftl/media_timed.py)."""

from spdk_glue.probes import Probe, Probes


class DriveProbes:
    """One for a drive; its log page has these and the media's.

    command: an attention command from its submission to its answer; resolve: its pages resolved and pinned;
    worker_wait: of work that is ready until a worker takes it; kernel: of each worker that computes a part
    """

    def __init__(self, *of_media: Probe):
        self.command = Probe("drive", "attention")
        self.resolve = Probe("ftl", "resolve")
        self.read = Probe("ftl", "read")
        self.write = Probe("ftl", "write")
        self.flush = Probe("ftl", "flush")
        self.deallocate = Probe("ftl", "deallocate")
        self.worker_wait = Probe("queue", "worker_wait", is_wait=True)
        self.kernel = Probe("kernel", "attention")
        self.all = Probes(*vars(self).values(), *of_media)
