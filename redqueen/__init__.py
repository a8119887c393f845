"""The domain of Red Queen: pure Python, no Dagster and no torch.

Everything here can be imported, read and tested without an orchestrator. Effects (store, clock, network) are
passed in; what decides is pure.
"""

__version__ = "0.1.0"
