"""Names, objects and places: all SQL of the product but fsck's. Rows only; tiers are not known."""
