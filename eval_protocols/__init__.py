"""Protocols that score a frozen encoder; one file a protocol, and the folder is the registry (`ssl-eval NAME ...`)."""
