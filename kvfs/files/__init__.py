"""Ordinary POSIX files on the drive's blocks: see DESIGN.md here."""
