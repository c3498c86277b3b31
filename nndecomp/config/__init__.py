"""Every setting a run can have, as typed records. Imports no torch, so `--help` and sweeps are instant."""
