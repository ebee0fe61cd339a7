"""Metadata tables of LAION, COYO, DataComp and the like: one schema, rules, joins, deduplication."""
