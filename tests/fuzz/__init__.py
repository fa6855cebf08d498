"""Hostile and unlucky inputs by the thousand: see ``run``."""
