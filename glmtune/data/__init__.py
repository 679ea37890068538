"""From files of any common layout to token rows and batches."""
