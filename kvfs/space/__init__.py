"""Caps on what models and tenants may take of the flash, and who goes first."""
