"""Continuous data protection for PostgreSQL: capture every write, restore to any one of them."""

__version__ = "0.1.0"
