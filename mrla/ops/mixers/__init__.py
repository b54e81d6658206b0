"""Mixers: the contract, the registry of methods, and a file for each method."""

# Importing a method's file registers it; in this order they are listed.
# ruff: noqa: F401, I001
from . import light
from . import base
from . import exact
from . import depthwise
