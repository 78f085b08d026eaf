"""Text that people have: files of a source, readers of each kind, token files of other projects."""
