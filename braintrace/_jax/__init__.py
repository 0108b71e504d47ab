"""The one door to JAX internals and versions.

Everything here is decided by capability (``hasattr``, ``isinstance``), never by a version number.
"""

from .primitives import *  # noqa: F403
from .programs import *  # noqa: F403
from .values import *  # noqa: F403
