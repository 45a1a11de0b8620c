"""The public services: each decodes, checks, calls its core and encodes, and nothing else."""
