"""sage: a declarative reconciler for inference engines. The rooms of the house are told in docs/design.md."""

import sys

__version__ = "0.1.0"

_WAS_TOLD = sys.dont_write_bytecode
sys.dont_write_bytecode = True
from sage_reconcile.bytecode import modules_fit  # noqa: E402 - before anything else is imported

sys.dont_write_bytecode = _WAS_TOLD or not modules_fit()
