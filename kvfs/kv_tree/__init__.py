"""Models and sequences as folders and files."""
