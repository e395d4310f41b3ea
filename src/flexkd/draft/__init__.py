"""A first recipe for a user's own rows: `flexkd init`."""
