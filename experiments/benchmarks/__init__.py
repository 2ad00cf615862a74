"""Each part of the project measured beside its peer."""
