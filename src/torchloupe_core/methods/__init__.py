"""The native methods, one file a family."""
