"""The version, in a file that imports nothing: what any floor may ask without importing the package."""

__version__ = "0.1.0"
