"""The operations of the package, one folder each."""
