"""Ordinary POSIX files on the drive's blocks."""
