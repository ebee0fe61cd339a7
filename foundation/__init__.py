"""What every job shares: errors for people, strict recipes, atomic files, progress, provenance."""
