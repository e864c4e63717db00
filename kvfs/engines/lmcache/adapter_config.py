"""The L2 adapter's settings as LMCache reads them: `adapter_params` of its JSON."""

from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase

from kvfs.engines.lmcache.settings import Settings


class KvfsL2AdapterConfig(L2AdapterConfigBase):
    """See Settings for the fields."""

    def __init__(self, settings: Settings):
        self.settings = settings

    @classmethod
    def from_dict(cls, d: dict) -> "KvfsL2AdapterConfig":
        return cls(Settings.of(d))

    @classmethod
    def help(cls) -> str:
        return f"kvfs L2 adapter config fields:\n{Settings.__doc__}"
