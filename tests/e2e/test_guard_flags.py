"""`handfast guard` by flags and by a file: both say the same, and what is wrong is told."""
