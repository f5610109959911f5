"""Both tiers in one process, over one engine and one page pool: the same workers, which take turns on the device."""
