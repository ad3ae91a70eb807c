"""One file for each system that is compared; ../adapter.py says what it must offer."""
